"""ROS 2 bags (rosbag2: MCAP and sqlite3) without ROS, through rosbags.

Messages are rosbags' dataclasses: they have the fields of the .msg file, and arrays are NumPy arrays. `new_message`
makes one of any type, this package's included, with every field zero or empty:

    with BagWriter("out") as bag:
        message = new_message("kpmatch_ros/msg/MatchArray", width=640, height=480)
        bag.write("matches", message, stamp)
    for topic, type_name, stamp, message in read_messages("out"):
        ...

Bags are written so that ROS 2 Humble and later can play them (version 8 of the metadata); bags of all distributions up
to Kilted are read, whether they carry their message definitions or not. A bag that cannot be read raises BagError.
"""

from __future__ import annotations

import functools
import shutil
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from rosbags.interfaces import Nodetype
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore
from scipy.spatial.transform import Rotation

from kpmatch_ros.bags.recording import BagError, OutputError, Recording, own_files
from kpmatch_ros.bags.sqlite_file import SqliteWriter
from kpmatch_ros.bags.storage import Definition
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import Pose

__all__ = [
    "BagError",
    "BagWriter",
    "OutputError",
    "Record",
    "Topic",
    "bag_storage",
    "bag_topics",
    "camera_info_message",
    "image_message",
    "image_topics",
    "new_message",
    "pose_message",
    "read_ground_truth",
    "read_messages",
    "typestore",
]

IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
CAMERA_INFO_TYPE = "sensor_msgs/msg/CameraInfo"
USED_TYPES = (*IMAGE_TYPES, CAMERA_INFO_TYPE, "geometry_msgs/msg/PoseStamped")
GROUND_TRUTH = "/ground_truth/pose"

Encoding = Literal["rgb8", "bgr8", "mono8"]
Storage = Literal["mcap", "sqlite3"]


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


# --- messages -------------------------------------------------------------------------------------------------------


@functools.cache
def typestore() -> Typestore:
    """The message types of ROS 2 Jazzy and of this package, for rosbags."""
    store = get_typestore(Stores.ROS2_JAZZY)
    for name, text in _own_definitions().items():
        store.register(get_types_from_msg(text, name))
    return store


def _own_definitions() -> dict[str, str]:
    """The package's .msg files by type name.

    They are in msg/ of a checkout, and in share/kpmatch_ros/msg of an installation.
    """
    above = Path(__file__).resolve().parents[2:]
    for folder in (above[0] / "msg", *(prefix / "share" / "kpmatch_ros" / "msg" for prefix in above)):
        if (folder / "MatchArray.msg").is_file():
            return {f"kpmatch_ros/msg/{path.stem}": path.read_text() for path in sorted(folder.glob("*.msg"))}
    raise FileNotFoundError(f"the package's .msg files are not installed: no share/kpmatch_ros/msg above {above[0]}")


def new_message(type_name: str, **fields: Any) -> Any:
    """A message of any type in `typestore`. Fields that are not given are zero or empty.

    Raises:
        KeyError: for an unknown type.
        TypeError: for a field that the type does not have.
    """
    store = typestore()
    defaults = {name: _default(kind, detail) for name, (kind, detail) in store.fielddefs[type_name][1]}
    if unknown := fields.keys() - defaults:
        raise TypeError(f"{type_name} has no field {', '.join(sorted(unknown))}; it has {', '.join(defaults)}")
    return store.types[type_name](**{**defaults, **fields})


def _default(kind: Nodetype, detail: Any) -> Any:
    if kind == Nodetype.NAME:
        return new_message(detail)
    if kind == Nodetype.BASE:
        name = detail[0]
        return "" if name == "string" else False if name == "bool" else 0.0 if name.startswith("float") else 0
    (element, element_detail), length = detail
    count = length if kind == Nodetype.ARRAY else 0
    if element == Nodetype.BASE and element_detail[0] != "string":
        name = element_detail[0]
        return np.zeros(count, np.uint8 if name in ("byte", "char") else np.dtype(name))
    return [_default(element, element_detail) for _ in range(count)]


def _header(stamp: int, frame_id: str) -> Any:
    seconds, nanoseconds = divmod(int(stamp), 10**9)
    time = new_message("builtin_interfaces/msg/Time", sec=seconds, nanosec=nanoseconds)
    return new_message("std_msgs/msg/Header", stamp=time, frame_id=frame_id)


def image_message(
    image: NDArray[np.uint8],
    stamp: int,
    frame_id: str,
    encoding: Encoding = "rgb8",
    compressed: Literal["", "png", "jpeg"] = "",
) -> Any:
    """A sensor_msgs/Image, or a CompressedImage, of an RGB (H, W, 3) or grey (H, W) uint8 image."""
    grey = image.ndim == 2
    if encoding == "mono8":
        pixels = image if grey else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    else:
        pixels = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if grey else image
    header = _header(stamp, frame_id)
    if compressed:
        # cv2 takes blue first; the format is spelt as ROS's compressed_image_transport does.
        ok, data = cv2.imencode(f".{compressed}", pixels if pixels.ndim == 2 else pixels[..., ::-1])
        if not ok:
            raise BagError(f"an image of shape {image.shape} cannot be stored as {compressed}")
        stored = "mono8" if pixels.ndim == 2 else "bgr8"
        return new_message(
            IMAGE_TYPES[1],
            header=header,
            format=f"{encoding}; {compressed} compressed {stored}",
            data=np.asarray(data, np.uint8).ravel(),
        )
    if encoding == "bgr8":
        pixels = pixels[..., ::-1]
    data = np.ascontiguousarray(pixels, np.uint8)
    return new_message(
        IMAGE_TYPES[0],
        header=header,
        height=data.shape[0],
        width=data.shape[1],
        encoding=encoding,
        step=data.strides[0],
        data=data.ravel(),
    )


def camera_info_message(camera: Camera, stamp: int, frame_id: str, baseline: float = 0.0) -> Any:
    """A sensor_msgs/CameraInfo.

    For the right camera of a rectified stereo pair, its P holds the `baseline` in metres.
    """
    projection = np.column_stack([camera.matrix, [-camera.matrix[0, 0] * baseline, 0.0, 0.0]])
    distortion = camera.distortion if camera.distortion.size else np.zeros(5)
    return new_message(
        CAMERA_INFO_TYPE,
        header=_header(stamp, frame_id),
        height=camera.height,
        width=camera.width,
        distortion_model=camera.distortion_model or "plumb_bob",
        d=distortion.copy(),
        k=camera.matrix.ravel(),
        r=np.eye(3).ravel(),
        p=projection.ravel(),
    )


def pose_message(pose: Pose, stamp: int, frame_id: str) -> Any:
    """A geometry_msgs/PoseStamped."""
    x, y, z = (float(value) for value in pose.position)
    qx, qy, qz, qw = (float(value) for value in Rotation.from_matrix(pose.rotation).as_quat())
    return new_message(
        "geometry_msgs/msg/PoseStamped",
        header=_header(stamp, frame_id),
        pose=new_message(
            "geometry_msgs/msg/Pose",
            position=new_message("geometry_msgs/msg/Point", x=x, y=y, z=z),
            orientation=new_message("geometry_msgs/msg/Quaternion", x=qx, y=qy, z=qz, w=qw),
        ),
    )


# --- reading --------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[Recording]:
    """A bag that is open for reading: a folder, or a bare .mcap or .db3 file, which may be compressed (.zstd)."""
    if not path.exists():
        raise BagError(f"{path}: there is no such bag")
    if not path.is_dir() and path.suffix == ".bag":
        raise BagError(f"{path}: is a bag of ROS 1; rosbags-convert --src {path} --dst FOLDER makes one of ROS 2")
    if not path.is_dir() and not (path.is_file() and path.name.removesuffix(".zstd").endswith((".mcap", ".db3"))):
        raise BagError(f"{path}: is not a bag; give a bag's folder, or a .mcap or .db3 file, which may end in .zstd")
    with _explained(path):
        recording = Recording(path)
    try:
        if not recording.counts.total():
            foreign = ", ".join(f"{topic} ({encoding})" for topic, encoding in sorted(recording.foreign.items()))
            raise BagError(
                f"{path}: the bag holds no messages{f' in the encoding of ROS 2, only {foreign}' if foreign else ''}"
            )
        yield recording
    finally:
        with suppress(Exception):
            recording.close()


@contextmanager
def _explained(path: Path, what: str = "cannot be read") -> Iterator[None]:
    """Turn any error of the parsers into a BagError."""
    try:
        yield
    except BagError:
        raise
    except Exception as error:
        # Storages, compressions and message parsers have errors of their own. A truncated file raises any of them.
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        if isinstance(error, KeyError):
            reason += " is missing"
        hint = ""
        if "magic" in reason or "runcated" in reason or "malformed" in reason:
            hint = "; if the recording was cut short, `mcap recover` (MCAP) or `ros2 bag reindex` may save it"
        raise BagError(f"{path}: {what}: {reason}{hint}") from error


def bag_topics(path: str | Path) -> list[Topic]:
    """The topics of a bag that hold messages, by name. Raises BagError."""
    with _opened(Path(path)) as recording:
        return sorted(Topic(topic, kind, count) for (topic, kind), count in recording.counts.items() if count)


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
            left out, and numbers of messages that differ from what its metadata or index declares.

    Raises:
        BagError: it is broken, also in its middle, or lacks a topic; or a message cannot be decoded, and there are no
            `remarks` to say so.
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
                with _explained(path, f"the definition of {kind} cannot be understood"):
                    stores[kind] = _store_for(kind, recording.definitions.get(kind))
            if kind not in stores[kind].types:
                raise BagError(
                    f"{path}: {topic} has the type {kind}, which is not known here and which the bag does not define; "
                    "leave that topic out"
                )
        raw = recording.messages(wanted)
        while True:
            with _explained(path):
                found = next(raw, None)
            if found is None:
                break
            if found.type not in types.get(found.topic, [found.type]):
                what = f"has the type {found.type}, not {' or '.join(types[found.topic])}"
                left_out[found.topic] += 1
                reasons.setdefault(found.topic, f"{_at(found.stamp)} {what}")
                continue
            try:
                with _explained(path, f"a message on {found.topic} {_at(found.stamp)} cannot be decoded"):
                    message = stores[found.type].deserialize_cdr(found.content(), found.type)
            except BagError as error:
                if remarks is None:
                    raise
                left_out[found.topic] += 1
                reasons.setdefault(found.topic, f"{_at(found.stamp)} cannot be decoded: {error.__cause__}")
                continue
            yield Record(found.topic, found.type, found.stamp, message)
        if remarks is not None:
            new = list(recording.remarks)
            for topic, reason in reasons.items():
                total = sum(count for (name, _), count in recording.counts.items() if name == topic)
                new.append(f"{topic}: {left_out[topic]} of {total} messages were left out; the first one {reason}")
            remarks += [remark for remark in new if remark not in remarks]


def _at(stamp: int) -> str:
    return f"at {stamp // 10**9}.{stamp % 10**9:09d} s"


def _store_for(kind: str, definition: Definition | None) -> Typestore:
    """The types that decode messages of one type: those that the bag defines, or else those known here.

    Raises:
        ValueError: what the bag defines is not the type that ROS has under this name.
    """
    if definition is None:
        return typestore()
    text = definition.content.decode()
    if definition.form == "msg":
        types = get_types_from_msg(text, kind)
    else:  # one .idl file, or several, each below a line of "=" and its name
        types = {}
        for part in text.split("=" * 80 + "\n"):
            if part:
                types.update(get_types_from_idl(part.split("\n", 1)[1] if part.startswith("IDL: ") else part))
    store = get_typestore(Stores.EMPTY)
    store.register(types)
    if kind in USED_TYPES:
        _check_fields(store, kind)
    return store


def _check_fields(store: Typestore, kind: str) -> None:
    """Check that a type of ROS, and what it is made of, has the fields that are used here."""
    if kind not in store.fielddefs:
        raise ValueError(f"it leaves out {kind}")
    ours, theirs = typestore().fielddefs[kind][1], store.fielddefs[kind][1]
    if ours != theirs:
        raise ValueError(f"{kind} has not the fields that ROS gives it, {', '.join(name for name, _ in ours)}")
    for _, (node, detail) in ours:
        element: Any = (node, detail)
        while element[0] in (Nodetype.ARRAY, Nodetype.SEQUENCE):
            element = element[1][0]
        if element[0] == Nodetype.NAME:
            _check_fields(store, str(element[1]))


def read_ground_truth(path: str | Path, topic: str = GROUND_TRUTH) -> tuple[NDArray[np.int64], list[Pose]]:
    """Stamps (N,), nanoseconds, and poses of the camera in the world from a topic of geometry_msgs/PoseStamped.

    The pose is that of the optical frame: x_world = rotation x_camera + position. Raises BagError.
    """
    stamps, poses = [], []
    for _, type_name, _, message in read_messages(path, [topic]):
        if type_name != "geometry_msgs/msg/PoseStamped":
            raise BagError(f"{path}: {topic} has the type {type_name} instead of geometry_msgs/msg/PoseStamped")
        position, q = message.pose.position, message.pose.orientation
        stamps.append(message.header.stamp.sec * 10**9 + message.header.stamp.nanosec)
        poses.append(
            Pose(Rotation.from_quat([q.x, q.y, q.z, q.w]).as_matrix(), np.array([position.x, position.y, position.z]))
        )
    return np.array(stamps, np.int64), poses


# --- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Turn any error of the writers into a BagError."""
    try:
        with _explained(path, "cannot be written"):
            yield
    except BagError as error:
        if isinstance(error.__cause__, (OSError, sqlite3.OperationalError)):
            raise OutputError(str(error)) from error
        raise


class _Writer(Writer):
    STORAGE_PLUGINS = {**Writer.STORAGE_PLUGINS, StoragePlugin.SQLITE3: SqliteWriter}


class BagWriter:
    """Writes a bag, which is a folder.

    It is a context manager. An exception removes the bag that was begun.

    Args:
        path: of the folder, which must not exist yet.
        storage: of the messages.
        overwrite: replace the folder if it is a bag's, and holds nothing else.
        notes: for whoever reads metadata.yaml, its custom_data.

    Raises:
        OutputError: there is no place for it.
        BagError: when the folder cannot be written for another reason.
    """

    def __init__(
        self,
        path: str | Path,
        storage: Storage = "mcap",
        overwrite: bool = False,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        if self.path.exists():
            if not overwrite:
                raise BagError(f"{self.path}: exists already; remove it or choose another name")
            with _written(self.path):
                for file in own_files(self.path):
                    file.unlink()
                self.path.rmdir()
        self._connections: dict[tuple[str, str], Any] = {}
        plugin = StoragePlugin.MCAP if storage == "mcap" else StoragePlugin.SQLITE3
        with _written(self.path):
            self._writer = _Writer(self.path, version=8, storage_plugin=plugin)
            for key, note in (notes or {}).items():
                self._writer.set_custom_data(key, note)
            self._writer.open()

    def write(self, topic: str, message: Any, stamp: int) -> None:
        """Add a message of rosbags' typestore, recorded at `stamp`, nanoseconds."""
        type_name = message.__msgtype__
        data = typestore().serialize_cdr(message, type_name)
        with _written(self.path):
            if (topic, type_name) not in self._connections:
                new = self._writer.add_connection(topic, type_name, typestore=typestore())
                self._connections[topic, type_name] = new
            self._writer.write(self._connections[topic, type_name], int(stamp), data)

    def close(self) -> None:
        """Finish the bag. Its metadata is written only now."""
        with _written(self.path):
            file = None if self._writer.storage is None else self._writer.storage.path
            self._writer.close()
            if file is not None and not file.is_file():
                raise FileNotFoundError(f"{file.name}, which holds its messages, is not there")

    def __enter__(self) -> BagWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            with suppress(Exception):
                self._writer.abort()
            shutil.rmtree(self.path, ignore_errors=True)
