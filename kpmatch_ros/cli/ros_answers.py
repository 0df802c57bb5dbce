"""Lets the commands find out about ROS in another process, before they import it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kpmatch_ros

__all__ = ["ProcessEndedError", "ask_ros"]

_QUESTIONS = Path(kpmatch_ros.__file__).parent / "ros" / "questions.py"
_TIMEOUT = 60.0  # seconds


class ProcessEndedError(Exception):
    """The process that imported ROS ended or did not answer. The text says how."""


def ask_ros(*questions: str, without: str = "") -> dict[str, Any]:
    """Answer questions about ROS in a separate process.

    Importing rclpy may replace the process, or end it if libraries are incompatible.

    Args:
        questions: names of questions in ``ros/questions.py``; all questions if none is given.
        without: an environment variable that the process does not get.

    Returns:
        for each question its ``value``, or its ``error`` and the ``type`` of the error.

    Raises:
        ProcessEndedError: the process ended or did not answer in time.
    """
    environment = {name: value for name, value in os.environ.items() if name != without}
    try:
        process = subprocess.run(
            [sys.executable, str(_QUESTIONS), *questions],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ProcessEndedError(f"importing it takes more than {_TIMEOUT:.0f} seconds") from error
    try:
        answers: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        said = (process.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ProcessEndedError(f"importing it ended the process ({process.returncode}): {said}") from error
    return answers
