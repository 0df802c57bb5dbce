"""Checks stored features that come without their image, and makes a frame of them. Does not depend on ROS."""

from __future__ import annotations

import numpy as np

from kpmatch_ros.features import Features, to_numpy
from kpmatch_ros.frames import Frame
from kpmatch_ros.geometry.camera import CalibrationError, Camera
from kpmatch_ros.imaging.images import MAX_SIDE

__all__ = ["FeatureError", "check_features", "frame_without_image"]

_UNIT = 0.05  # tolerance of a descriptor's length, which should be 1


class FeatureError(ValueError):
    """Features that cannot be matched. The text names them and says what is wrong and what to do."""


def check_features(features: Features, name: str, descriptor_size: int, most: int) -> Features:
    """Check stored features, and return them with NumPy arrays.

    Args:
        features: features of one image, on any device.
        name: name of the features, for error texts.
        descriptor_size: length of the extractor's descriptors.
        most: largest allowed number of keypoints.

    Raises:
        FeatureError: if there are no features or too many, they are not from this extractor, or a value is impossible,
            such as NaN or a point outside of the image.
    """
    found = features.numpy()
    count, (width, height) = len(found.keypoints), found.size
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise FeatureError(f"{name}: the image has {width} x {height} pixels; give width and height of the image")
    for what, array, shape in (
        ("keypoints", found.keypoints, (count, 2)),
        ("scores", found.scores, (count,)),
        ("descriptors", found.descriptors, (count, descriptor_size)),
    ):
        if array.shape != shape:
            raise FeatureError(
                f"{name}: {what} are of shape {array.shape} instead of {shape}: they are damaged, or from another "
                "extractor"
            )
        if not np.isfinite(array).all():
            raise FeatureError(f"{name}: {what} hold NaN or infinity")
    if count == 0:
        raise FeatureError(f"{name}: there are no features; choose an image that has some")
    if count > most:
        raise FeatureError(
            f"{name}: there are {count} features, more than max_keypoints ({most}): matching them would delay the "
            "frames; keep fewer, or raise max_keypoints"
        )
    keypoints = np.asarray(found.keypoints)
    outside = (keypoints < -0.5) | (keypoints > np.array([width, height]) - 0.5)
    if outside.any():
        x, y = keypoints[outside.any(axis=1)][0]
        raise FeatureError(f"{name}: the point ({x:g}, {y:g}) is outside of the image of {width} x {height} pixels")
    lengths = np.linalg.norm(np.asarray(found.descriptors, np.float64), axis=1)
    if (abs(lengths - 1) > _UNIT).any():
        length = lengths[abs(lengths - 1).argmax()]
        raise FeatureError(f"{name}: a descriptor has the length {length:g} instead of 1: it is from another extractor")
    return found


def frame_without_image(features: Features, name: str, camera: Camera | None, stamp: int, frame_id: str) -> Frame:
    """Make a frame of stored features, without an image.

    Raises:
        FeatureError: if the calibration is for images of another size.
    """
    if camera is not None:
        try:
            camera.check_size(*features.size)
        except CalibrationError as error:
            raise FeatureError(f"{name}: {error}") from None
    return Frame(
        number=0,
        stamp=stamp,
        image=np.zeros((0, 0), np.uint8),
        frame_id=frame_id,
        camera=camera,
        features=features,
        keypoints=to_numpy(features.keypoints),
        track_ids=np.zeros(len(features), np.uint64),
        extract_ms=0.0,
    )
