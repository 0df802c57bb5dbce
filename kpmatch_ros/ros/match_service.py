"""The service match_features: requests go to the thread that runs the networks, and the executor goes on meanwhile."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.lifecycle import LifecycleNode
from rclpy.task import Future

from kpmatch_ros.match_request import refuse
from kpmatch_ros.pipeline import Pipeline
from kpmatch_ros.runtime.device import is_out_of_memory, release_memory
from kpmatch_ros.srv import MatchFeatures

__all__ = ["MatchRequest", "offer_match_features"]


class MatchRequest:
    """A request that waits for its answer.

    Args:
        request: of the service.
        response: is filled.
        answered: gets the response.
        logger: of the node.
    """

    def __init__(self, request: Any, response: Any, answered: Any, logger: Any) -> None:
        self._request, self._response = request, response
        self._answered = answered
        self._logger = logger

    def answer(self, pipeline: Pipeline) -> str:
        """Match the features, whatever they are; why they cannot be matched, or nothing. On the inference thread."""
        try:
            response = pipeline.match_features(self._request, self._response)
        except Exception as error:  # noqa: BLE001  (one bad request must not end the node)
            text = (str(error) or type(error).__name__).splitlines()[0]
            if is_out_of_memory(error):
                release_memory()
                return self.refuse(f"out of memory: {text}; keep fewer features, or lower max_keypoints")
            self._logger.error(traceback.format_exc())
            return self.refuse(f"the match was lost to {type(error).__name__}: {text}")
        self._answered.set_result(response)
        return str(response.message)

    def refuse(self, reason: str) -> str:
        """Answer with the reason why not, and return it."""
        self._answered.set_result(refuse(self._request, self._response, reason))
        return reason


def offer_match_features(node: LifecycleNode, ask: Callable[[MatchRequest], str]) -> None:
    """Offer the service.

    Args:
        node: offers it.
        ask: hands a request to the inference thread. What it returns is why it cannot; empty where it can.
    """

    async def serve(request: Any, response: Any) -> Any:
        answered = Future(executor=node.executor)
        answered.add_done_callback(lambda done: None)  # it wakes the executor, which then goes on here
        waiting = MatchRequest(request, response, answered, node.get_logger())
        if reason := ask(waiting):
            waiting.refuse(reason)
        return await answered

    # A group of its own, and reentrant: while a request waits, no other callback of its group would run.
    node.create_service(MatchFeatures, "match_features", serve, callback_group=ReentrantCallbackGroup())
