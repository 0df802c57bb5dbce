"""What the commands ask about ROS (all of it, or what the arguments name), printed as one JSON object.

A program of its own: importing rclpy may replace the process, or end it where libraries clash. Each answer is a value
or the error that the question raised.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# This file's folder is not where packages are. Neither is the working folder: a source checkout there would stand in
# for the installed package.
sys.path = [path for path in sys.path if path and Path(path).resolve() != Path(__file__).resolve().parent]


def rclpy_file() -> str:
    """Where rclpy is."""
    import rclpy

    return str(rclpy.__file__)


def middleware() -> str:
    """The name of the RMW implementation that loads."""
    from rclpy.utilities import get_rmw_implementation_identifier

    return str(get_rmw_implementation_identifier())


def start() -> int:
    """The domain that ROS starts in, as in a node's process: it needs a folder for its logs, above all."""
    import rclpy

    context = rclpy.Context()
    rclpy.init(args=[], context=context)
    domain = context.get_domain_id()
    rclpy.shutdown(context=context)
    return int(domain)


def package() -> str:
    """Where this package is."""
    import kpmatch_ros

    return str(kpmatch_ros.__file__)


def messages() -> str:
    """Where the package's messages are. Each type is serialised and read again."""
    from rclpy.serialization import deserialize_message, serialize_message

    import kpmatch_ros.msg
    from kpmatch_ros.msg import FeatureArray, MatchArray, RelativePose

    for kind in (FeatureArray, MatchArray, RelativePose):
        if deserialize_message(serialize_message(kind()), kind) != kind():
            raise RuntimeError(f"{kind.__name__} does not survive being sent")
    return str(kpmatch_ros.msg.__file__)


def installed() -> str:
    """The prefix that this package is installed under."""
    from ament_index_python.packages import get_package_prefix

    return str(get_package_prefix("kpmatch_ros"))


def converter() -> tuple[str, str]:
    """The module that converts Bayer and YUV images, and why others do not."""
    from kpmatch_ros.imaging.images import converter

    convert, faults = converter()
    return getattr(convert, "__module__", ""), faults


def answer(question: Callable[[], Any]) -> dict[str, Any]:
    """The value, or the error as text and by its type's name."""
    try:
        return {"value": question()}
    except BaseException as error:  # noqa: BLE001 (libraries that clash raise anything, SystemExit too)
        return {"error": f"{type(error).__name__}: {error}", "type": type(error).__name__}


if __name__ == "__main__":
    questions = {
        "rclpy": rclpy_file,
        "rmw": middleware,
        "start": start,
        "package": package,
        "messages": messages,
        "installed": installed,
        "converter": converter,
    }
    asked = sys.argv[1:] or list(questions)
    print(json.dumps({name: answer(questions[name]) for name in asked}))
