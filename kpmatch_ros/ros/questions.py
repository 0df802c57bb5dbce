"""Answers the commands' questions about ROS (all, or those named as arguments) as one JSON object on stdout.

This is a separate program, because importing rclpy may replace the process, or end it if libraries clash. Each answer
is a value or the error that the question raised.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Python puts the folder of this file or the working folder on the path. The first holds no packages. A source checkout
# in the second would hide the installed package.
sys.path = [path for path in sys.path if path and Path(path).resolve() != Path(__file__).resolve().parent]


def rclpy_file() -> str:
    """Return the file of rclpy."""
    import rclpy

    return str(rclpy.__file__)


def middleware() -> str:
    """Return the name of the RMW implementation that loads."""
    from rclpy.utilities import get_rmw_implementation_identifier

    return str(get_rmw_implementation_identifier())


def start() -> int:
    """Initialise ROS as a node's process does, and return the domain. This fails without a folder for logs."""
    import rclpy

    context = rclpy.Context()
    rclpy.init(args=[], context=context)
    domain = context.get_domain_id()
    rclpy.shutdown(context=context)
    return int(domain)


def package() -> str:
    """Return the file of this package."""
    import kpmatch_ros

    return str(kpmatch_ros.__file__)


def messages() -> str:
    """Return the file of the package's messages, after a test that serialises and reads each type."""
    from rclpy.serialization import deserialize_message, serialize_message

    import kpmatch_ros.msg
    from kpmatch_ros.msg import FeatureArray, MatchArray, RelativePose

    for kind in (FeatureArray, MatchArray, RelativePose):
        if deserialize_message(serialize_message(kind()), kind) != kind():
            raise RuntimeError(f"{kind.__name__} changes when it is serialised and read again")
    return str(kpmatch_ros.msg.__file__)


def installed() -> str:
    """Return the prefix under which this package is installed."""
    from ament_index_python.packages import get_package_prefix

    return str(get_package_prefix("kpmatch_ros"))


def converter() -> tuple[str, str]:
    """Return the name of the module that converts Bayer and YUV images, and why other modules cannot."""
    from kpmatch_ros.imaging.images import converter

    convert, faults = converter()
    return getattr(convert, "__module__", ""), faults


def answer(question: Callable[[], Any]) -> dict[str, Any]:
    """Return a question's value, or its error as text together with the type's name."""
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
