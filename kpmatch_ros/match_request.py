"""Answers requests of the service match_features, to match stored features. Does not depend on ROS."""

from __future__ import annotations

from typing import Any

import numpy as np

from kpmatch_ros import messages
from kpmatch_ros.encodable import encodable
from kpmatch_ros.features import Features
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.camera import CalibrationError, Camera
from kpmatch_ros.kept_features import FeatureError

__all__ = ["answer", "refuse"]


def answer(front_end: FrontEnd, request: Any, response: Any, new: messages.NewMessage = messages.ros_message) -> Any:
    """Fill the response of kpmatch_ros/srv/MatchFeatures with matches and pose, or with the reason for a refusal.

    Args:
        front_end: does the matching. Its frames and tracks do not change.
        request: the service request.
        response: the response to fill and return.
        new: creates messages, see :mod:`kpmatch_ros.messages`.
    """
    parameters = front_end.parameters
    both = [
        ("reference_features", request.reference_features, request.reference_camera_info),
        ("features", request.features, request.camera_info),
    ]
    try:
        reference, current = (_features(name, message, parameters.extractor) for name, message, _ in both)
        cameras = [_camera(f"camera_info of {name}", info, parameters.rectified) for name, _, info in both]
        headers = [message.header for _, message, _ in both]
        pair = front_end.match_features(
            reference,
            current,
            cameras=cameras,
            stamps=[messages.nanoseconds(header.stamp) for header in headers],
            frame_ids=[header.frame_id for header in headers],
        )
    except FeatureError as error:
        return refuse(request, response, str(error), new)
    response.success, response.message = True, ""
    response.matches = messages.match_array(
        pair, messages.Pairing.REQUESTED, parameters.extractor, parameters.matcher, new
    )
    response.relative_pose = messages.relative_pose(pair, new)
    return response


def refuse(request: Any, response: Any, reason: str, new: messages.NewMessage = messages.ros_message) -> Any:
    """Fill the response with the reason for a refusal, no matches, and a pose with the status FAILED."""
    headers = request.features.header, request.reference_features.header
    response.success, response.message = False, reason
    response.matches = new(
        "kpmatch_ros/msg/MatchArray",
        header=headers[0],
        reference=headers[1],
        pairing=int(messages.Pairing.REQUESTED),
    )
    response.relative_pose = messages.no_pose(*headers, new=new)
    return response


def _features(name: str, message: Any, extractor: str) -> Features:
    """Return the features in a kpmatch_ros/FeatureArray.

    Raises:
        FeatureError: if they are from another extractor, or an array has a wrong length.
    """
    if message.extractor != encodable(extractor):
        raise FeatureError(
            f"{name}: they are from the extractor {message.extractor!r:.80}, but this node uses {extractor!r}: only "
            "features of the same weights can be matched"
        )
    points, scores, descriptors = (
        np.array(values, np.float32) for values in (message.points, message.scores, message.descriptors)
    )
    count, size = len(scores), message.descriptor_size
    for what, array, expected in (("points", points, 2 * count), ("descriptors", descriptors, size * count)):
        if len(array) != expected:
            raise FeatureError(
                f"{name}: {what} holds {len(array)} numbers, but {count} scores and a descriptor_size of {size} "
                f"require {expected}"
            )
    return Features(
        keypoints=points.reshape(count, 2),
        scores=scores,
        descriptors=descriptors.reshape(count, size),
        size=(message.width, message.height),
    )


def _camera(name: str, info: Any, rectified: bool) -> Camera | None:
    """Return the camera of a sensor_msgs/CameraInfo; None if it is empty, that is, its focal length is 0.

    Raises:
        FeatureError: if the calibration cannot be used.
    """
    if info.k[0] == info.p[0] == 0.0:
        return None
    try:
        return Camera.from_camera_info(info, rectified=rectified)
    except CalibrationError as error:
        raise FeatureError(f"{name}: {error}") from None
