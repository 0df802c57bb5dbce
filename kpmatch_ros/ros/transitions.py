"""Makes the transitions of a lifecycle node report why they fail."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from rclpy.executors import ExternalShutdownException
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn

from kpmatch_ros.parameters import ParameterError
from kpmatch_ros.weights import WeightsError

__all__ = ["Faulty", "explained"]

Transition = Callable[[Any, LifecycleState], TransitionCallbackReturn]


class Faulty(Protocol):
    """A node that stores why its last transition failed."""

    fault: str
    context: Any

    def get_logger(self) -> Any:
        """The node's logger."""


def explained(callback: Transition) -> Transition:
    """Wrap a transition so that an exception makes it fail with a logged reason. rclpy would swallow the exception.

    Errors after the shutdown of the context are not reported, because the shutdown causes them: a signal may arrive at
    any time.
    """

    @functools.wraps(callback)
    def wrapped(self: Faulty, state: LifecycleState) -> TransitionCallbackReturn:
        self.fault = ""
        try:
            return callback(self, state)
        except ExternalShutdownException:
            return TransitionCallbackReturn.FAILURE  # the process was asked to end meanwhile
        except (ParameterError, WeightsError) as error:
            self.fault = str(error)
            self.get_logger().error(f"{callback.__name__} failed: {error}")
            return TransitionCallbackReturn.FAILURE
        except Exception as error:  # noqa: BLE001  (the node lives on and names it)
            if not self.context.ok():
                return TransitionCallbackReturn.FAILURE
            self.fault = f"{type(error).__name__}: {error}"
            self.get_logger().error(f"{callback.__name__} failed:\n{traceback.format_exc()}")
            return TransitionCallbackReturn.FAILURE

    return wrapped
