"""Publishes the results of frames as messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kpmatch_ros import messages
from kpmatch_ros.drawing import caption, draw_pair
from kpmatch_ros.events import Events
from kpmatch_ros.frames import ImagePair, Pair, Result
from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.geometry.static_transforms import StaticTransforms
from kpmatch_ros.landmarks import landmarks_of
from kpmatch_ros.odometry import Odometry, frame_fault, of_base
from kpmatch_ros.parameters import Parameters

__all__ = ["ResultPublisher"]


class ResultPublisher:
    """Publishes the results of frames: features, matches, poses, odometry, landmarks, pictures.

    Args:
        publish: called with a topic and its message. The topic has no leading slash, except /tf.
        wanted: whether the messages of an on-demand topic have a subscriber: features, landmarks, match_image, /tf.
        events: receives reports of poses and of problems with the odometry.
        new: creates messages, see :mod:`kpmatch_ros.messages`.
        odometry: chains the poses; None for no odometry.

    Attributes:
        transforms: the static transforms. With odometry, the caller updates them with every message on /tf_static.
    """

    def __init__(
        self,
        publish: Callable[[str, Any], None],
        wanted: Callable[[str], bool],
        events: Events,
        new: messages.NewMessage,
        odometry: Odometry | None,
    ) -> None:
        self.transforms = StaticTransforms()
        self._publish = publish
        self._wanted = wanted
        self._events = events
        self._new = new
        self._odometry = odometry

    @property
    def odometry_breaks(self) -> int | None:
        """Number of breaks in the odometry chain; None without odometry."""
        return None if self._odometry is None else self._odometry.breaks

    def restart(self) -> None:
        """Start a new odometry chain. The count of breaks continues."""
        if self._odometry is not None:
            self._odometry.forget()

    def publish(self, result: Result, parameters: Parameters) -> None:
        """Publish all results of a frame. ``parameters`` are those it was processed with."""
        if self._wanted("features"):
            for frame in result.frames:
                self._publish("features", messages.feature_array(frame, parameters.extractor, self._new))
        if result.stereo is not None:
            self._publish("stereo_matches", self._match_array(result.stereo, messages.Pairing.STEREO, parameters))
            if self._wanted("landmarks"):
                header = messages.header_of(result.frame, self._new)
                self._publish("landmarks", messages.point_cloud(landmarks_of(result), header, self._new))
        pair = result.pair
        if pair is None:
            return
        self._publish("matches", self._match_array(pair, messages.Pairing.CONSECUTIVE, parameters))
        self._publish("relative_pose", messages.relative_pose(pair, self._new))
        self._events.pose(pair.pose.status)
        if self._odometry is not None:
            self._publish_odometry(self._odometry, pair, parameters)
        if self._wanted("match_image"):
            picture = draw_pair(pair, caption(pair))
            header = messages.header_of(pair.current, self._new)
            self._publish("match_image", messages.image_message(picture, header, self._new))

    def publish_interruption(self, header: Any) -> None:
        """Publish a pose with the status INTERRUPTED, so that no subscriber waits for the pose of this image."""
        self._publish("relative_pose", messages.interruption(header, self._new))
        self._events.pose(PoseStatus.INTERRUPTED)

    def _match_array(self, pair: ImagePair, pairing: messages.Pairing, parameters: Parameters) -> Any:
        return messages.match_array(pair, pairing, parameters.extractor, parameters.matcher, self._new)

    def _publish_odometry(self, odometry: Odometry, pair: Pair, parameters: Parameters) -> None:
        child = pair.current.frame_id
        camera = None
        if parameters.base_frame:
            camera = self.transforms.pose(child, parameters.base_frame)
            if camera is None:  # no chain starts before it can be published
                self._events.doubted(
                    "base_frame",
                    f"no odometry: /tf_static does not connect base_frame {parameters.base_frame} and the camera's "
                    f"frame {child!r:.80}. Publish where the camera is on the robot (robot_state_publisher), or set "
                    "another base_frame",
                )
                return
        pose = odometry.add(pair)
        if pose is None:
            return
        if camera is not None:
            pose, child = of_base(pose, camera), parameters.base_frame
        message = messages.odometry(pair.current, pose, parameters.odom_frame, child, self._new)
        fault = frame_fault(child, message.header.frame_id, self.transforms if parameters.publish_tf else None)
        if fault:
            self._events.doubted("odometry frames", fault)
        self._events.odometry(
            odometry.breaks, f"the chain of poses broke: odometry starts again in the frame {message.header.frame_id}"
        )
        self._publish("odometry", message)
        if parameters.publish_tf and self._wanted("/tf") and not fault:
            transform = messages.transform_of(message, self._new)
            self._publish("/tf", self._new("tf2_msgs/msg/TFMessage", transforms=[transform]))
