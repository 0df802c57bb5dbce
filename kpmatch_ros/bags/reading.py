"""Reads bags message by message."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rosbags.interfaces import Nodetype
from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore
from scipy.spatial.transform import Rotation

from kpmatch_ros.bags.message_types import CAMERA_INFO_TYPE, IMAGE_TYPES, POSE_TYPE, TF_TYPE, typestore
from kpmatch_ros.bags.recording import BagError, Raw, Recording, Storage, explained, with_remedy
from kpmatch_ros.bags.storage import Definition, in_seconds
from kpmatch_ros.geometry.pose import Pose

__all__ = [
    "GROUND_TRUTH",
    "Bag",
    "Record",
    "Topic",
    "bag_storage",
    "bag_topics",
    "ground_truth",
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


class Bag:
    """An open bag: a folder, or a bare .mcap or .db3 file, which may be compressed (.zstd). It is a context manager.

    Opening reads the index. A file that is compressed as a whole is decompressed to a temporary file, which `close`
    removes. The bag can be read any number of times, also at the same time: no reading affects another one.

    Attributes:
        path: of the bag.
        storage: format of its files.
        topics: the topics that hold messages, sorted by name.
        damage: the damage that is found when the bag is opened, before its messages are read, in words.

    Raises:
        BagError: the bag cannot be read, or it holds no messages in ROS 2's encoding.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        if not path.exists():
            raise BagError(f"{path}: there is no such bag")
        if not path.is_dir() and path.suffix == ".bag":
            raise BagError(f"{path}: is a ROS 1 bag; rosbags-convert --src {path} --dst FOLDER converts it to ROS 2")
        if not path.is_dir() and not (path.is_file() and path.name.removesuffix(".zstd").endswith((".mcap", ".db3"))):
            raise BagError(
                f"{path}: is not a bag; give a bag's folder, or a .mcap or .db3 file, which may end in .zstd"
            )
        with explained(path):
            self._recording = recording = Recording(path)
        self.storage: Storage = recording.storage
        self.damage = recording.findings.damage
        self.topics = sorted(Topic(topic, kind, count) for (topic, kind), count in recording.counts.items() if count)
        if not self.topics:
            self.close()
            foreign = ", ".join(f"{topic} ({encoding})" for topic, encoding in sorted(recording.foreign.items()))
            only = f" in the encoding of ROS 2, only {foreign}" if foreign else ""
            raise BagError("; ".join([f"{path}: the bag holds no messages{only}", *self.damage]))

    def __enter__(self) -> Bag:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def image_topics(self) -> list[Topic]:
        """The topics with raw or compressed images."""
        return [topic for topic in self.topics if topic.type in IMAGE_TYPES]

    def close(self) -> None:
        """Remove the temporary files."""
        with suppress(Exception):
            self._recording.close()

    def raw_messages(self, topics: Collection[str]) -> Iterator[Raw]:
        """Yield the messages on some topics as they are stored. What cannot be read is left out. Raises BagError."""
        with explained(self.path):
            yield from self._recording.messages(topics, self._recording.findings.copy())

    def messages(
        self,
        topics: Collection[str] | Mapping[str, Collection[str]] | None = None,
        remarks: list[str] | None = None,
    ) -> Iterator[Record]:
        """Yield the messages, or those on some topics, in the order of recording.

        If the bag is split into several files, they are read one after the other, as `ros2 bag play` does.

        Args:
            topics: to read; all if not given. A mapping gives the types that are wanted on each topic; messages of
                other types are left out.
            remarks: list that receives what is odd about the bag, in words, once the last message is read: topics and
                messages that were left out, damage, up to where an unfinished recording goes, and message counts that
                differ from those in the metadata or the index.

        Raises:
            BagError: nothing can be read, or a topic is missing. Without `remarks`, also if a part of the bag is
                damaged or a message cannot be decoded.
        """
        path, recording = self.path, self._recording
        known = {topic for topic, _ in recording.counts}
        if topics is not None and (missing := [topic for topic in topics if topic not in known]):
            foreign = [f"; the messages on {topic} are in the encoding {recording.foreign[topic]}" for topic in missing
                       if topic in recording.foreign]  # fmt: skip
            raise BagError(
                f"{path}: has no topic {', '.join(missing)}; it has {', '.join(sorted(known))}{''.join(foreign)}"
            )
        wanted = known if topics is None else set(topics)
        types = topics if isinstance(topics, Mapping) else {}
        findings = recording.findings.copy()
        left_out: Counter[str] = Counter()
        reasons: dict[str, str] = {}  # why a message was left out: the first reason of each topic
        stores = self._stores(wanted, types, findings.remarks)
        nothing = wanted == known
        # Closed explicitly: the traceback of an undecodable message may keep this frame, and with it an open file.
        with closing(recording.messages(wanted, findings)) as raw:
            while True:
                with explained(path):
                    found = next(raw, None)
                unsaid = remarks is None or (found is None and nothing)
                if unsaid and (damage := findings.damage):
                    raise BagError(f"{path}: cannot be read: {with_remedy(damage[0], path)}")
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
                    reasons.setdefault(
                        found.topic, f"at {in_seconds(found.stamp)} cannot be decoded: {error.__cause__}"
                    )
                    continue
                yield Record(found.topic, found.type, found.stamp, message)
        if remarks is not None:
            new = findings.damage + findings.remarks  # the cause comes before its consequences
            for topic, reason in reasons.items():
                total = sum(count for (name, _), count in recording.counts.items() if name == topic)
                new.append(f"{topic}: {left_out[topic]} of {total} messages were left out; the first one {reason}")
            remarks += [remark for remark in new if remark not in remarks]

    def _stores(
        self, wanted: Collection[str], types: Mapping[str, Collection[str]], remarks: list[str]
    ) -> dict[str, Typestore]:
        """What decodes the messages on some topics, by type. See :meth:`messages` for the types.

        Remarks say where a definition in the bag was not used.

        Raises:
            BagError: a definition is missing or cannot be used.
        """
        stores: dict[str, Typestore] = {}
        for topic, kind in self._recording.counts:
            if topic not in wanted or kind not in types.get(topic, [kind]):
                continue
            if kind not in stores:
                with explained(self.path, f"the definition of {kind} cannot be used"):
                    stores[kind], why = _store_for(kind, self._recording.definitions.get(kind))
                if why:
                    remarks.append(
                        f"{kind}: was decoded with this package's definition, because the bag's definition {why}"
                    )
            if kind not in stores[kind].types:
                raise BagError(
                    f"{self.path}: {topic} has the type {kind}, which neither this package nor the bag defines; "
                    "leave that topic out"
                )
        return stores


def bag_topics(path: str | Path) -> list[Topic]:
    """The topics of a bag that hold messages, sorted by name. Raises BagError."""
    with Bag(path) as bag:
        return bag.topics


def image_topics(path: str | Path) -> list[Topic]:
    """The topics with raw or compressed images that hold messages, sorted by name. Raises BagError."""
    with Bag(path) as bag:
        return bag.image_topics


def bag_storage(path: str | Path) -> Storage:
    """The storage format of a bag. Raises BagError."""
    with Bag(path) as bag:
        return bag.storage


def read_messages(
    path: str | Path,
    topics: Collection[str] | Mapping[str, Collection[str]] | None = None,
    remarks: list[str] | None = None,
) -> Iterator[Record]:
    """Open a bag and yield its messages, see :meth:`Bag.messages`. It is closed after the last one. Raises BagError."""
    with Bag(path) as bag:
        yield from bag.messages(topics, remarks)


def _store_for(kind: str, definition: Definition | None) -> tuple[Typestore, str]:
    """The types that decode messages of type `kind`: from the bag's definition, or else from :func:`typestore`.

    Returns:
        the types, and why the bag's definition was not used; the text is empty if it was used or the bag has none.

    Raises:
        ValueError: the bag's definition has other fields than ROS's type of this name.
        Exception: the definition cannot be parsed, and this package does not use the type itself.
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
        return typestore(), "cannot be parsed"
    absent = _absent_types(store, kind) if kind in _USED_TYPES else []
    return (typestore(), f"lacks {', '.join(absent)}") if absent else (store, "")


def _types_in(definition: Definition, kind: str) -> dict[str, Any]:
    """The types that a definition holds, by name. Raises the parser's errors."""
    text = definition.content.decode().replace("\r\n", "\n").replace("\r", "\n")
    if definition.form == "msg":
        return dict(get_types_from_msg(text, kind))
    types: dict[str, Any] = {}
    for part in text.split("=" * 80 + "\n"):  # one .idl file, or several, each after a line of "=" and its name
        if part:
            types.update(get_types_from_idl(part.split("\n", 1)[1] if part.startswith("IDL: ") else part))
    return types


def _absent_types(store: Typestore, kind: str) -> list[str]:
    """The types that `store` lacks, among `kind` and all types of its fields. Those it has are equal to ROS's.

    Raises:
        ValueError: a type has other fields than in ROS.
    """
    if kind not in store.fielddefs:
        return [kind]
    ours, theirs = typestore().fielddefs[kind][1], store.fielddefs[kind][1]
    if ours != theirs:
        raise ValueError(f"{kind} does not have the fields of ROS's type: {', '.join(name for name, _ in ours)}")
    absent: list[str] = []
    for _, (node, detail) in ours:
        element: Any = (node, detail)
        while element[0] in (Nodetype.ARRAY, Nodetype.SEQUENCE):
            element = element[1][0]
        if element[0] == Nodetype.NAME:
            absent += _absent_types(store, str(element[1]))
    return list(dict.fromkeys(absent))


def ground_truth(bag: Bag, topic: str = GROUND_TRUTH) -> tuple[NDArray[np.int64], list[Pose]]:
    """Read stamps (N,) in nanoseconds, and N poses of the camera in the world, from a geometry_msgs/PoseStamped topic.

    Each pose is that of the optical frame: x_world = rotation x_camera + position. Raises BagError.
    """
    stamps, poses = [], []
    for _, type_name, _, message in bag.messages([topic]):
        if type_name != POSE_TYPE:
            raise BagError(f"{bag.path}: {topic} has the type {type_name} instead of {POSE_TYPE}")
        position, q = message.pose.position, message.pose.orientation
        stamps.append(message.header.stamp.sec * 10**9 + message.header.stamp.nanosec)
        poses.append(
            Pose(Rotation.from_quat([q.x, q.y, q.z, q.w]).as_matrix(), np.array([position.x, position.y, position.z]))
        )
    return np.array(stamps, np.int64), poses


def read_ground_truth(path: str | Path, topic: str = GROUND_TRUTH) -> tuple[NDArray[np.int64], list[Pose]]:
    """Open a bag and read its ground truth, see :func:`ground_truth`. Raises BagError."""
    with Bag(path) as bag:
        return ground_truth(bag, topic)
