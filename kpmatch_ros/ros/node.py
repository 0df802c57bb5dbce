"""The matcher node: a lifecycle node that feeds the pipeline from its subscriptions."""

from __future__ import annotations

import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, TypeVar

from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.executors import ExternalShutdownException
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from std_srvs.srv import Trigger

from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.odometry import Odometry, check_odometry
from kpmatch_ros.parameter_file import without_effect
from kpmatch_ros.parameters import ParameterError, Parameters, declarations, profile_values
from kpmatch_ros.pipeline import WAITING_MEMORY, Pipeline
from kpmatch_ros.ros.diagnostics import Condition, Diagnostics, LoggingMonitor, log_weights, next_step
from kpmatch_ros.ros.inbox import Inbox
from kpmatch_ros.ros.inputs import Inputs
from kpmatch_ros.ros.manager_bond import ManagerBond
from kpmatch_ros.ros.match_service import MatchRequest, offer_match_features
from kpmatch_ros.ros.monitor import Problem
from kpmatch_ros.ros.outputs import Outputs, output_names
from kpmatch_ros.ros.parameter_descriptors import declare_parameters, parameter_type
from kpmatch_ros.ros.qos import SERVICE_QOS, undeclare_overrides
from kpmatch_ros.ros.service_guard import guarded, survives
from kpmatch_ros.ros.start import THREAD_NAME
from kpmatch_ros.ros.tf import INSTALL, TFMessage
from kpmatch_ros.ros.topic_names import check_topics
from kpmatch_ros.ros.transitions import explained
from kpmatch_ros.runtime.device import is_out_of_memory, release_memory, trim_heap

__all__ = ["MatcherNode"]

_WATCH_PERIOD = 0.1  # seconds between two checks for new problems
_LAST_FRAME_WAIT = 1.0  # seconds that the current frame has to finish when the process is asked to end
# Seconds between two returns of free memory to the system. The networks' buffers fragment the heap: without this a node
# held 510 MB instead of 340 MB. A return takes 10 ms, after a frame is published.
_TRIM_INTERVAL = 1.0
_TO_UNCONFIGURED = {
    "active": "deactivate it and clean it up first (ros2 lifecycle set)",
    "inactive": "clean it up first (ros2 lifecycle set)",
}
_TOO_SLOW = (
    f"frames are dropped although queue is all: waiting frames take more than {WAITING_MEMORY / 1e9:g} GB, because "
    "they arrive faster than they are processed. Play the bag slower (ros2 bag play --rate), lower max_keypoints or "
    "resize, or set queue to latest"
)

Answer = TypeVar("Answer")


class _Received(NamedTuple):
    """A frame that waits to be processed."""

    images: tuple[Any, ...]  # image messages: one, or left and right
    arrived: float  # monotonic seconds


class _Unpaired(NamedTuple):
    """An image without a partner, because the other camera of the stereo pair is silent."""

    image: Any  # image message


class MatcherNode(LifecycleNode):
    """Subscribes to images and calibration, and publishes matches, relative poses and diagnostics.

    Callbacks only store incoming messages. A separate thread loads the networks, runs them and publishes the results.

    Attributes:
        fault: reason why the last transition failed; empty if it succeeded.
        monitor: counts what the node does.
    """

    def __init__(self, **options: Any) -> None:
        self._guarded_services: list[Any] = []
        super().__init__("matcher", **options)
        try:
            self._set_up()
        except BaseException:
            self.destroy_node()
            raise

    def _set_up(self) -> None:
        self._parameters_in_force = declare_parameters(self)
        self.add_on_set_parameters_callback(self._check_parameters)
        # rclpy silently ignores undeclared parameters. A name similar to one of this node's is reported as a typing
        # error. Other names may belong to another node.
        self._unknown_parameters = [
            Problem(f"parameter: {text}", text)
            for text in without_effect(getattr(self, "_parameter_overrides", {}))
            if "did you mean" in text
        ]
        for problem in self._unknown_parameters:
            self.get_logger().warning(problem.explanation)

        self._state = "unconfigured"
        self.fault = ""
        self.monitor = LoggingMonitor(self.get_logger())
        self._inputs = self._make_inputs()
        self._outputs: Outputs | None = None
        self._pipeline: Pipeline | None = None
        self._odometry = Odometry()  # one for the node's lifetime: its frames are numbered across configurations
        self._inference: ThreadPoolExecutor | None = None
        self._inbox: Inbox[_Received | _Unpaired, MatchRequest] | None = None
        self._bond = ManagerBond(self)

        self._diagnostics = Diagnostics(self, self.monitor, self._condition)
        # Steady time, so that diagnostics continue while a bag is paused and simulated time stands still.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._timers = [
            self.create_timer(1.0, survives(self._every_second, self), clock=steady),
            self.create_timer(_WATCH_PERIOD, survives(self._watch, self), clock=steady),
        ]
        # Services exist in every state: a waiting request is answered after the transition that ends its wait.
        self.create_service(Trigger, "reset", self._reset)
        offer_match_features(self, self._ask)
        for service in self.services:  # rclpy does not create the lifecycle services through create_service
            if service not in self._guarded_services:
                service.callback = self._guarded(service.callback)

    def create_service(self, srv_type: Any, srv_name: str, callback: Any, **options: Any) -> Any:
        """Create a service that no request can bring down, see :func:`kpmatch_ros.ros.service_guard.guarded`."""
        options.setdefault("qos_profile", SERVICE_QOS)
        service = super().create_service(srv_type, srv_name, self._guarded(callback), **options)
        self._guarded_services.append(service)
        return service

    def describe_parameter(self, name: str) -> Any:
        """Return the descriptor with the declared type. rclpy leaves the last value's type there, even if rejected."""
        descriptor = super().describe_parameter(name)
        descriptor.type = parameter_type(name, descriptor.type)
        return descriptor

    def _guarded(self, callback: Any) -> Any:
        return guarded(callback, self.get_logger, self.has_parameter)

    def create_subscription(self, msg_type: Any, topic: str, callback: Any, *arguments: Any, **options: Any) -> Any:
        """Subscribe such that no message can end the node. This includes rclpy's own subscriptions, as to /clock."""

        def lost(error: Exception) -> None:
            why = f"{type(error).__name__}: {error}"
            look = f"check what its publisher sends: ros2 topic echo {topic}"
            self.monitor.message_lost(topic, f"a message on {topic} was left out: {why}; {look}")

        callback = survives(callback, self, lost)
        return super().create_subscription(msg_type, topic, callback, *arguments, **options)

    @property
    def parameters(self) -> Parameters:
        """The parameters in force."""
        return self._parameters_in_force

    # Lifecycle

    @explained
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the weights, run the networks once, and create the publishers."""
        parameters = self._parameters_in_force
        check_odometry(parameters)
        for text in parameters.idle():
            self.get_logger().warning(text)
        if parameters.publish_odometry and parameters.base_frame and TFMessage is None:
            raise ParameterError(f"base_frame is {parameters.base_frame!r}, which needs /tf_static, but {INSTALL}")
        self._inputs = self._make_inputs()
        check_topics({**self._inputs.names, **output_names(parameters)}, self.resolve_topic_name)
        self._inference = ThreadPoolExecutor(max_workers=1, thread_name_prefix=THREAD_NAME)
        self._state = "configuring"
        try:
            front_end = self._wait_for(self._inference.submit(_load, parameters))
            self._outputs = Outputs(self, parameters)
            self._pipeline = Pipeline(
                front_end,
                self._inputs.topics,
                self._outputs.publish,
                self._outputs.wanted,
                self.monitor,
                odometry=self._odometry,
            )
            self.monitor.configured()
        except BaseException:
            self._release(patience=0.0)  # do not wait: loading the networks cannot be interrupted
            raise
        self._state = "inactive"
        log_weights(self.get_logger(), front_end.matcher)
        return super().on_configure(state)

    @explained
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe, and start the thread that processes frames."""
        assert self._pipeline is not None and self._inference is not None
        self._pipeline.restart()
        self._inputs.subscribe()
        super().on_activate(state)  # activates the publishers, before the first frame's results
        self._inbox = Inbox(self._parameters_in_force.queue == "latest", WAITING_MEMORY)
        self._inference.submit(self._process_frames, self._inbox, self._pipeline)
        try:
            if not self._parameters_in_force.autostart:  # with autostart there is no lifecycle manager
                self._bond.form(self._parameters_in_force.bond_heartbeat_period)
        except BaseException:
            self._stop_processing()
            super().on_deactivate(state)
            raise
        self._state = "active"
        self.get_logger().info(f"active: waiting for images on {' and '.join(self._inputs.topics)}")
        return TransitionCallbackReturn.SUCCESS

    @explained
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unsubscribe, let the current frame finish, and release the memory that only frames need."""
        assert self._pipeline is not None
        self._bond.release()
        self._stop_processing()
        self._pipeline.restart()
        release_memory()
        self._state = "inactive"
        return super().on_deactivate(state)

    @explained
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Release the networks and the topics."""
        self._release()
        return super().on_cleanup(state)

    @explained
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Release everything, from any state."""
        self._release()
        self._state = "finalized"
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Release everything and return to unconfigured, so that the node can be configured again."""
        self._release()
        return TransitionCallbackReturn.SUCCESS

    def destroy_node(self) -> None:
        """Leave the graph and end the middleware's threads, which may crash if its libraries are unloaded first."""
        super().destroy_node()
        self.__dict__.pop("_state_machine", None)  # rclpy keeps it, and its publisher keeps the node alive

    def end(self) -> None:
        """Release everything before the process ends, with only a short wait for the current frame."""
        self._release(_LAST_FRAME_WAIT)
        self.destroy_node()

    def _release(self, patience: float | None = None) -> None:
        """Release the networks and the topics. ``patience`` limits the wait for the current frame, in seconds."""
        self._bond.release()
        self._stop_processing(patience)
        if self._inference is not None:
            self._inference.shutdown(wait=patience is None)
            self._inference = None
        if self._outputs is not None:
            self._outputs.destroy()
            self._outputs = None
        undeclare_overrides(self)
        self._pipeline = None
        self._state = "unconfigured"
        release_memory()

    def _stop_processing(self, patience: float | None = None) -> None:
        self._inputs.end()
        if self._inbox is not None:
            left = self._inbox.close()
            self._inbox = None
            self.monitor.dropped(left.items)
            for request in left.requests:
                request.refuse("the node was deactivated while the request waited")
            assert self._inference is not None
            wait([self._inference.submit(lambda: None)], patience)  # runs after the current frame

    def _wait_for(self, future: Future[Answer]) -> Answer:
        """Wait for a future and return its result, unless the process is asked to end. Diagnostics continue."""
        published = -1.0  # earlier than any time: the first message is published at once, however short the wait
        while self.context.ok():
            if time.monotonic() >= published + 1.0:  # the executor is blocked in here, so its timers do not run
                published = time.monotonic()
                self._diagnostics.every_second()
            if wait([future], 0.1).done:
                return future.result()
        raise ExternalShutdownException

    # Input

    def _make_inputs(self) -> Inputs:
        takes = (self._take_image, self._take_info, self._take_mask, self._take_transforms)
        return Inputs(self, self._parameters_in_force, *takes)

    def _take_image(self, side: int, message: Any) -> None:
        arrived = time.monotonic()
        if self._pipeline is None or (images := self._pipeline.add_image(side, message)) is None:
            return
        self.monitor.received()
        inbox = self._inbox
        size = sum(len(image.data) for image in images)
        dropped = 1 if inbox is None else inbox.put(_Received(images, arrived), size)
        if dropped and inbox is not None and self._parameters_in_force.queue == "all":
            self.monitor.overflowed(dropped, _TOO_SLOW)
        else:
            self.monitor.dropped(dropped)

    def _take_info(self, side: int, message: Any) -> None:
        if self._pipeline is not None:
            self._pipeline.add_info(side, message)

    def _take_mask(self, side: int, message: Any) -> None:
        if self._pipeline is not None:
            self._pipeline.add_mask(side, message)

    def _ask(self, request: MatchRequest) -> str:
        """Hand a request to the inference thread. Returns the reason for a refusal, or an empty text."""
        inbox = self._inbox
        if inbox is None:
            return f"the node is {next_step(self._state)}"
        return "" if inbox.ask(request) else "too many requests are waiting: ask again later"

    def _take_transforms(self, message: Any) -> None:
        if self._pipeline is not None:
            self._pipeline.transforms.update(message)

    def _reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self._pipeline is None:
            response.message = f"there are no features and tracks to discard: the node is {next_step(self._state)}"
            return response
        self._pipeline.request_reset()
        response.success = True
        response.message = "features and tracks are discarded; the next frame starts new tracks"
        return response

    def _check_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        """Accept a change if the resulting parameter set is allowed. It takes effect with the next frame."""
        known = {item.name: item for item in declarations()}
        values = {change.name: change.value for change in changes if change.name in known}
        in_force = self._parameters_in_force
        try:
            parameters = in_force.replace(values)
            if parameters.profile != in_force.profile:
                raise ParameterError(
                    "profile only chooses the values that the node starts with: start it with "
                    f"profile:={parameters.profile}, or set "
                    f"{', '.join(profile_values(parameters.profile)) or 'others'}"
                )
            fixed = [
                name
                for name in values
                if not known[name].dynamic and getattr(parameters, name) != getattr(in_force, name)
            ]
            if fixed and self._state != "unconfigured":
                way = _TO_UNCONFIGURED.get(self._state) or f"it is {next_step(self._state)}"
                raise ParameterError(f"{', '.join(fixed)} takes effect when the node is configured: {way}")
        except ParameterError as error:
            return SetParametersResult(successful=False, reason=str(error))
        self._parameters_in_force = parameters
        if self._pipeline is not None:
            self._pipeline.configure(parameters)
        return SetParametersResult(successful=True)

    # Processing, on the inference thread

    def _process_frames(self, inbox: Inbox[_Received | _Unpaired, MatchRequest], pipeline: Pipeline) -> None:
        trimmed = time.monotonic()
        while (received := inbox.take()) is not None:
            if isinstance(received, MatchRequest):
                self.monitor.answered(received.answer(pipeline))
                continue
            try:
                if isinstance(received, _Unpaired):
                    pipeline.interrupt(received.image)
                    continue
                self._inputs.wait_for_calibration()
                pipeline.masks.expected = self._inputs.masked
                pipeline.wait(received.images, time.monotonic() - received.arrived)
                result = pipeline.process(received.images, inbox.overtaken)
                if result is not None:
                    self.monitor.processed((time.monotonic() - received.arrived) * 1e3, result)
            except Exception as error:  # noqa: BLE001  (one bad frame must not end the node)
                if not self.context.ok():
                    return  # asked to end during a frame: nothing can be published any more
                pipeline.front_end.reset()
                if is_out_of_memory(error):
                    release_memory()
                    text = (str(error) or type(error).__name__).splitlines()[0]
                    self.monitor.rejected("memory", f"out of memory: {text}; lower resize or max_keypoints")
                    continue
                self.monitor.rejected("internal error", f"a frame was lost because of {type(error).__name__}: {error}")
                self.get_logger().error(traceback.format_exc())
            if time.monotonic() > trimmed + _TRIM_INTERVAL:
                trim_heap()
                trimmed = time.monotonic()

    # Diagnostics

    def _every_second(self) -> None:
        if self._state == "active":
            self._inputs.adapt()
        self._diagnostics.every_second()

    def _watch(self) -> None:
        if self._state == "active" and self._pipeline is not None:
            self._inputs.subscribe_to_latched()
            alone = self._pipeline.watch(time.monotonic())
            if alone is not None and self._inbox is not None:
                self._inbox.put_last(_Unpaired(alone))  # the inference thread reports it, after the frames before it
        self._diagnostics.watch()

    def _condition(self) -> Condition:
        condition = Condition(self._state, self.fault, self._inputs.hardware)
        if self._pipeline is not None:
            condition.matcher = self._pipeline.front_end.matcher
            if self._state == "active":
                assert self._outputs is not None
                condition.problems = [
                    *self._unknown_parameters,
                    *self._inputs.problems(self._pipeline.synchroniser),
                    *self._outputs.problems(),
                    *self.monitor.problems(),
                ]
        return condition


def _load(parameters: Parameters) -> FrontEnd:
    front_end = FrontEnd(parameters)
    front_end.matcher.warm_up()
    return front_end
