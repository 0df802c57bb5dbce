"""What bags hold, message by message."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rosbags.interfaces import Nodetype
from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore
from scipy.spatial.transform import Rotation

from kpmatch_ros.bags.message_types import CAMERA_INFO_TYPE, IMAGE_TYPES, POSE_TYPE, TF_TYPE, typestore
from kpmatch_ros.bags.recording import BagError, Recording, Storage, explained, with_remedy
from kpmatch_ros.bags.storage import Definition, in_seconds
from kpmatch_ros.geometry.pose import Pose

__all__ = [
    "GROUND_TRUTH",
    "Record",
    "Topic",
    "bag_storage",
    "bag_topics",
    "image_topics",
    "read_ground_truth",
    "read_messages",
]

GROUND_TRUTH = "/ground_truth/pose"
_USED_TYPES = (*IMAGE_TYPES, CAMERA_INFO_TYPE, POSE_TYPE, TF_TYPE)


class Record(NamedTuple):
    """A message in a bag."""

    topic: str
    type: str  # such as "sensor_msgs/msg/Image"
    stamp: int  # when it was recorded, nanoseconds
    message: Any


class Topic(NamedTuple):
    """A topic in a bag."""

    name: str
    type: str
    num_messages: int


@contextmanager
def _opened(path: Path) -> Iterator[Recording]:
    """A bag that is open for reading: a folder, or a bare .mcap or .db3 file, which may be compressed (.zstd)."""
    if not path.exists():
        raise BagError(f"{path}: there is no such bag")
    if not path.is_dir() and path.suffix == ".bag":
        raise BagError(f"{path}: is a bag of ROS 1; rosbags-convert --src {path} --dst FOLDER makes one of ROS 2")
    if not path.is_dir() and not (path.is_file() and path.name.removesuffix(".zstd").endswith((".mcap", ".db3"))):
        raise BagError(f"{path}: is not a bag; give a bag's folder, or a .mcap or .db3 file, which may end in .zstd")
    with explained(path):
        recording = Recording(path)
    try:
        if not recording.counts.total():
            foreign = ", ".join(f"{topic} ({encoding})" for topic, encoding in sorted(recording.foreign.items()))
            only = f" in the encoding of ROS 2, only {foreign}" if foreign else ""
            raise BagError("; ".join([f"{path}: the bag holds no messages{only}", *recording.damage]))
        yield recording
    finally:
        with suppress(Exception):
            recording.close()


def bag_topics(path: str | Path) -> list[Topic]:
    """The topics of a bag that hold messages, by name. Raises BagError."""
    with _opened(Path(path)) as recording:
        return sorted(Topic(topic, kind, count) for (topic, kind), count in recording.counts.items() if count)


def bag_damage(path: str | Path) -> list[str]:
    """What cannot be read of a bag, in words, as far as its index tells. Raises BagError."""
    with _opened(Path(path)) as recording:
        return recording.damage


def image_topics(path: str | Path) -> list[Topic]:
    """The topics with images, compressed or not, that hold messages, by name. Raises BagError."""
    return [topic for topic in bag_topics(path) if topic.type in IMAGE_TYPES]


def bag_storage(path: str | Path) -> Storage:
    """The storage of a bag. Raises BagError."""
    with _opened(Path(path)) as recording:
        return recording.storage


def read_messages(
    path: str | Path,
    topics: Collection[str] | Mapping[str, Collection[str]] | None = None,
    remarks: list[str] | None = None,
) -> Iterator[Record]:
    """The messages of a bag, or of some of its topics, in the order of recording.

    Where the bag is split over several files, these are read one after the other, as `ros2 bag play` does.

    Args:
        path: of the bag.
        topics: to read; all where not given. A mapping says of each which types are wanted: others are left out.
        remarks: gets what is odd about the bag, in words, once the last message was read: topics and messages that were
            left out, what is damaged, up to where a recording goes that was not finished, and numbers of messages that
            differ from what its metadata or index declares.

    Raises:
        BagError: nothing of it can be read, or it lacks a topic; or part of it is damaged, or a message cannot be
            decoded, and there are no `remarks` to say so.
    """
    path = Path(path)
    with _opened(path) as recording:
        known = {topic for topic, _ in recording.counts}
        if topics is not None and (missing := [topic for topic in topics if topic not in known]):
            foreign = [f"; {topic} is in the encoding {recording.foreign[topic]}" for topic in missing
                       if topic in recording.foreign]  # fmt: skip
            raise BagError(
                f"{path}: has no topic {', '.join(missing)}; it has {', '.join(sorted(known))}{''.join(foreign)}"
            )
        wanted = known if topics is None else set(topics)
        types = topics if isinstance(topics, Mapping) else {}
        left_out: Counter[str] = Counter()
        reasons: dict[str, str] = {}  # the first of each topic
        stores: dict[str, Typestore] = {}
        for topic, kind in recording.counts:
            if topic not in wanted or kind not in types.get(topic, [kind]):
                continue
            if kind not in stores:
                with explained(path, f"the definition of {kind} cannot be understood"):
                    stores[kind], why = _store_for(kind, recording.definitions.get(kind))
                if why:
                    recording.remarks.append(f"{kind}: was read by the package's own definition: that in the bag {why}")
            if kind not in stores[kind].types:
                raise BagError(
                    f"{path}: {topic} has the type {kind}, which is not known here and which the bag does not define; "
                    "leave that topic out"
                )
        raw = recording.messages(wanted)
        nothing = wanted == known
        while True:
            with explained(path):
                found = next(raw, None)
            unsaid = remarks is None or (found is None and nothing)
            if unsaid and recording.damage:
                raise BagError(f"{path}: cannot be read: {with_remedy(recording.damage[0], path)}")
            if found is None:
                break
            nothing = False
            if found.type not in types.get(found.topic, [found.type]):
                what = f"has the type {found.type}, not {' or '.join(types[found.topic])}"
                left_out[found.topic] += 1
                reasons.setdefault(found.topic, f"at {in_seconds(found.stamp)} {what}")
                continue
            try:
                with explained(path, f"a message on {found.topic} at {in_seconds(found.stamp)} cannot be decoded"):
                    message = stores[found.type].deserialize_cdr(found.content(), found.type)
            except BagError as error:
                if remarks is None:
                    raise
                left_out[found.topic] += 1
                reasons.setdefault(found.topic, f"at {in_seconds(found.stamp)} cannot be decoded: {error.__cause__}")
                continue
            yield Record(found.topic, found.type, found.stamp, message)
        if remarks is not None:
            new = recording.damage + recording.remarks  # the cause comes before what follows from it
            for topic, reason in reasons.items():
                total = sum(count for (name, _), count in recording.counts.items() if name == topic)
                new.append(f"{topic}: {left_out[topic]} of {total} messages were left out; the first one {reason}")
            remarks += [remark for remark in new if remark not in remarks]


def _store_for(kind: str, definition: Definition | None) -> tuple[Typestore, str]:
    """The types that decode messages of one type: those that the bag defines, or else those known here.

    Returns:
        the types, and where they are not those that the bag defines, why; or nothing where it defines none.

    Raises:
        ValueError: what the bag defines is not the type that ROS has under this name.
        Exception: it cannot be parsed, and is not of a type that is used here.
    """
    if definition is None:
        return typestore(), ""
    if not definition.content.strip():
        return typestore(), "is empty"
    store = get_typestore(Stores.EMPTY)
    try:
        store.register(_types_in(definition, kind))
    except Exception:
        if kind not in _USED_TYPES:
            raise
        return typestore(), "cannot be understood"
    absent = _absent_types(store, kind) if kind in _USED_TYPES else []
    return (typestore(), f"leaves out {', '.join(absent)}") if absent else (store, "")


def _types_in(definition: Definition, kind: str) -> dict[str, Any]:
    """The types that a definition holds, by name. Raises what its parser does."""
    text = definition.content.decode().replace("\r\n", "\n").replace("\r", "\n")
    if definition.form == "msg":
        return dict(get_types_from_msg(text, kind))
    types: dict[str, Any] = {}
    for part in text.split("=" * 80 + "\n"):  # one .idl file, or several, each below a line of "=" and its name
        if part:
            types.update(get_types_from_idl(part.split("\n", 1)[1] if part.startswith("IDL: ") else part))
    return types


def _absent_types(store: Typestore, kind: str) -> list[str]:
    """Which types of ROS are absent that a type is made of, or it itself. Those that are there have its fields.

    Raises:
        ValueError: one has other fields.
    """
    if kind not in store.fielddefs:
        return [kind]
    ours, theirs = typestore().fielddefs[kind][1], store.fielddefs[kind][1]
    if ours != theirs:
        raise ValueError(f"{kind} has not the fields that ROS gives it, {', '.join(name for name, _ in ours)}")
    absent: list[str] = []
    for _, (node, detail) in ours:
        element: Any = (node, detail)
        while element[0] in (Nodetype.ARRAY, Nodetype.SEQUENCE):
            element = element[1][0]
        if element[0] == Nodetype.NAME:
            absent += _absent_types(store, str(element[1]))
    return list(dict.fromkeys(absent))


def read_ground_truth(path: str | Path, topic: str = GROUND_TRUTH) -> tuple[NDArray[np.int64], list[Pose]]:
    """Stamps (N,), nanoseconds, and poses of the camera in the world from a topic of geometry_msgs/PoseStamped.

    The pose is that of the optical frame: x_world = rotation x_camera + position. Raises BagError.
    """
    stamps, poses = [], []
    for _, type_name, _, message in read_messages(path, [topic]):
        if type_name != POSE_TYPE:
            raise BagError(f"{path}: {topic} has the type {type_name} instead of {POSE_TYPE}")
        position, q = message.pose.position, message.pose.orientation
        stamps.append(message.header.stamp.sec * 10**9 + message.header.stamp.nanosec)
        poses.append(
            Pose(Rotation.from_quat([q.x, q.y, q.z, q.w]).as_matrix(), np.array([position.x, position.y, position.z]))
        )
    return np.array(stamps, np.int64), poses
