"""Chooses the topics of a camera, or of a stereo pair, in a bag."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from posixpath import dirname, join

from kpmatch_ros.bags.message_types import CAMERA_INFO_TYPE, IMAGE_TYPES
from kpmatch_ros.bags.reading import Bag, Topic
from kpmatch_ros.bags.recording import BagError

__all__ = ["CameraTopics", "UnsuitableError", "choose_camera", "choose_cameras", "choose_stereo_cameras"]

_SIDES = (("left", "right"), ("cam0", "cam1"), ("infra1", "infra2"))  # drivers' names for the two cameras of a pair


class UnsuitableError(BagError):
    """The bag can be read, but it lacks the topics that are asked for, or offers more than one choice of them."""


@dataclass(frozen=True)
class CameraTopics:
    """The topics of one camera in a bag.

    Attributes:
        image: sensor_msgs/Image or CompressedImage.
        camera_info: topic with its calibration; empty if there is none.
        num_images: number of images on the topic.
        mask: topic with masks, sensor_msgs/Image; no keypoints are detected where a mask is 0. Empty if there is none.
    """

    image: str
    camera_info: str
    num_images: int
    mask: str = ""


def choose_cameras(bag: Bag, mode: str, topics: Mapping[str, str | None]) -> tuple[CameraTopics, ...]:
    """The camera of a bag; in mode stereo, the left and the right camera.

    Args:
        bag: to read.
        mode: mono or stereo.
        topics: the topics that the user named, as keyword arguments of :func:`choose_camera` or
            :func:`choose_stereo_cameras`.

    Raises:
        UnsuitableError: a topic is not in the bag, or there is no topic or more than one to choose from.
        BagError: the same, but the topics may be in a part of the bag that is damaged.
    """
    try:
        return choose_stereo_cameras(bag, **topics) if mode == "stereo" else (choose_camera(bag, **topics),)
    except UnsuitableError as error:
        if bag.damage:
            raise BagError("; ".join([str(error), *bag.damage])) from error
        raise


def choose_camera(
    bag: Bag, image: str | None = None, camera_info: str | None = None, mask_topic: str | None = None
) -> CameraTopics:
    """The camera of a bag. Topics that are not given are chosen if there is only one candidate.

    The calibration is the topic camera_info beside the images, as in image_pipeline. Without it, the only calibration
    in the bag is used, unless it is beside the images of another camera. The masks are the topic mask beside the
    images.

    Raises:
        UnsuitableError: a topic is not in the bag, or there are several to choose from.
    """
    topics, infos, masks = _candidates(bag)
    images = topics if image is not None else _without_masks(topics)
    if image is None and len(images) > 1 and _pairs(images):
        raise UnsuitableError(
            f"{bag.path}: has {len(images)} image topics, choose one with --image, or a stereo pair with --left "
            f"and --right: {_names(images)}"
        )
    chosen = _named_or_only(bag, images, image, "image", "--image")
    info = _beside(bag, chosen, infos, "camera_info", camera_info, "--camera-info")
    others = [_beside(bag, topic, infos, "camera_info", None, "") for topic in topics]
    if not info and len(infos) == 1 and infos[0].name not in others:  # it is not another camera's
        info = infos[0].name
    mask = _beside(bag, chosen, masks, "mask", mask_topic, "--mask-topic")
    camera = CameraTopics(chosen.name, info, chosen.num_messages, mask)
    _check_masks(bag, camera)
    return camera


def choose_stereo_cameras(
    bag: Bag,
    left: str | None = None,
    right: str | None = None,
    left_info: str | None = None,
    right_info: str | None = None,
    left_mask: str | None = None,
    right_mask: str | None = None,
) -> tuple[CameraTopics, CameraTopics]:
    """The left and the right camera of a bag. Topics that are not given are guessed if only one pair fits.

    Two image topics are a pair if their names differ only in left and right, cam0 and cam1, or infra1 and infra2. The
    calibration of each camera is the topic camera_info beside its images, and its masks are the topic mask beside them.

    Raises:
        UnsuitableError: a topic is not in the bag, or there is no pair or more than one to choose from.
    """
    topics, infos, masks = _candidates(bag)
    images = _without_masks(topics)
    given = [
        None if name is None else _named_or_only(bag, topics, name, "image", option)
        for name, option in ((left, "--left"), (right, "--right"))
    ]
    if given[0] is not None and given[1] is not None:
        pairs = [(given[0], given[1])]
    else:
        pairs = [pair for pair in _pairs(images) if all(topic in (None, own) for topic, own in zip(given, pair))]
    if len(pairs) != 1:
        why = f"{len(pairs)} pairs of topics may be" if pairs else "no two topics are named like"
        raise UnsuitableError(
            f"{bag.path}: {why} a left and a right camera; name them with --left and --right: {_names(images)}"
        )
    (pair,) = pairs
    if pair[0] == pair[1]:
        raise UnsuitableError(f"{bag.path}: --left and --right are both {pair[0].name}; stereo needs two cameras")
    first, second = (
        CameraTopics(
            image.name,
            _beside(bag, image, infos, "camera_info", info, f"--{side}-info"),
            image.num_messages,
            _beside(bag, image, masks, "mask", mask, f"--{side}-mask"),
        )
        for side, image, info, mask in zip(("left", "right"), pair, (left_info, right_info), (left_mask, right_mask))
    )
    _check_masks(bag, first, second)
    return first, second


def _check_masks(bag: Bag, *cameras: CameraTopics) -> None:
    for camera in cameras:
        if camera.mask in [each.image for each in cameras]:
            raise UnsuitableError(f"{bag.path}: {camera.mask} cannot be a topic of masks: its images are matched")


def _candidates(bag: Bag) -> tuple[list[Topic], list[Topic], list[Topic]]:
    """The topics with images (at least one), those with calibrations, and those that may hold masks."""
    images: dict[str, Topic] = {}  # one topic may hold both raw and compressed images
    for topic in bag.topics:
        if topic.type in IMAGE_TYPES:
            before = images[topic.name].num_messages if topic.name in images else 0
            images[topic.name] = topic._replace(num_messages=before + topic.num_messages)
    if not images:
        raise UnsuitableError(f"{bag.path}: has no image topic with messages in it")
    infos = [topic for topic in bag.topics if topic.type == CAMERA_INFO_TYPE]
    return list(images.values()), infos, [topic for topic in images.values() if topic.type == IMAGE_TYPES[0]]


def _pairs(images: list[Topic]) -> list[tuple[Topic, Topic]]:
    """Pairs of topics whose names differ only in the words for the side."""
    return [
        (one, other)
        for one in images
        for other in images
        if one != other and any(_are_sides(one.name, other.name, left, right) for left, right in _SIDES)
    ]


def _are_sides(one: str, other: str, left: str, right: str) -> bool:
    """Whether `one` becomes `other` if some or all occurrences of `left` in it are replaced by `right`."""
    if left not in one:  # true of most names: it saves compiling a pattern for each pair
        return False
    return re.fullmatch(f"(?:{left}|{right})".join(map(re.escape, one.split(left))), other) is not None


def _beside(bag: Bag, image: Topic, topics: list[Topic], kind: str, name: str | None, option: str) -> str:
    """The topic with the camera_info or mask of an image topic: the named one, else the one beside it, else ""."""
    if name is not None:
        return _named_or_only(bag, topics, name, kind, option).name
    beside = join(dirname(image.name.removesuffix("/compressed")), kind)
    return beside if beside != image.name and any(topic.name == beside for topic in topics) else ""


def _without_masks(images: list[Topic]) -> list[Topic]:
    """The image topics without those that are named mask and are beside another image topic."""
    folders = [dirname(topic.name.removesuffix("/compressed")) for topic in images]
    return [
        topic
        for topic, folder in zip(images, folders)
        if topic.name != join(folder, "mask") or folders.count(folder) == 1
    ]


def _names(topics: list[Topic]) -> str:
    return ", ".join(topic.name for topic in topics)


def _named_or_only(bag: Bag, candidates: list[Topic], name: str | None, what: str, option: str) -> Topic:
    if not candidates:
        raise UnsuitableError(f"{bag.path}: has no {what} topic with messages in it")
    if name is None:
        if len(candidates) > 1:
            raise UnsuitableError(
                f"{bag.path}: has {len(candidates)} {what} topics, choose one with {option}: {_names(candidates)}"
            )
        return candidates[0]
    for topic in candidates:
        if topic.name.lstrip("/") == name.lstrip("/"):
            return topic
    raise UnsuitableError(
        f"{bag.path}: {option} {name}: there is no such {what} topic with messages in it; there is {_names(candidates)}"
    )
