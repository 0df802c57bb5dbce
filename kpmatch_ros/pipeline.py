"""The pipeline: turns camera messages into messages with matches and poses. Does not depend on ROS.

The node feeds a :class:`Pipeline` from its subscriptions. A replay feeds it from a file and gets the same output.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kpmatch_ros import match_request, messages
from kpmatch_ros.events import Events
from kpmatch_ros.feature_matcher import LARGEST_IMAGE
from kpmatch_ros.frames import Frame, Result, StereoPair
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.camera import CalibrationError, Camera
from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.geometry.static_transforms import StaticTransforms
from kpmatch_ros.geometry.stereo_camera import StereoCamera
from kpmatch_ros.imaging.contrast import Stretch, appearance
from kpmatch_ros.imaging.images import LARGEST_FILE, ImageError, to_array
from kpmatch_ros.odometry import Odometry, check_odometry
from kpmatch_ros.parameters import Parameters
from kpmatch_ros.result_publisher import ResultPublisher
from kpmatch_ros.sync.calibration import Calibration
from kpmatch_ros.sync.mask_sync import MaskSynchroniser
from kpmatch_ros.sync.stereo_sync import StereoSynchroniser

__all__ = ["PATIENCE", "WAITING_MEMORY", "Pipeline"]

# Largest number of images of one camera that wait for the other camera's image, by the parameter `queue`. With `all`
# the buffer must hold what a bag with many images sends at once.
_WAITING = {"latest": 10, "all": 100}
_UNPAIRED_MEMORY = 5 * 10**8  # bytes: limit of these waiting images, 80 colour images of 1920 x 1080
_MASKS = {"latest": 30, "all": None}  # largest number of masks of one camera that wait for their image
_MASK_BYTES = 1000  # size of a mask message without its data
WAITING_MEMORY = 2 * 10**9
"""Bytes: limit of the images that wait to be processed, and of the masks that wait for their image, where none should
be lost (`queue: all`). This is 2,170 colour images of 640 x 480, or 320 of 1920 x 1080. A robot's computer has 4 GB or
more."""
_INFO_MEMORY = {"latest": 10**7, "all": WAITING_MEMORY // 10}  # one camera's infos: 100,000, images of 20 kB each
PATIENCE = 1.0
"""Seconds that an image waits at most for its mask and its camera_info where every frame is processed (`queue: all`,
bags). Usually a later mask or camera_info arrives before that and proves that the expected one is missing. So the
result does not depend on timing, and every replay gives the same output."""
# Seconds after which a pose reports an image without a partner. Where every frame is processed, a reliable publisher
# may still be resending the partner, and no pose should depend on how long that takes.
_UNPAIRED_AFTER = {"latest": 0.5, "all": 5.0}
_UNPAIRED_INTERVAL = 1.0  # least seconds between two such poses
_MASKED = 0.5  # share of an image under its mask, above which the mask may be why there are few keypoints


class Pipeline:
    """Turns the messages of a camera or of a stereo pair into the node's output messages.

    One thread may receive (:meth:`add_image`, :meth:`add_info`, :meth:`add_mask`, :meth:`watch`, :meth:`configure`,
    :meth:`request_reset`) while another thread processes.

    Args:
        front_end: registers the images.
        topics: the image topics, used in texts for the user: one, or left and right.
        publish: called with a topic and its message. The topic has no leading slash, except /tf.
        wanted: whether the messages of an on-demand topic have a subscriber: features, landmarks, match_image, /tf.
        events: receives reports of everything that goes wrong.
        new: creates messages, see :mod:`kpmatch_ros.messages`.
        odometry: chains the poses if `publish_odometry` is set. An object that was used before continues its count.

    Attributes:
        front_end: as given.
        calibration: the camera_infos, assigned to the images.
        synchroniser: pairs left and right images.
        masks: pairs images and their masks.

    Raises:
        ParameterError: if odometry is requested for one camera.
    """

    def __init__(
        self,
        front_end: FrontEnd,
        topics: Sequence[str],
        publish: Callable[[str, Any], None],
        wanted: Callable[[str], bool],
        events: Events,
        new: messages.NewMessage = messages.ros_message,
        odometry: Odometry | None = None,
    ) -> None:
        parameters = front_end.parameters
        check_odometry(parameters)
        self.front_end = front_end
        self.calibration = Calibration(topics, parameters.rectified, _INFO_MEMORY[parameters.queue])
        self._topics = topics
        self._events = events
        self._new = new
        chain = (odometry or Odometry()) if parameters.publish_odometry else None
        self._results = ResultPublisher(publish, wanted, events, new, chain)
        self._parameters = parameters  # for the next frame
        self._reset_requested = threading.Event()
        self.synchroniser: StereoSynchroniser[Any]
        self.masks: MaskSynchroniser[Any]
        self._stamps: list[int | None]  # stamp of the last image on each topic
        self._reported_unpaired: Any = None  # the last image without a partner that a pose has reported
        self._unpaired_found_at = -float("inf")  # seconds
        self.restart()

    def restart(self) -> None:
        """Discard everything received, except the calibration and the count of odometry breaks."""
        parameters = self._parameters
        self.front_end.reset()
        tolerance = round(parameters.sync_tolerance * 1e9)
        self.synchroniser = StereoSynchroniser(tolerance, _WAITING[parameters.queue], _UNPAIRED_MEMORY)
        cameras = len(self._topics)
        self.masks = MaskSynchroniser(cameras, tolerance, _MASKS[parameters.queue], WAITING_MEMORY // cameras)
        self._results.restart()
        self._reported_unpaired = None
        self._stamps = [None] * len(self._topics)
        self._stretches = [Stretch() for _ in self._topics]
        self._events.matched("")  # the time before does not count

    @property
    def transforms(self) -> StaticTransforms:
        """The static transforms. With odometry, the caller updates them with every message on /tf_static."""
        return self._results.transforms

    @property
    def odometry_breaks(self) -> int | None:
        """Number of breaks in the odometry chain; None without odometry."""
        return self._results.odometry_breaks

    # Receiving

    def configure(self, parameters: Parameters) -> None:
        """Use these parameters from the next frame on."""
        self._parameters = parameters

    def request_reset(self) -> None:
        """Discard features and tracks before the next frame is processed."""
        self._reset_requested.set()

    def add_image(self, side: int, message: Any, arrived: int | None = None) -> tuple[Any, ...] | None:
        """Add an image, and return the frame that it completes, for :meth:`process`.

        Args:
            side: 0 for a single or the left camera, 1 for the right camera.
            message: the image.
            arrived: time of reception or recording, nanoseconds of any clock; the current time if not given.

        Returns:
            The image alone for one camera. For a stereo pair, the left and the right image, or None while the partner
            is missing.
        """
        stamp = messages.nanoseconds(message.header.stamp)
        self._check_stamp(side, stamp)
        if len(self._topics) == 1:
            return (message,)
        before = list(self.synchroniser.unpaired)
        arrived = time.monotonic_ns() if arrived is None else arrived
        frame = self.synchroniser.put(side, stamp, message, arrived, len(message.data))
        self._report_unpaired([now - then for now, then in zip(self.synchroniser.unpaired, before)])
        return frame

    def add_info(self, side: int, message: Any) -> None:
        """Add a camera_info of camera 0 or 1. It may arrive before or after its image."""
        self.calibration.update(side, messages.nanoseconds(message.header.stamp), message)

    def add_mask(self, side: int, message: Any) -> None:
        """Add the mask of an image of camera 0 or 1. It may arrive before or after the image."""
        size = len(message.data) + _MASK_BYTES
        let_go = self.masks.put(side, messages.nanoseconds(message.header.stamp), message, size)
        if self._parameters.queue == "all":  # with `latest`, new masks displace old ones as a matter of course
            for _ in range(let_go):
                self._events.mask_fault("masks let go", self._topics[side], self._too_many_masks(side))

    def complete(self, received: Sequence[Any]) -> bool:
        """Whether each mask and camera_info of a frame's images has arrived, or can no longer arrive."""
        stamps = _stamps(received)
        return self.masks.complete(stamps) and self.calibration.complete(stamps)

    def wait(self, received: Sequence[Any], waited: float) -> None:
        """Wait until a frame is complete: at most `sync_tolerance`, or :data:`PATIENCE` with `queue: all`.

        Args:
            received: the image messages of the frame.
            waited: seconds since the frame arrived.
        """
        parameters = self._parameters
        patience = PATIENCE if parameters.queue == "all" else parameters.sync_tolerance
        stamps, begun = _stamps(received), time.monotonic()
        self.masks.wait(stamps, patience - waited)
        self.calibration.wait(stamps, patience - waited - (time.monotonic() - begun))

    def _check_stamp(self, side: int, stamp: int) -> None:
        """Report an image whose stamp is zero or equal to the previous image's stamp."""
        topic, before = self._topics[side], self._stamps[side]
        self._stamps[side] = stamp
        remedy = "tracks and poses are correct, but their times are not; have the driver stamp each image"
        if stamp == 0:
            if any(self._stamps):
                remedy = (
                    "they cannot be paired with the other camera's images, which have stamps; have the driver stamp "
                    "each image"
                )
            self._events.stamp_fault("zero stamps", topic, f"images on {topic} have the stamp zero: {remedy}")
        elif stamp == before:
            explanation = f"images on {topic} have the same stamp as the image before ({stamp * 1e-9:.6f} s): {remedy}"
            self._events.stamp_fault("repeated stamps", topic, explanation)

    def finish(self) -> None:
        """Report the images that still wait for a partner. To be called at the end of the input."""
        self._report_unpaired(self.synchroniser.waiting)

    def watch(self, now: float) -> Any:
        """Check for images of a stereo pair that find no partners. To be called about ten times a second.

        A subscriber should not wait for a pose that cannot come. So while one camera is silent, or the stamps of the
        two do not fit, this returns the newest image without a partner, for :meth:`interrupt`.

        Args:
            now: seconds of any clock.

        Returns:
            The image without a partner, at most once a second and until :meth:`interrupt` has reported it; None
            otherwise.
        """
        self.synchroniser.wait(now)
        if not self.synchroniser.is_unpaired(_UNPAIRED_AFTER[self._parameters.queue]):
            return None
        alone = self.synchroniser.newest
        due = abs(now - self._unpaired_found_at) >= _UNPAIRED_INTERVAL  # abs: a clock may jump back
        if not due or alone is None or alone is self._reported_unpaired:
            return None
        self._unpaired_found_at = now
        return alone

    # Processing

    def interrupt(self, alone: Any) -> None:
        """Publish that an image from :meth:`watch` has no partner and no pose. Call it after all earlier frames."""
        if alone is not self._reported_unpaired:  # watch may return an image again before it is reported
            self._reported_unpaired = alone
            self._results.publish_interruption(alone.header)

    def process(self, received: Sequence[Any], overtaken: int = 0) -> Result | None:
        """Process a frame and publish the results. Returns None if its images cannot be used.

        Args:
            received: the image messages of the frame, from :meth:`add_image`.
            overtaken: number of frames dropped since the last one.
        """
        self._follow_parameters()
        if self._reset_requested.is_set():
            self._reset_requested.clear()
            self.front_end.reset()
        stamps = _stamps(received)
        masks, faults = zip(*(self._mask(side, stamp) for side, stamp in enumerate(stamps)))
        try:
            images = [self._pixels(side, message) for side, message in enumerate(received)]
            frame_ids = [message.header.frame_id for message in received]
            interruption = self.front_end.interruption(stamps[0], frame_ids, overtaken)
            camera = self._camera_for([(image.shape[1], image.shape[0]) for image in images], stamps, frame_ids)
            result = self.front_end.register(images, stamps, camera, frame_ids, masks)
        except ImageError as error:
            self._events.rejected(error.reason, f"an image was rejected: {error}")
            return None
        if interruption:
            self._events.interrupted(f"features and tracks were discarded: {interruption}")
        if result.stereo is not None:
            self._check_stereo(result.stereo)
        self._check_masks(result, faults)
        self._check_matches(result)
        self._results.publish(result, self.front_end.parameters)
        if interruption:
            self._results.publish_interruption(messages.header_of(result.frame, self._new))
        return result

    def match_features(self, request: Any, response: Any) -> Any:
        """Answer a request of the service match_features. This does not affect the frames."""
        self._follow_parameters()
        return match_request.answer(self.front_end, request, response, self._new)

    def _follow_parameters(self) -> None:
        parameters = self._parameters  # read once: another thread may replace them at any time
        if parameters is not self.front_end.parameters:
            self.front_end.configure(parameters)

    def _camera_for(
        self, sizes: Sequence[tuple[int, int]], stamps: Sequence[int], frame_ids: Sequence[str]
    ) -> Camera | StereoCamera | None:
        try:
            camera = self.calibration.camera_for(sizes, stamps, frame_ids)
            for doubt in self.calibration.doubts:
                self._events.doubted(f"camera_info: {doubt.kind}", doubt.explanation)
            return camera
        except CalibrationError as error:
            self._events.calibration_refused(error.reason, f"camera_info cannot be used: {error}")
            return None

    def _pixels(self, side: int, message: Any) -> np.ndarray:
        stretch = self._stretches[side]
        stretch.enabled, stretch.used = self.front_end.parameters.stretch == "auto", None
        # Without resize the networks get the full image. An image too large for them need not be decoded.
        largest = LARGEST_FILE if self.front_end.parameters.resize else LARGEST_IMAGE
        try:
            return to_array(message, largest, scale=stretch.to_8_bits)
        except ImageError as error:
            raise ImageError(error.reason, f"{self._topics[side]}: {error}") from None

    def _mask(self, side: int, stamp: int) -> tuple[np.ndarray | None, tuple[str, str] | None]:
        """Return the mask of an image (0 where no keypoint may be detected), and a fault if there is no usable mask."""
        message, topic = self.masks.take(side, stamp), self._topics[side]
        if message is None:
            return None, ("no mask", self._missing_mask(side)) if side in self.masks.expected else None
        try:
            if message.encoding not in ("mono8", "8UC1"):
                raise ImageError("encoding", f"its encoding is {message.encoding!r:.80}; publish it as mono8")
            return to_array(message), None
        except ImageError as error:
            explanation = f"an image on {topic} was processed without its mask, which cannot be used: {error}"
            return None, ("unusable mask", explanation)

    def _missing_mask(self, side: int) -> str:
        """Explain why an image has no mask."""
        offset, why = self.masks.offset[side], ""
        if self.masks.came_late[side]:
            why = "; masks arrive too late: set sync_tolerance to their delay"
        elif offset is not None:
            why = f"; the stamp of the nearest one differs by {offset * 1e-9:.6f} s"
        tolerance = self._parameters.sync_tolerance
        return (
            f"an image on {self._topics[side]} was processed without a mask: none came within sync_tolerance "
            f"({tolerance:g} s) of its stamp{why}"
        )

    def _too_many_masks(self, side: int) -> str:
        room = WAITING_MEMORY / len(self._topics) / 1e9
        return (
            f"more than {room:g} GB of masks for {self._topics[side]} are waiting, and the oldest are deleted: no "
            "image has their stamps, or images are processed more slowly than they arrive. Stamp each mask as its "
            "image, or play the bag slower"
        )

    def _check_masks(self, result: Result, faults: Sequence[tuple[str, str] | None]) -> None:
        for topic, fault in zip(self._topics, faults):
            if fault is not None:
                self._events.mask_fault(fault[0], topic, fault[1])
        for topic, frame in zip(self._topics, result.frames):
            if frame.mask is not None and not frame.mask.any():
                explanation = f"the mask hides all of an image on {topic}, so nothing is detected in it"
                self._events.mask_fault("mask hides everything", topic, explanation)

    def _check_matches(self, result: Result) -> None:
        """Report blurred frames, and frames with too few keypoints or matches for a pose, with the likely reason."""
        if result.pair is not None and result.pair.smeared is not None:
            self._events.doubted(
                "blur",
                "an image is blurred over tens of pixels more than the one it is matched with, so the positions of "
                "its points are unknown, and it has no pose: shorten the exposure, or light the scene",
            )
        least, keypoints, pair = self.front_end.parameters.min_inliers, len(result.frame.keypoints), result.pair
        matches = 0 if pair is None else len(pair.indices)
        # With few keypoints, tracks may still give a pose.
        if pair is not None and (pair.pose.is_placed or (keypoints >= least and matches >= least)):
            self._events.matched("")
        elif keypoints < least or (pair is not None and matches < least):
            reason = self._why_few(result.frame)
            self._events.matched(f"{keypoints} keypoints and {matches} matches per frame; {reason}")

    def _why_few(self, frame: Frame) -> str:
        """Return the likeliest reason why a frame has too few keypoints or matches for a pose."""
        parameters, stretch = self.front_end.parameters, self._stretches[0]
        if looks := appearance(frame.image, stretch.used):
            return looks + (": set stretch to auto" if stretch.used is not None and not stretch.enabled else "")
        if parameters.max_keypoints < parameters.min_inliers:
            return (
                f"max_keypoints ({parameters.max_keypoints}) is below min_inliers ({parameters.min_inliers}): with so "
                "few points there is no pose"
            )
        if len(frame.keypoints) >= parameters.min_inliers:
            return "the images have contrast, but two of them have too little in common"
        if frame.mask is not None and (hidden := float((frame.mask == 0).mean())) > _MASKED:
            return f"the mask hides {100 * hidden:.0f} % of the image"
        if parameters.keypoint_threshold > 0:
            return f"keypoint_threshold is {parameters.keypoint_threshold:g}: -1 uses the value made for the weights"
        return "the images have contrast, but few points that stand out: they may be blurred"

    def _check_stereo(self, stereo: StereoPair) -> None:
        status, agree = stereo.agreement.status, stereo.agreement.agree
        if status is PoseStatus.FAILED and agree is not None:
            self._events.calibration_refused(
                "stereo matches",
                f"only {agree.sum()} of {len(agree)} stereo matches agree with the camera_infos: left and right "
                "images are swapped, or the calibration belongs to another pair, or is no longer correct"
                + (
                    "; or images of different times were paired, because their stamps are zero or repeated"
                    if self.synchroniser.by_arrival
                    else ""
                ),
            )

    def _report_unpaired(self, counts: Sequence[int]) -> None:
        offset = self.synchroniser.offset
        near = "" if offset is None else f"; the closest stamps last differed by {offset * 1e-9:.6f} s"
        if self.synchroniser.by_arrival:
            near = "; their stamps are zero or repeated, so they are paired by arrival"
        for topic, count in zip(self._topics, counts):
            if count:
                explanation = f"images on {topic} have no partner within sync_tolerance of their stamps{near}"
                self._events.unpaired(topic, count, explanation)


def _stamps(received: Sequence[Any]) -> list[int]:
    return [messages.nanoseconds(message.header.stamp) for message in received]
