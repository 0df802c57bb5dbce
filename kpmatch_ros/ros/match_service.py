"""The service match_features: the inference thread answers the requests, and the executor continues meanwhile."""

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
        request: the service request.
        response: the response to fill.
        answered: a future that receives the response.
        logger: the node's logger.
    """

    def __init__(self, request: Any, response: Any, answered: Any, logger: Any) -> None:
        self._request, self._response = request, response
        self._answered = answered
        self._logger = logger

    def answer(self, pipeline: Pipeline) -> str:
        """Match the features and answer. Returns the reason for a refusal, or an empty text. Never raises Exception.

        Runs on the inference thread.
        """
        try:
            response = pipeline.match_features(self._request, self._response)
        except Exception as error:  # noqa: BLE001  (one bad request must not end the node)
            text = (str(error) or type(error).__name__).splitlines()[0]
            if is_out_of_memory(error):
                release_memory()
                return self.refuse(f"out of memory: {text}; keep fewer features, or lower max_keypoints")
            self._logger.error(traceback.format_exc())
            return self.refuse(f"the match failed because of {type(error).__name__}: {text}")
        self._answered.set_result(response)
        return str(response.message)

    def refuse(self, reason: str) -> str:
        """Answer with a refusal and its reason, and return the reason."""
        self._answered.set_result(refuse(self._request, self._response, reason))
        return reason


def offer_match_features(node: LifecycleNode, ask: Callable[[MatchRequest], str]) -> None:
    """Create the service.

    Args:
        node: the node that offers the service.
        ask: hands a request to the inference thread. It returns the reason for a refusal, or an empty text.
    """

    async def serve(request: Any, response: Any) -> Any:
        answered = Future(executor=node.executor)
        answered.add_done_callback(lambda done: None)  # any callback makes the executor resume this coroutine
        waiting = MatchRequest(request, response, answered, node.get_logger())
        if reason := ask(waiting):
            waiting.refuse(reason)
        return await answered

    # A separate reentrant group: while a request waits, no other callback of a mutually exclusive group would run.
    node.create_service(MatchFeatures, "match_features", serve, callback_group=ReentrantCallbackGroup())
