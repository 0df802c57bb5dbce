"""Guards services and callbacks, so that no request or message can end the node."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable
from typing import Any

from rcl_interfaces.msg import SetParametersResult
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.parameter import Parameter

from kpmatch_ros.parameters import declarations, meant

__all__ = ["guarded", "survives"]

# Most entries in one request. The node has about a hundred parameters, and rclpy takes at least 0.1 ms for each entry.
_MOST_ENTRIES = 1000
# The list fields in the requests of the parameter services.
_LISTS = ("names", "prefixes", "parameters")
_LOG_INTERVAL = 5.0  # seconds between two tracebacks
_PARAMETER_TYPES = frozenset(kind.value for kind in Parameter.Type)

ServiceCallback = Callable[[Any, Any], Any]


def survives(
    callback: Callable[..., Any], node: Node, tell: Callable[[Exception], None] | None = None
) -> Callable[..., Any]:
    """Wrap a callback so that its exceptions are logged. In rclpy an exception would end the node.

    Errors after the shutdown of the context are ignored, because the shutdown causes them: a signal may arrive while a
    callback is publishing.

    Args:
        callback: callback of a subscription or a timer.
        node: provides the context and the logger.
        tell: called with the exception.
    """

    @functools.wraps(callback)
    def wrapped(*arguments: Any) -> Any:
        try:
            return callback(*arguments)
        except ExternalShutdownException:
            raise
        except Exception as error:  # noqa: BLE001  (the node lives on and names it)
            if not node.context.ok():
                return None
            text = f"a callback failed:\n{traceback.format_exc()}"
            # Throttled: messages on /clock may arrive a thousand times a second.
            node.get_logger().error(text, throttle_duration_sec=_LOG_INTERVAL)
            if tell is not None:
                tell(error)
            return None

    return wrapped


def guarded(
    callback: ServiceCallback, logger: Callable[[], Any], is_parameter: Callable[[str], bool]
) -> ServiceCallback:
    """Wrap a service callback so that every request is answered: an exception becomes a refusal.

    In rclpy an exception of a service callback ends the executor and so the node. For example, an invalid lifecycle
    transition given by its id raises one (ros2/rclpy#1209), and so does a parameter of an unknown type. A request with
    too many entries is refused at once, because nothing else runs while it is processed. The refusal of an unknown
    parameter names the most similar parameter; rclpy names none.

    Args:
        callback: fills a response. It may be a coroutine function, which the executor awaits.
        logger: returns the node's logger.
        is_parameter: whether the node has a parameter with a given name.
    """

    def refused(request: Any, response: Any, error: Exception) -> Any:
        kind, reason = type(response), _in_words(error)
        logger().warning(f"a request of {kind.__name__.removesuffix('_Response')} was refused: {reason}")
        return _refusal(kind, request, reason)

    async def answer_later(request: Any, response: Any) -> Any:
        try:
            return await callback(request, response)
        except ExternalShutdownException:
            raise
        except Exception as error:  # noqa: BLE001  (the node lives on and names it)
            return refused(request, response, error)

    def answer(request: Any, response: Any) -> Any:
        kind = type(response)
        if reason := _too_long(request):
            logger().warning(f"a request was refused: {reason}")
            return _refusal(kind, request, reason)
        if hasattr(response, "results"):  # SetParameters
            return _answer_one_by_one(callback, request, response, logger, is_parameter)
        if hasattr(request, "parameters") and (reason := _unknown(request.parameters, is_parameter)):
            return _refusal(kind, request, reason)
        try:
            return callback(request, response)
        except ExternalShutdownException:
            raise
        except Exception as error:  # noqa: BLE001  (the node lives on and names it)
            return refused(request, response, error)

    return answer_later if inspect.iscoroutinefunction(callback) else answer


def _answer_one_by_one(
    callback: ServiceCallback,
    request: Any,
    response: Any,
    logger: Callable[[], Any],
    is_parameter: Callable[[str], bool],
) -> Any:
    """Set parameters one by one, so that one invalid parameter does not prevent setting and answering the others."""
    parameters, results = list(request.parameters), []
    for parameter in parameters:
        reason = _unknown([parameter], is_parameter)
        if not reason:
            request.parameters, response.results = [parameter], []
            try:
                response = callback(request, response)
                results += response.results
                continue
            except ExternalShutdownException:
                raise
            except Exception as error:  # noqa: BLE001  (the node lives on and names it)
                reason = _in_words(error)
        logger().warning(f"{parameter.name} was not set: {reason}")
        results.append(SetParametersResult(successful=False, reason=reason))
    response.results = results
    return response


def _too_long(request: Any) -> str:
    for name in _LISTS:
        count = len(getattr(request, name, ()))
        if count > _MOST_ENTRIES:
            return f"{count} {name} in one request, more than {_MOST_ENTRIES}: send several requests"
    return ""


def _unknown(parameters: Any, is_parameter: Callable[[str], bool]) -> str:
    for parameter in parameters:
        if not is_parameter(parameter.name):
            name = parameter.name[:80]
            return f"there is no parameter {name!r}{meant(name, [item.name for item in declarations()])}"
        if parameter.value.type not in _PARAMETER_TYPES:
            return (
                f"{parameter.name}: there is no parameter type {parameter.value.type}; see "
                "rcl_interfaces/msg/ParameterType"
            )
    return ""


def _refusal(kind: type, request: Any, reason: str) -> Any:
    """Return a response that refuses a request. It contains the reason if its type has a field for it."""
    response = kind()
    if hasattr(response, "results"):
        response.results = [SetParametersResult(successful=False, reason=reason)] * len(request.parameters)
    elif isinstance(getattr(response, "result", None), SetParametersResult):
        response.result = SetParametersResult(successful=False, reason=reason)
    elif hasattr(response, "message"):
        response.message = reason
    return response


def _in_words(error: Exception) -> str:
    text = (str(error) or type(error).__name__).splitlines()[0]
    return f"{text[:300]}"
