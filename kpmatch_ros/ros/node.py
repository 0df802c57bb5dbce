"""The matcher node: a thin lifecycle wrapper that carries images to the front end and its results to topics."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeoutError  # another one than TimeoutError in Python 3.10
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import rclpy
import torch
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from nav_msgs.msg import Odometry as OdometryMessage
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.executors import ExternalShutdownException
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import HistoryPolicy, QoSPolicyKind, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header
from std_srvs.srv import Trigger

from kpmatch_ros import messages
from kpmatch_ros.device import is_out_of_memory, release_memory, trim_heap
from kpmatch_ros.drawing import draw_matches
from kpmatch_ros.feature_matcher import FeatureMatcher
from kpmatch_ros.front_end import Frame, FrontEnd, Pair
from kpmatch_ros.geometry.camera import CalibrationError, Camera
from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.geometry.stereo_motion import StereoCamera
from kpmatch_ros.images import ImageError, to_array
from kpmatch_ros.msg import FeatureArray, MatchArray, RelativePose
from kpmatch_ros.odometry import Odometry
from kpmatch_ros.parameters import ParameterError, Parameters, declarations
from kpmatch_ros.ros.diagnostics import Monitor, Problem
from kpmatch_ros.ros.inbox import Inbox
from kpmatch_ros.stereo_sync import Pairing
from kpmatch_ros.weights import REGISTRY, WeightsError

try:
    from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
except ImportError:  # ROS 2 Humble
    from rclpy.qos_event import PublisherEventCallbacks, SubscriptionEventCallbacks

try:
    from tf2_msgs.msg import TFMessage
except ImportError:  # it is no part of a minimal ROS
    TFMessage = None

__all__ = ["MatcherNode", "main"]

_SILENT_AFTER = 2.0  # seconds without an image that are worth a warning
_WATCH_PERIOD = 0.1  # seconds after which at the latest something new that is wrong is noticed
# Seconds that the very first frame waits for a camera_info that somebody publishes. A replay (queue: all) has the time.
_CALIBRATION_WAIT = {"latest": 1.0, "all": 10.0}
_LAST_FRAME_WAIT = 1.0  # seconds that the frame at hand has to finish when the process is told to end
# Seconds after which memory is given back to the system. The networks' buffers leave the heap with holes: a node held
# 510 MB in place of 340. It takes 10 ms, after a frame is published.
_TRIM_INTERVAL = 1.0
_THREAD_NAME = "inference"

# rclpy's default lacks durability, which two sides can disagree on too.
_OVERRIDABLE = (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY, QoSPolicyKind.DURABILITY)

ImageMessage: TypeAlias = "Image | CompressedImage"
Transition = Callable[[Any, LifecycleState], TransitionCallbackReturn]
Result = TypeVar("Result")


def _explained(callback: Transition) -> Transition:
    """Make a transition that raises fail and say why: rclpy would swallow the exception."""

    @functools.wraps(callback)
    def wrapped(self: MatcherNode, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            return callback(self, state)
        except ExternalShutdownException:
            return TransitionCallbackReturn.FAILURE  # told to end meanwhile
        except (ParameterError, WeightsError) as error:
            self._fault = str(error)
            self.get_logger().error(f"{callback.__name__} failed: {error}")
            return TransitionCallbackReturn.FAILURE
        except Exception as error:  # noqa: BLE001  (whatever it is, the node lives on and names it)
            self._fault = f"{type(error).__name__}: {error}"
            self.get_logger().error(f"{callback.__name__} failed:\n{traceback.format_exc()}")
            return TransitionCallbackReturn.FAILURE

    return wrapped


@dataclass
class _Input:
    """One camera's topics, and what last came on them."""

    image_name: str  # before remapping
    info_name: str
    image: Any = None  # the subscriptions
    info: Any = None
    calibration: CameraInfo | None = None
    arrived: float | None = None  # the last image, monotonic seconds

    @property
    def topic(self) -> str:
        return self.image.topic_name if self.image is not None else self.image_name


def _inputs(mode: str) -> list[_Input]:
    cameras = ("left/", "right/") if mode == "stereo" else ("",)
    return [_Input(f"{camera}image", f"{camera}camera_info") for camera in cameras]


class MatcherNode(LifecycleNode):
    """Images and calibration in; matches, relative poses and diagnostics out.

    Callbacks only store what arrives. One thread of its own loads the networks, runs them, and publishes.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__("matcher", **options)
        for item in declarations():
            self.declare_parameter(item.name, item.default, messages.parameter_descriptor(item))
        values = {item.name: self.get_parameter(item.name).value for item in declarations()}
        self._matching_parameters = Parameters(**values)
        self._changed_parameters: Parameters | None = None
        self.add_on_set_parameters_callback(self._check_parameters)

        self._monitor = Monitor()
        self._fault = ""
        self._state = "unconfigured"
        self._front_end: FrontEnd | None = None
        self._inference: ThreadPoolExecutor | None = None
        self._inbox: Inbox[tuple[tuple[ImageMessage, ...], float]] | None = None
        self._pairing: Pairing[ImageMessage] | None = None
        self._inputs = _inputs(self._matching_parameters.mode)
        self._odometry: Odometry | None = None
        self._outputs: dict[str, Any] = {}
        self._reset_service: Any = None
        self._reset_requested = threading.Event()
        self._calibrated = threading.Event()
        self._camera: Camera | StereoCamera | None = None
        self._camera_source: tuple[CameraInfo, ...] = ()
        self._incompatible_qos: dict[str, str] = {}
        self._refused_subscribers: dict[str, str] = {}
        self._best_effort_wanted = False
        self._activated_at = 0.0
        self._told: set[str] = set()  # the kinds of problems in the last diagnostics
        self._told_early = False
        self._told_alone: ImageMessage | None = None  # the last image whose partner did not come

        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # Wall time: diagnostics go on while a bag's clock stands still.
        self._diagnostics_timer = self.create_timer(
            1.0, self._every_second, clock=Clock(clock_type=ClockType.STEADY_TIME)
        )
        self._watch_timer = self.create_timer(_WATCH_PERIOD, self._watch, clock=Clock(clock_type=ClockType.STEADY_TIME))

    @property
    def parameters(self) -> Parameters:
        """The parameters in force."""
        return self._matching_parameters

    # Lifecycle

    @_explained
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the weights, run the networks once, offer the topics and the service."""
        parameters = self._matching_parameters
        stereo = parameters.mode == "stereo"
        if parameters.publish_odometry and not stereo:
            raise ParameterError("publish_odometry needs mode stereo: the poses of one camera are without metres")
        self._inputs = _inputs(parameters.mode)
        self._calibrated.clear()
        self._camera, self._camera_source = None, ()
        self._inference = ThreadPoolExecutor(max_workers=1, thread_name_prefix=_THREAD_NAME)
        try:
            self._front_end = self._wait_for(self._inference.submit(_load, parameters))
        except BaseException:
            self._inference.shutdown(wait=False)
            self._inference = None
            raise
        for name, kind, depth in (
            ("matches", MatchArray, 10),
            *([("stereo_matches", MatchArray, 10)] if stereo else []),
            *([("odometry", OdometryMessage, 10)] if parameters.publish_odometry else []),
            *([("/tf", TFMessage, 100)] if parameters.publish_odometry and TFMessage is not None else []),
            ("relative_pose", RelativePose, 10),
            ("features", FeatureArray, 2),
            ("match_image", Image, 2),
        ):
            # A replay may run faster than a subscriber for a while: nothing is to be lost then.
            depth = 1000 if parameters.queue == "all" and depth == 10 else depth
            self._outputs[name] = self.create_lifecycle_publisher(
                kind,
                name,
                QoSProfile(depth=depth),
                qos_overriding_options=_overridable(),
                event_callbacks=PublisherEventCallbacks(
                    incompatible_qos=functools.partial(self._report_subscriber, self.resolve_topic_name(name)),
                    use_default_callbacks=False,
                ),
            )
        self._reset_service = self.create_service(Trigger, "reset", self._reset)
        self._fault = ""
        self._state = "inactive"
        self._log_weights(self._front_end.matcher)
        return super().on_configure(state)

    @_explained
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe, and start the thread that processes frames."""
        assert self._front_end is not None and self._inference is not None
        super().on_activate(state)  # the publishers first: the first frame's results need them
        self._front_end.reset()
        self._odometry = Odometry() if self._matching_parameters.publish_odometry else None
        latest = self._matching_parameters.queue == "latest"
        self._inbox = Inbox(latest=latest)
        self._pairing = Pairing(round(self._matching_parameters.sync_tolerance * 1e9), 10 if latest else 100)
        self._incompatible_qos.clear()
        self._activated_at = time.monotonic()
        self._inference.submit(self._process_frames, self._inbox, self._front_end)
        self._best_effort_wanted = False
        self._subscribe(reliable=self._matching_parameters.queue == "all")
        self._state = "active"
        topics = " and ".join(camera.topic for camera in self._inputs)
        self.get_logger().info(f"active: waiting for images on {topics}")
        return TransitionCallbackReturn.SUCCESS

    @_explained
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unsubscribe, let the frame at hand finish, and give the memory back that only frames need."""
        assert self._front_end is not None
        self._stop_processing()
        self._front_end.reset()
        release_memory()
        self._state = "inactive"
        return super().on_deactivate(state)

    @_explained
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let go of the networks and the topics."""
        self._release()
        return super().on_cleanup(state)

    @_explained
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """The end, from any state."""
        self._release()
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Back to unconfigured, from where the node can be configured again."""
        self._release()
        return TransitionCallbackReturn.SUCCESS

    def end(self) -> None:
        """Let go of everything, without waiting for long: the process is about to end."""
        self._release(_LAST_FRAME_WAIT)
        self.destroy_node()

    def _release(self, patience: float | None = None) -> None:
        """Let go of the networks and the topics; ``patience`` in seconds limits the wait for the frame at hand."""
        self._stop_processing(patience)
        if self._inference is not None:
            self._inference.shutdown(wait=patience is None)
            self._inference = None
        for publisher in self._outputs.values():
            self.destroy_lifecycle_publisher(publisher)
        self._outputs = {}
        if self._reset_service is not None:
            self.destroy_service(self._reset_service)
            self._reset_service = None
        self._front_end = None
        self._state = "unconfigured"
        release_memory()

    def _stop_processing(self, patience: float | None = None) -> None:
        self._unsubscribe()
        if self._inbox is not None:
            self._monitor.dropped(self._inbox.close())
            self._inbox = self._pairing = None
            assert self._inference is not None
            with contextlib.suppress(TimeoutError, FuturesTimeoutError):
                self._inference.submit(lambda: None).result(patience)  # the frame at hand is done

    def _wait_for(self, future: Future[Result]) -> Result:
        """The result, unless the process is told to end in the meantime."""
        while self.context.ok():
            with contextlib.suppress(TimeoutError, FuturesTimeoutError):
                return future.result(0.1)
        raise ExternalShutdownException

    # Input

    def _subscribe(self, reliable: bool) -> None:
        """Subscribe to images and calibration: as drivers send, or reliably so that a replay loses nothing."""
        compressed = self._matching_parameters.image_transport == "compressed"
        # A stereo pair's partner may come some images later.
        newest = 1 if len(self._inputs) == 1 else 5
        image_qos = QoSProfile(
            depth=newest if self._matching_parameters.queue == "latest" else 1000,
            history=HistoryPolicy.KEEP_LAST,
            reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        )
        info_qos = QoSProfile(depth=10, reliability=image_qos.reliability)
        for side, camera in enumerate(self._inputs):
            topic = self.resolve_topic_name(camera.image_name) + ("/compressed" if compressed else "")
            camera.image = self._create_input(
                CompressedImage if compressed else Image, topic, functools.partial(self._store_image, side), image_qos
            )
            camera.info = self._create_input(
                CameraInfo,
                self.resolve_topic_name(camera.info_name),
                functools.partial(self._store_camera_info, side),
                info_qos,
            )

    def _unsubscribe(self) -> None:
        for camera in self._inputs:
            for subscription in (camera.image, camera.info):
                if subscription is not None:
                    self.destroy_subscription(subscription)
            camera.image = camera.info = None

    def _create_input(self, kind: type, topic: str, callback: Callable[[Any], None], qos: QoSProfile) -> Any:
        def report(event: Any) -> None:
            policy = QoSPolicyKind(int(event.last_policy_kind)).name.lower()
            if policy == "reliability" and qos.reliability == ReliabilityPolicy.RELIABLE:
                self._best_effort_wanted = True
                remedy = "receiving it best effort instead: frames may be lost on the way"
            else:
                remedy = f"no message arrives; change the publisher{_or_override(topic, 'subscription', policy)}"
                self._incompatible_qos[topic] = f"the publisher of {topic} offers another {policy}: {remedy}"
            self.get_logger().warning(f"the publisher of {topic} offers another {policy}: {remedy}")

        overriding = None if self._best_effort_wanted else _overridable()
        return self.create_subscription(
            kind,
            topic,
            callback,
            qos,
            event_callbacks=SubscriptionEventCallbacks(incompatible_qos=report, use_default_callbacks=False),
            qos_overriding_options=overriding,
        )

    def _report_subscriber(self, topic: str, event: Any) -> None:
        policy = QoSPolicyKind(int(event.last_policy_kind)).name.lower()
        explanation = (
            f"a subscriber of {topic} asks for another {policy} and receives nothing; change it"
            f"{_or_override(topic, 'publisher', policy)}"
        )
        self._refused_subscribers[topic] = explanation
        self.get_logger().warning(explanation)

    def _store_image(self, side: int, message: ImageMessage) -> None:
        self._inputs[side].arrived = now = time.monotonic()
        images = self._paired(side, message) if len(self._inputs) == 2 else (message,)
        if images is None:
            return
        self._monitor.received()
        inbox = self._inbox
        self._monitor.dropped(1 if inbox is None else inbox.put((images, now)))

    def _paired(self, side: int, message: ImageMessage) -> tuple[ImageMessage, ImageMessage] | None:
        """The stereo pair that an image completes; those left without a partner are counted and named."""
        pairing = self._pairing
        if pairing is None:
            return None
        before = list(pairing.unpaired)
        pair = pairing.put(side, messages.nanoseconds(message.header.stamp), message)
        for camera, count in zip(self._inputs, (now - then for now, then in zip(pairing.unpaired, before))):
            if count:
                near = "" if pairing.offset is None else f"; the last near miss was {pairing.offset * 1e-9:.6f} s off"
                self._monitor.unpaired(
                    camera.topic,
                    count,
                    f"images on {camera.topic} find no partner within sync_tolerance of their stamps{near}",
                )
        return pair

    def _store_camera_info(self, side: int, message: CameraInfo) -> None:
        self._inputs[side].calibration = message
        if all(camera.calibration is not None for camera in self._inputs):
            self._calibrated.set()

    def _reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._reset_requested.set()
        response.success = True
        response.message = "features and tracks are forgotten; the next frame starts anew"
        return response

    def _check_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        """Accept a change when the whole set that results from it is allowed; it takes effect with the next frame."""
        known = {item.name: item for item in declarations()}
        values = {change.name: change.value for change in changes if change.name in known}
        try:
            parameters = self._matching_parameters.replace(values)
            fixed = [
                name
                for name in values
                if not known[name].dynamic and getattr(parameters, name) != getattr(self._matching_parameters, name)
            ]
            if fixed and self._state != "unconfigured":
                raise ParameterError(
                    f"{', '.join(fixed)} takes effect when the node is configured: deactivate it and clean it up first "
                    "(ros2 lifecycle set)"
                )
        except ParameterError as error:
            return SetParametersResult(successful=False, reason=str(error))
        self._matching_parameters = parameters
        self._changed_parameters = parameters
        return SetParametersResult(successful=True)

    # Processing, on the inference thread

    def _process_frames(self, inbox: Inbox[tuple[tuple[ImageMessage, ...], float]], front_end: FrontEnd) -> None:
        trimmed = time.monotonic()
        while (item := inbox.take()) is not None:
            received, arrived = item
            try:
                self._process(received, arrived, front_end)
            except ImageError as error:
                self._reject(error.reason, f"an image was rejected: {error}")
            except Exception as error:  # noqa: BLE001  (one bad frame must not end the node)
                if not self.context.ok():
                    return  # told to end while a frame was under way: there is nobody left to publish to
                front_end.reset()
                if is_out_of_memory(error):
                    release_memory()
                    self._reject("memory", f"out of memory: {_first_line(error)}; lower resize or max_keypoints")
                    continue
                self._reject("internal error", f"a frame was lost to {type(error).__name__}: {error}")
                self.get_logger().error(traceback.format_exc())
            if time.monotonic() > trimmed + _TRIM_INTERVAL:
                trim_heap()
                trimmed = time.monotonic()

    def _process(self, received: tuple[ImageMessage, ...], arrived: float, front_end: FrontEnd) -> None:
        parameters, self._changed_parameters = self._changed_parameters, None
        if parameters is not None:
            front_end.configure(parameters)
        if self._reset_requested.is_set():
            self._reset_requested.clear()
            front_end.reset()
        images = [to_array(message) for message in received]
        stamps = [messages.nanoseconds(message.header.stamp) for message in received]
        if why := front_end.interruption(stamps[0]):
            explanation = f"{why}: features and tracks are forgotten"
            self._monitor.interrupted(explanation)
            self.get_logger().warning(explanation)
        camera = self._camera_for([(image.shape[1], image.shape[0]) for image in images])
        names = [message.header.frame_id for message in received]
        stereo: Pair | None = None
        if len(images) == 1:
            assert not isinstance(camera, StereoCamera)
            frame, pair = front_end.register_frame(images[0], stamps[0], camera, names[0])
        else:
            assert not isinstance(camera, Camera)
            stereo, pair = front_end.register_stereo_frame(
                images[0], images[1], stamps[0], camera, (names[0], names[1]), stamps[1]
            )
            frame = stereo.reference
            self._check_stereo(stereo)
        self._publish(frame, pair, stereo)
        if why:
            self._publish_interruption(messages.header_of(frame))
        self._monitor.processed((time.monotonic() - arrived) * 1e3, len(frame.keypoints), pair, stereo)

    def _check_stereo(self, stereo: Pair) -> None:
        if stereo.pose.status is not PoseStatus.FAILED:
            return
        self._refuse_calibration(
            "stereo matches",
            f"only {stereo.pose.num_inliers} of {len(stereo.indices)} stereo matches agree with the camera_infos: left "
            "and right images are swapped, or the calibration is another pair's, or no longer right",
        )

    def _reject(self, reason: str, explanation: str) -> None:
        self._monitor.rejected(reason, explanation)
        self.get_logger().warning(explanation, throttle_duration_sec=5.0)

    def _camera_for(self, sizes: list[tuple[int, int]]) -> Camera | StereoCamera | None:
        """The calibration, if there is one and it fits images of these sizes."""
        if not self._calibrated.is_set() and all(
            self.count_publishers(self.resolve_topic_name(camera.info_name)) for camera in self._inputs
        ):
            self._calibrated.wait(_CALIBRATION_WAIT[self._matching_parameters.queue])
            self._calibrated.set()  # waited for once only
        infos = tuple(camera.calibration for camera in self._inputs if camera.calibration is not None)
        if len(infos) < len(self._inputs):
            return None
        rectified = self._matching_parameters.rectified
        try:
            if len(infos) != len(self._camera_source) or any(a is not b for a, b in zip(infos, self._camera_source)):
                self._camera, self._camera_source = None, infos
                if len(infos) == 1:
                    self._camera = Camera.from_camera_info(infos[0], rectified=rectified)
                else:
                    self._camera = StereoCamera.from_camera_infos(infos[0], infos[1], rectified=rectified)
            if isinstance(self._camera, StereoCamera):
                self._camera.check_size(sizes[0], sizes[1])
            elif self._camera is not None:
                self._camera.check_size(*sizes[0])
        except CalibrationError as error:
            self._refuse_calibration(error.reason, f"camera_info is of no use: {error}")
            return None
        return self._camera

    def _refuse_calibration(self, reason: str, explanation: str) -> None:
        self._monitor.calibration_refused(reason, explanation)
        self.get_logger().warning(explanation, throttle_duration_sec=5.0)

    # Output

    def _publish(self, frame: Frame, pair: Pair | None, stereo: Pair | None) -> None:
        extractor, matcher = self._matching_parameters.extractor, self._matching_parameters.matcher
        if self._outputs["features"].get_subscription_count():
            for described in [frame] if stereo is None else [frame, stereo.current]:
                self._outputs["features"].publish(messages.feature_array(described, extractor))
        if stereo is not None:
            message = messages.match_array(stereo, MatchArray.STEREO, extractor, matcher)
            self._outputs["stereo_matches"].publish(message)
        if pair is None:
            return
        self._outputs["matches"].publish(messages.match_array(pair, MatchArray.CONSECUTIVE, extractor, matcher))
        self._outputs["relative_pose"].publish(messages.relative_pose(pair))
        self._monitor.pose(pair.pose.status)
        if self._odometry is not None:
            self._publish_odometry(self._odometry, pair)
        if self._outputs["match_image"].get_subscription_count():
            picture = draw_matches(
                pair.reference.image,
                frame.image,
                pair.reference_points,
                pair.points,
                pair.scores,
                pair.pose.inliers,
                _caption(pair),
            )
            self._outputs["match_image"].publish(messages.image_message(picture, messages.header_of(frame)))

    def _publish_interruption(self, header: Header) -> None:
        """Tell those who wait for the pose of an image that it has none."""
        self._outputs["relative_pose"].publish(messages.interruption(header))
        self._monitor.pose(PoseStatus.INTERRUPTED)

    def _publish_odometry(self, odometry: Odometry, pair: Pair) -> None:
        pose = odometry.add(pair)
        if pose is None:
            return
        message = messages.odometry(pair.current, pose)
        self._monitor.odometry(
            odometry.breaks, f"the chain of poses broke: odometry begins anew in the frame {message.header.frame_id}"
        )
        self._outputs["odometry"].publish(message)
        if "/tf" in self._outputs:
            self._outputs["/tf"].publish(TFMessage(transforms=[messages.transform_of(message)]))

    def _every_second(self) -> None:
        if self._best_effort_wanted and self._state == "active":
            self._unsubscribe()
            self._subscribe(reliable=False)
            self._best_effort_wanted = False
        self._publish_diagnostics()
        self._told_early = False

    def _watch(self) -> None:
        """Diagnostics at once where something new is wrong: one message at most between two of the steady ones."""
        if self._pairing is not None:
            self._pairing.wait(time.monotonic())
        if not self._told_early and {problem.kind for problem in self._problems()} - self._told:
            self._told_early = True
            self._publish_diagnostics()

    def _publish_diagnostics(self) -> None:
        self._report_alone()
        problems = self._problems()
        self._told = {problem.kind for problem in problems}
        level, text = self._assess(problems)
        values = {"state": self._state, **self._monitor.values(), **self._resources()}
        array = DiagnosticArray()
        array.header.stamp = self.get_clock().now().to_msg()
        name = f"{self.get_fully_qualified_name().lstrip('/')}: feature matching"
        hardware = " and ".join(self.resolve_topic_name(camera.image_name) for camera in self._inputs)
        array.status = [messages.diagnostic_status(level, name, text, hardware, values)]
        self._diagnostics.publish(array)

    def _report_alone(self) -> None:
        """An INTERRUPTED pose for the newest image whose partner does not come, as the other camera is silent."""
        for side in range(2):
            if self._pairing is not None and self._pairing.silent(side):
                alone = self._pairing.newest(1 - side)
                if alone is not None and alone is not self._told_alone:
                    self._told_alone = alone
                    self._publish_interruption(alone.header)

    def _problems(self) -> list[Problem]:
        return [*self._silence(), *self._monitor.problems()] if self._state == "active" else []

    def _assess(self, problems: list[Problem]) -> tuple[bytes, str]:
        """How the node is, in a word to the user."""
        if self._fault:
            return DiagnosticStatus.ERROR, self._fault
        if self._state != "active":
            return DiagnosticStatus.OK, f"{self._state}: activate the node to have it process images"
        if problems:
            return DiagnosticStatus.WARN, "; ".join(dict.fromkeys(problem.explanation for problem in problems))
        return DiagnosticStatus.OK, "matching"

    def _silence(self) -> list[Problem]:
        """Why nothing arrives here or there, by topic."""
        found = [Problem(f"QoS: {topic}", explanation) for topic, explanation in self._incompatible_qos.items()]
        for publisher in self._outputs.values():
            refused = self._refused_subscribers.get(publisher.topic_name)
            if refused and self.count_subscribers(publisher.topic_name) > publisher.get_subscription_count():
                found.append(Problem(f"QoS: {publisher.topic_name}", refused))  # it is still there
        now = time.monotonic()
        waited = now - self._activated_at
        for side, camera in enumerate(self._inputs):
            if camera.image is None or camera.info is None:
                continue
            silent = waited if camera.arrived is None else min(now - camera.arrived, waited)
            missed, alone = 0, False  # images of the other camera of a pair, which goes on
            if self._pairing is not None and len(self._inputs) == 2:
                missed, alone = self._pairing.since[side], self._pairing.silent(side)
            if (silent > _SILENT_AFTER or alone) and camera.topic not in self._incompatible_qos:
                publishers = self.count_publishers(camera.topic)
                why = "nobody publishes it"
                if publishers:
                    why = (
                        f"it has {publishers} publisher(s), but nothing comes; large images are easily lost best "
                        f"effort, which qos_overrides.{camera.topic}.subscription.reliability: reliable prevents"
                    )
                meanwhile = f", {missed} images of the other camera" if missed else ""
                explanation = f"no image on {camera.topic} for {silent:.1f} s{meanwhile}: {why}"
                found.append(Problem(f"silent: {camera.topic}", explanation))
            info = camera.info.topic_name
            if camera.calibration is None and waited > _SILENT_AFTER and info not in self._incompatible_qos:
                why = "sends nothing" if self.count_publishers(info) else "nobody publishes it"
                explanation = f"no calibration on {info}, so no relative pose: {why}"
                found.append(Problem(f"no calibration: {info}", explanation))
        return found

    def _resources(self) -> dict[str, str]:
        with open("/proc/self/statm") as stream:
            resident = int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        values = {"resident memory (MB)": f"{resident / 1e6:.0f}"}
        if self._front_end is not None:
            matcher = self._front_end.matcher
            values["device"] = str(matcher.device)
            values["precision"] = str(matcher.dtype).removeprefix("torch.")
            values["repeated in float32"] = str(matcher.repeated_in_float32)
            values["extractor"] = matcher.parameters.extractor
            values["matcher"] = matcher.parameters.matcher
            if matcher.device.type == "cuda":
                values["GPU"] = torch.cuda.get_device_name(matcher.device)
                values["GPU memory (MB)"] = f"{torch.cuda.memory_allocated(matcher.device) / 1e6:.0f}"
        return values

    def _log_weights(self, matcher: FeatureMatcher) -> None:
        for role in ("extractor", "matcher"):
            name = getattr(matcher.parameters, role)
            if name in REGISTRY:
                terms = REGISTRY[name].terms
            else:
                terms = "no network" if name == "nearest" else "licence unknown: see where it comes from"
            self.get_logger().info(f"{role} {name} ({terms})")
        self.get_logger().info(f"on {matcher.device} in {str(matcher.dtype).removeprefix('torch.')}")


def _overridable() -> QoSOverridingOptions:
    return QoSOverridingOptions(_OVERRIDABLE)


def _or_override(topic: str, entity: str, policy: str) -> str:
    if QoSPolicyKind[policy.upper()] not in _OVERRIDABLE:
        return ""
    return f", or this node's parameter qos_overrides.{topic}.{entity}.{policy}"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _load(parameters: Parameters) -> FrontEnd:
    front_end = FrontEnd(parameters)
    front_end.matcher.warm_up()
    return front_end


def _caption(pair: Pair) -> str:
    return (
        f"{len(pair.indices)} matches, {pair.pose.num_inliers} inliers, {pair.layers} layers, "
        f"{pair.current.extract_ms + pair.match_ms:.0f} ms, {pair.pose.status.name}"
    )


def main(args: list[str] | None = None) -> int:
    """Run the node until it is told to stop. 0 on a clean end, 1 where it could not start."""
    rclpy.init(args=args)
    node = None
    try:
        node = MatcherNode()
        if node.parameters.autostart and node.trigger_configure() == TransitionCallbackReturn.SUCCESS:
            node.trigger_activate()
        rclpy.spin(node)
    except (ParameterError, InvalidParameterTypeException, InvalidParameterValueException) as error:
        print(f"matcher: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except Exception:
        if rclpy.ok():
            raise
        # Told to end in the middle of the executor's work, which then stumbles over what is not there any more.
    finally:
        for sent in (signal.SIGINT, signal.SIGTERM):  # ending is under way: a second Ctrl-C must not break into it
            signal.signal(sent, signal.SIG_IGN)
        if node is not None:
            node.end()
        rclpy.try_shutdown()
        if any(thread.name.startswith(_THREAD_NAME) for thread in threading.enumerate()):
            # A network is still at work on the last frame, or loading. Nothing can interrupt it but the process's end.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    return 0
