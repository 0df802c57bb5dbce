"""Tests of bags without ROS: written data is read back, real recordings are read, and broken bags are explained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from rosbags.highlevel import AnyReader
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from kpmatch_ros.bags import (
    GROUND_TRUTH,
    BagError,
    BagWriter,
    Topic,
    bag_topics,
    camera_info_message,
    image_message,
    image_topics,
    new_message,
    read_ground_truth,
    read_messages,
    typestore,
)
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import relative_motion
from kpmatch_ros.imaging.images import to_array
from simulation import camera_path, demo_camera
from simulation.bags import write_camera_bag, write_demo_bag

STAMPS = [1_700_000_000_000_000_000 + 100_000_000 * i for i in range(4)]
IMAGE, INFO = "sensor_msgs/msg/Image", "sensor_msgs/msg/CameraInfo"


@pytest.fixture
def images() -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(3)
    return [random.integers(0, 256, (30, 41, 3), dtype=np.uint8) for _ in STAMPS]


@pytest.fixture
def camera() -> Camera:
    return demo_camera(41, 30)


@pytest.fixture
def bag(tmp_path: Path, images: list[NDArray[np.uint8]], camera: Camera) -> Path:
    write_camera_bag(tmp_path / "bag", images, STAMPS, camera)
    return tmp_path / "bag"


def storage_file(bag: Path) -> Path:
    return next(path for path in bag.iterdir() if path.suffix in (".mcap", ".db3"))


def read_all(path: Path) -> list[Any]:
    return list(read_messages(path))


# round trips


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "mono8"])
def test_images_and_calibration_are_read_back_bit_for_bit(
    tmp_path: Path,
    images: list[NDArray[np.uint8]],
    camera: Camera,
    storage: Literal["mcap", "sqlite3"],
    encoding: Literal["rgb8", "bgr8", "mono8"],
) -> None:
    if encoding == "mono8":
        images = [np.ascontiguousarray(image[..., 0]) for image in images]
    write_camera_bag(tmp_path / "bag", images, STAMPS, camera, encoding=encoding, storage=storage, frame_id="eye")
    records = read_all(tmp_path / "bag")
    assert [(record.topic, record.type, record.stamp) for record in records] == [
        entry
        for stamp in STAMPS
        for entry in (("/camera/image_raw", IMAGE, stamp), ("/camera/camera_info", INFO, stamp))
    ]
    for record, image in zip(records[::2], images):
        message = record.message
        assert (message.encoding, message.width, message.height) == (encoding, 41, 30)
        assert message.header.frame_id == "eye"
        assert message.header.stamp.sec * 10**9 + message.header.stamp.nanosec == record.stamp
        assert np.array_equal(to_array(message), image)
    for record in records[1::2]:
        read = Camera.from_camera_info(record.message, rectified=False)
        assert (read.width, read.height, read.distortion_model) == (41, 30, "plumb_bob")
        assert np.array_equal(read.matrix, camera.matrix) and np.array_equal(read.distortion, camera.distortion)


def test_png_is_lossless_and_jpeg_is_close(tmp_path: Path, images: list[NDArray[np.uint8]]) -> None:
    smooth = [cv2.GaussianBlur(image, (0, 0), 4) for image in images]
    write_camera_bag(tmp_path / "png", smooth, STAMPS, None, image_topic="/eye/image/compressed", compressed="png")
    write_camera_bag(tmp_path / "jpeg", smooth, STAMPS, None, image_topic="/eye/image/compressed", compressed="jpeg")
    assert image_topics(tmp_path / "png") == [Topic("/eye/image/compressed", "sensor_msgs/msg/CompressedImage", 4)]
    for image, png, jpeg in zip(smooth, read_all(tmp_path / "png"), read_all(tmp_path / "jpeg")):
        assert png.message.format == "rgb8; png compressed bgr8"
        assert np.array_equal(to_array(png.message), image)
        assert np.abs(to_array(jpeg.message).astype(int) - image).mean() < 4


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_messages_of_this_package_are_read_back_unchanged(tmp_path: Path, storage: Literal["mcap", "sqlite3"]) -> None:
    matches = new_message(
        "kpmatch_ros/msg/MatchArray",
        width=640,
        scores=np.array([0.5, 0.25], np.float32),
        track_ids=np.array([2**40, 7], np.uint64),
        sigmas=np.array([0.125, 0.5], np.float32),
        reset=True,
        extractor="superpoint-open",
    )
    pose = new_message("kpmatch_ros/msg/RelativePose", status=3, median_parallax=1.5)
    pose.pose.pose.position.x = 2.5
    features = new_message("kpmatch_ros/msg/FeatureArray", descriptors=np.arange(4, dtype=np.float32))
    with BagWriter(tmp_path / "bag", storage) as bag:
        for topic, message in (("matches", matches), ("relative_pose", pose), ("features", features)):
            bag.write(topic, message, STAMPS[0])
    read = {record.topic: record.message for record in read_messages(tmp_path / "bag")}
    assert np.array_equal(read["matches"].scores, [0.5, 0.25]) and read["matches"].track_ids.tolist() == [2**40, 7]
    assert np.array_equal(read["matches"].sigmas, [0.125, 0.5]) and read["matches"].NOT_DETECTED == 2**32 - 1
    assert read["matches"].reset is True and read["matches"].extractor == "superpoint-open"
    assert (read["matches"].CONSECUTIVE, read["matches"].STEREO) == (0, 1)
    assert read["relative_pose"].status == read["relative_pose"].NO_TRANSLATION == 3
    assert read["relative_pose"].pose.pose.position.x == 2.5 and read["relative_pose"].pose.covariance.shape == (36,)
    assert np.array_equal(read["features"].descriptors, [0, 1, 2, 3])


def test_the_message_fields_equal_those_of_the_ros_messages() -> None:
    messages = pytest.importorskip("kpmatch_ros.msg")
    for name in ("MatchArray", "RelativePose", "FeatureArray"):
        ours = [field for field, _ in typestore().fielddefs[f"kpmatch_ros/msg/{name}"][1]]
        assert ours == list(getattr(messages, name).get_fields_and_field_types())


def test_another_rosbag2_reader_reads_the_bag(bag: Path, images: list[NDArray[np.uint8]]) -> None:
    with AnyReader([bag]) as reader:  # also checks the hashes of the definitions
        connections = [c for c in reader.connections if c.topic == "/camera/image_raw"]
        read = [reader.deserialize(raw, c.msgtype) for c, _, raw in reader.messages(connections)]
    assert [message.data.tobytes() for message in read] == [image.tobytes() for image in images]  # type: ignore[attr-defined]


def test_the_metadata_has_the_version_and_qos_text_that_humble_reads(bag: Path) -> None:
    """Humble's reader needs the quality of service in the metadata as text; later versions made it a list."""
    text = (bag / "metadata.yaml").read_text()
    assert "version: 8" in text and "offered_qos_profiles: ''" in text


def test_messages_are_read_in_recording_order_and_only_from_requested_topics(tmp_path: Path, camera: Camera) -> None:
    with BagWriter(tmp_path / "bag") as bag:
        for stamp in reversed(STAMPS):
            for topic in ("/b", "/a"):
                bag.write(topic, camera_info_message(camera, stamp, topic), stamp)
    assert [record.stamp for record in read_messages(tmp_path / "bag", ["/a"])] == STAMPS
    assert {record.topic for record in read_messages(tmp_path / "bag", ["/a"])} == {"/a"}
    assert [record.stamp for record in read_messages(tmp_path / "bag")] == sorted(STAMPS * 2)
    assert bag_topics(tmp_path / "bag") == [Topic("/a", INFO, 4), Topic("/b", INFO, 4)]
    assert image_topics(tmp_path / "bag") == []


def test_the_right_camera_info_has_the_baseline_in_p() -> None:
    camera = demo_camera(distorted=False)
    info = camera_info_message(camera, 0, "right", baseline=0.12)
    assert info.p.reshape(3, 4)[0, 3] == pytest.approx(-0.12 * camera.matrix[0, 0])
    assert np.array_equal(info.p.reshape(3, 4)[:, :3], camera.matrix)


def test_a_message_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="has no field widht; it has header, height, width"):
        new_message(IMAGE, widht=3)


# bags of other makers


def test_real_recordings_are_read(recorded_data: Path) -> None:
    stereo = recorded_data / "euroc_v101_still_stereo"
    assert image_topics(stereo) == [Topic(f"/cam{i}/image_raw", IMAGE, 12) for i in (0, 1)]
    records = read_all(stereo)
    assert len(records) == 48 and [r.stamp for r in records] == sorted(r.stamp for r in records)
    first = next(r.message for r in records if r.topic == "/cam0/image_raw")
    assert to_array(first).shape == (480, 752)
    infos = [r.message for r in records if r.topic == "/cam1/camera_info"]
    assert Camera.from_camera_info(infos[0], rectified=False).distortion.any()
    walk = recorded_data / "tum_fr3_office_1hz"
    (topic,) = image_topics(walk)
    assert topic.name == "/camera/image_raw"
    assert len(list(read_messages(walk, [topic.name]))) == topic.num_messages
    assert len(read_all(storage_file(walk))) == sum(t.num_messages for t in bag_topics(walk))  # the single file


def write_raw(
    path: Path,
    types: dict[str, str],
    storage: StoragePlugin = StoragePlugin.SQLITE3,
    compression: CompressionMode = CompressionMode.NONE,
) -> None:
    """Write a bag with a message of each type with the given definitions."""
    store = get_typestore(Stores.ROS2_HUMBLE)
    writer = Writer(path, version=8, storage_plugin=storage)
    writer.set_compression(compression, CompressionFormat.ZSTD)
    with writer:
        for number, (name, text) in enumerate(types.items()):
            store.register(get_types_from_msg(text, name))
            message: Any = store.types[name](7)
            connection = writer.add_connection(f"/topic{number}", name, typestore=store)
            writer.write(connection, STAMPS[number], store.serialize_cdr(message, name))


@pytest.mark.parametrize("storage", list(StoragePlugin))
def test_a_message_type_defined_only_in_the_bag_is_read(tmp_path: Path, storage: StoragePlugin) -> None:
    write_raw(tmp_path / "bag", {"robot_msgs/msg/Gear": "int32 teeth", "robot_msgs/msg/Wheel": "uint8 spokes"}, storage)
    gear, wheel = read_all(tmp_path / "bag")
    assert (gear.type, gear.message.teeth, wheel.message.spokes) == ("robot_msgs/msg/Gear", 7, 7)


@pytest.mark.parametrize("compression", [CompressionMode.FILE, CompressionMode.MESSAGE])
def test_a_compressed_bag_is_read(tmp_path: Path, compression: CompressionMode) -> None:
    write_raw(tmp_path / "bag", {"robot_msgs/msg/Gear": "int32 teeth"}, compression=compression)
    assert [record.message.teeth for record in read_messages(tmp_path / "bag")] == [7]


def test_a_file_compressed_or_decompressed_after_recording_is_found(tmp_path: Path) -> None:
    for name, compression in (("plain", CompressionMode.NONE), ("packed", CompressionMode.FILE)):
        write_raw(tmp_path / name, {"robot_msgs/msg/Gear": "int32 teeth"}, compression=compression)
    plain, packed = ((tmp_path / name / name).with_suffix(ending) for name, ending in
                     (("plain", ".db3"), ("packed", ".db3.zstd")))  # fmt: skip
    content = plain.read_bytes(), packed.read_bytes()
    plain.with_suffix(".db3.zstd").write_bytes(content[1])
    packed.with_suffix("").write_bytes(content[0])
    plain.unlink()
    packed.unlink()
    for bag in (tmp_path / "plain", tmp_path / "packed", plain.with_suffix(".db3.zstd")):
        assert [record.message.teeth for record in read_messages(bag)] == [7]


@pytest.mark.parametrize("known", [True, False])
def test_a_humble_bag_without_definitions_is_read_if_the_types_are_known(tmp_path: Path, known: bool) -> None:
    apsw = pytest.importorskip("apsw")
    name = "std_msgs/msg/Int32" if known else "robot_msgs/msg/Gear"
    write_raw(tmp_path / "bag", {name: "int32 data"})
    database = apsw.Connection(str(storage_file(tmp_path / "bag")))
    for statement in ("DELETE FROM message_definitions", "UPDATE topics SET type_description_hash = ''"):
        database.execute(statement)
    database.close()
    if known:
        assert [record.message.data for record in read_messages(tmp_path / "bag")] == [7]
    else:
        with pytest.raises(
            BagError, match=r"/topic0 has the type robot_msgs/msg/Gear, which neither this package nor the bag"
        ):
            read_all(tmp_path / "bag")


@pytest.mark.parametrize(
    ("definition", "said"),
    [
        ("int32 [", "the definition of robot_msgs/msg/Odd cannot be used"),
        ("Part part", r"a message on /odd at .* cannot be decoded: 'robot_msgs/msg/Part' is missing"),
    ],
)
def test_a_topic_that_cannot_be_decoded_does_not_block_the_others(tmp_path: Path, definition: str, said: str) -> None:
    with Writer(tmp_path / "bag", version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        odd = writer.add_connection("/odd", "robot_msgs/msg/Odd", msgdef=definition, rihs01="RIHS01_0")
        writer.write(odd, STAMPS[0], b"\0\1\0\0")
        store = get_typestore(Stores.ROS2_HUMBLE)
        fine = writer.add_connection("/fine", "std_msgs/msg/Int32", typestore=store)
        message: Any = store.types["std_msgs/msg/Int32"](5)
        writer.write(fine, STAMPS[1], store.serialize_cdr(message, "std_msgs/msg/Int32"))
    assert [record.message.data for record in read_messages(tmp_path / "bag", ["/fine"])] == [5]
    with pytest.raises(BagError, match=said):
        read_all(tmp_path / "bag")


# invalid and broken bags


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
@pytest.mark.parametrize("name", ["run #3/drive#1", "50%41", "a?b", "wide ü", "drive.bag"])
def test_a_bag_with_special_characters_in_its_name_is_written_and_read(
    tmp_path: Path, images: list[NDArray[np.uint8]], storage: Literal["mcap", "sqlite3"], name: str
) -> None:
    bag = tmp_path / name
    write_camera_bag(bag, images, STAMPS, None, storage=storage)
    assert len(read_all(bag)) == len(images)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.parent for path in files] == [bag, bag]


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_bag_path_may_begin_with_two_slashes(
    tmp_path: Path, images: list[NDArray[np.uint8]], storage: Literal["mcap", "sqlite3"]
) -> None:
    bag = Path(f"/{tmp_path}/bag")
    write_camera_bag(bag, images, STAMPS, None, storage=storage)
    assert str(bag).startswith("//") and len(read_all(bag)) == len(images)


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_finishing_a_bag_whose_storage_file_is_missing_raises_a_bag_error(
    tmp_path: Path, storage: Literal["mcap", "sqlite3"]
) -> None:
    writer = BagWriter(tmp_path / "bag", storage)
    writer.write("/text", new_message("std_msgs/msg/String", data="?"), STAMPS[0])
    storage_file(tmp_path / "bag").unlink()
    with pytest.raises(BagError, match=r"bag: cannot be written: bag\..*, which holds its messages, is missing"):
        writer.close()


def test_the_files_that_macos_adds_are_ignored(bag: Path) -> None:
    (bag / f"._{storage_file(bag).name}").write_bytes(b"\0\5\x16\7" + bytes(100))
    remarks: list[str] = []
    assert len(list(read_messages(bag, remarks=remarks))) == 8 and not remarks
    (bag / "metadata.yaml").unlink()
    assert len(read_all(bag)) == 8


def test_a_recording_killed_before_its_metadata_was_written_is_read(bag: Path) -> None:
    (bag / "metadata.yaml").unlink()
    assert len(read_all(bag)) == 8


def test_a_path_that_is_not_a_bag_is_refused_with_the_reason(tmp_path: Path, bag: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "old.bag").write_bytes(b"#ROSBAG V2.0\n")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "drive.bag").write_bytes(b"#ROSBAG V2.0\n")
    (tmp_path / "other.mcap").write_bytes(b"something else altogether")
    (tmp_path / "nothing.mcap").write_bytes(b"")
    (tmp_path / "nothing.db3").write_bytes(b"")
    shutil.copytree(bag, tmp_path / "split")
    (tmp_path / "split" / "metadata.yaml").unlink()
    shutil.copy(storage_file(bag), tmp_path / "split" / "second.mcap")
    for name, said in {
        "absent": "there is no such bag",
        "folder": "is not a bag",
        "picture.png": "is not a bag",
        "old.bag": "is a ROS 1 bag.*rosbags-convert",
        "old": "drive.bag is a ROS 1 bag",
        "other.mcap": "cannot be read",
        "nothing.mcap": "empty",
        "nothing.db3": "cannot be read",
        "split": "2 files but no metadata.yaml.*ros2 bag reindex",
    }.items():
        for read in (read_all, bag_topics, image_topics):
            with pytest.raises(BagError, match=f"(?s){name}.*{said}") as caught:
                read(tmp_path / name)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_bag_without_messages_is_reported_as_empty(tmp_path: Path, storage: Literal["mcap", "sqlite3"]) -> None:
    with BagWriter(tmp_path / "bag", storage):
        pass
    for read in (read_all, bag_topics):
        with pytest.raises(BagError, match="holds no messages"):
            read(tmp_path / "bag")


@pytest.mark.parametrize("metadata", [b"", b"a: [", b"rosbag2_bagfile_information: 3", b"just a line", b"\xff", b"\0",
                                      b"[" * 3000, b"version: !!bool maybe", b"time: !!timestamp soon"])  # fmt: skip
def test_broken_metadata_is_explained(bag: Path, metadata: bytes) -> None:
    (bag / "metadata.yaml").write_bytes(metadata)
    with pytest.raises(BagError, match=r"bag: cannot be read: metadata\.yaml .*the bag may be readable without it"):
        read_all(bag)


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.9])
def test_a_file_cut_short_is_explained(
    tmp_path: Path, images: list[NDArray[np.uint8]], storage: Literal["mcap", "sqlite3"], kept: float
) -> None:
    write_camera_bag(tmp_path / "bag", images, STAMPS, None, storage=storage)
    file = storage_file(tmp_path / "bag")
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(BagError, match=r"bag: cannot be read: \w+"):
        read_all(tmp_path / "bag")


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_give_a_bag_error_or_readable_messages(
    tmp_path: Path, images: list[NDArray[np.uint8]], camera: Camera, seed: int
) -> None:
    write_camera_bag(tmp_path / "bag", images[:2], STAMPS, camera, storage="mcap" if seed % 2 else "sqlite3")
    file = storage_file(tmp_path / "bag")
    content, random = bytearray(file.read_bytes()), np.random.default_rng(seed)
    for place in random.integers(0, len(content), 60):
        content[place] = random.integers(0, 256)
    file.write_bytes(content)
    try:
        read_all(tmp_path / "bag")
    except BagError as error:
        assert str(tmp_path / "bag") in str(error)


def test_a_missing_topic_is_reported_with_the_topics_of_the_bag(bag: Path) -> None:
    with pytest.raises(BagError, match=r"has no topic /left; it has /camera/camera_info, /camera/image_raw"):
        list(read_messages(bag, ["/left"]))


# writing


def test_an_existing_folder_is_replaced_only_on_request_and_only_if_it_is_a_bag(
    tmp_path: Path, bag: Path, images: list[NDArray[np.uint8]]
) -> None:
    with pytest.raises(BagError, match="exists already"):
        write_camera_bag(bag, images, STAMPS, None)
    assert len(read_all(bag)) == 8
    write_camera_bag(bag, images, STAMPS, None, overwrite=True)
    assert len(read_all(bag)) == 4
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(BagError, match="is not a bag, so it is not replaced"):
        write_camera_bag(tmp_path / "photos", images, STAMPS, None, overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"


@pytest.mark.parametrize("name", ["notes.txt", "other_0.mcap", "photos/cat.jpg"])
def test_a_bag_folder_with_foreign_files_is_not_replaced(
    tmp_path: Path, bag: Path, images: list[NDArray[np.uint8]], name: str
) -> None:
    (bag / name).parent.mkdir(exist_ok=True)
    (bag / name).write_text("mine")
    with pytest.raises(BagError, match=f"holds {name.split('/')[0]}, which does not belong to the bag"):
        write_camera_bag(bag, images, STAMPS, None, overwrite=True)
    assert (bag / name).read_text() == "mine" and len(read_all(bag)) == 8


def test_a_folder_with_foreign_metadata_and_a_link_to_a_bag_are_not_replaced(
    tmp_path: Path, bag: Path, images: list[NDArray[np.uint8]]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metadata.yaml").write_text("title: mine\n")
    (tmp_path / "link").symlink_to(bag)
    for name in ("other", "link"):
        with pytest.raises(BagError, match="is not a bag, so it is not replaced"):
            write_camera_bag(tmp_path / name, images, STAMPS, None, overwrite=True)
    assert (tmp_path / "other" / "metadata.yaml").read_text() == "title: mine\n" and len(read_all(bag)) == 8


def test_a_bag_whose_writing_fails_is_removed(tmp_path: Path, images: list[NDArray[np.uint8]]) -> None:
    with pytest.raises(KeyboardInterrupt), BagWriter(tmp_path / "bag") as bag:
        bag.write("/image", image_message(images[0], STAMPS[0], "eye"), STAMPS[0])
        raise KeyboardInterrupt
    assert not (tmp_path / "bag").exists()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BagError, match="cannot be written"):
        BagWriter(tmp_path / "file" / "bag")


# the demo bag


def test_the_demo_bag_has_images_calibration_and_ground_truth_and_is_reproducible(tmp_path: Path) -> None:
    poses = write_demo_bag(tmp_path / "bag", num_frames=3, size=(160, 120))
    assert bag_topics(tmp_path / "bag") == [
        Topic("/camera/camera_info", INFO, 3),
        Topic("/camera/image_raw", IMAGE, 3),
        Topic(GROUND_TRUTH, "geometry_msgs/msg/PoseStamped", 3),
    ]
    stamps, truth = read_ground_truth(tmp_path / "bag")
    records = list(read_messages(tmp_path / "bag", ["/camera/image_raw"]))
    assert [record.stamp for record in records] == stamps.tolist() and np.all(np.diff(stamps) == 100_000_000)
    for pose, returned, planned in zip(truth, poses, camera_path(3)):
        assert np.allclose(pose.rotation, returned.rotation, atol=1e-12)
        assert np.array_equal(pose.position, returned.position)
        assert np.array_equal(returned.rotation, planned.rotation)
    assert 0.2 < np.linalg.norm(relative_motion(truth[0], truth[1]).position) < 0.3
    assert all(to_array(record.message).shape == (120, 160, 3) for record in records)
    write_demo_bag(tmp_path / "again" / "bag", num_frames=3, size=(160, 120))
    assert storage_file(tmp_path / "bag").read_bytes() == storage_file(tmp_path / "again" / "bag").read_bytes()


def test_the_stereo_demo_bag_holds_two_rectified_cameras(tmp_path: Path) -> None:
    write_demo_bag(tmp_path / "bag", size=(160, 120), motions=[("still", 2)], baseline=0.12)
    records = {(record.topic, record.stamp): record.message for record in read_messages(tmp_path / "bag")}
    stamps = sorted({stamp for _, stamp in records})
    assert len(stamps) == 2 and len(records) == 10
    left, right = (records[f"/{side}/camera_info", stamps[0]] for side in ("left", "right"))
    assert left.p[3] == 0 and right.p[3] == pytest.approx(-0.12 * right.p[0])
    assert not Camera.from_camera_info(left, rectified=False).distortion.any()
    pictures = [to_array(records[f"/{side}/image_rect", stamps[0]]) for side in ("left", "right")]
    later = to_array(records["/left/image_rect", stamps[1]])
    assert np.abs(pictures[0].astype(int) - pictures[1]).mean() > 3 * np.abs(pictures[0].astype(int) - later).mean()


def test_a_ground_truth_topic_of_another_type_is_refused(bag: Path) -> None:
    with pytest.raises(BagError, match="/camera/camera_info has the type sensor_msgs/msg/CameraInfo instead"):
        read_ground_truth(bag, "/camera/camera_info")
