"""Tests that the matcher's process ends if it cannot start, so that a supervisor notices."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")
import rclpy
from ament_index_python.packages import get_package_prefix
from domain_coordinator import domain_id
from rclpy._rclpy_pybind11 import InvalidHandle, RCLError
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.node import Node
from std_msgs.msg import String

from kpmatch_ros.ros.domain import domain_fault
from kpmatch_ros.ros.service_guard import survives
from kpmatch_ros.ros.start import shut_down, told_to_end
from kpmatch_ros.ros.transitions import explained
from node_harness import running_node

MATCHER = Path(get_package_prefix("kpmatch_ros"), "lib", "kpmatch_ros", "matcher")


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ({"extractor": "/no/such/weights"}, "/no/such/weights"),
        ({"publish_odometry": True}, "publish_odometry needs mode stereo"),
        ({"max_keypoints": 0}, "max_keypoints"),
    ],
)
def test_a_node_that_cannot_start_by_itself_ends_with_status_1(
    parameter: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with running_node(tmp_path, **parameter) as node:
        assert node.process.wait(timeout=120) == 1
        assert said in node.log and "Traceback" not in node.log


def test_a_start_that_ros_refuses_fails_before_pytorch_is_loaded() -> None:
    code = (
        "import os, sys; from kpmatch_ros.ros.main import main\n"
        "os.environ['ROS_DOMAIN_ID'] = '233'\n"
        "for words in ['max_keypoints:=512'], ['--ros-args', '--params-file', '/none.yaml'], []:\n"
        "    print(main(words), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.splitlines() == ["1 False"] * 3, done.stderr


@pytest.mark.parametrize(
    ("content", "said"), [(None, "Error opening YAML file"), ("matcher:\n  border: 5\n", "before ros__parameters")]
)
def test_a_parameter_file_that_ros_cannot_read_is_reported_by_name(
    content: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "robot.yaml"
    if content is not None:
        file.write_text(content)
    done = run_until_exit(monkeypatch, "--params-file", str(file))
    assert done.returncode == 1
    assert "matcher: ROS cannot start with these arguments: " in done.stderr
    assert str(file) in done.stderr and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["max_keypoints:=512"], 1, "--ros-args -p max_keypoints:=512"),
        (["--image", "/camera/image_raw"], 1, "--ros-args -r image:=TOPIC"),
        (["--help"], 0, "usage: matcher --ros-args"),
    ],
)
def test_arguments_before_ros_args_are_not_silently_ignored(words: list[str], status: int, said: str) -> None:
    done = subprocess.run([sys.executable, MATCHER, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == status
    assert said in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_a_node_that_cannot_write_logs_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_LOG_DIR", "/proc/log")  # a place where not even root can create a folder
    done = run_until_exit(monkeypatch)
    assert done.returncode == 1 and "with these arguments" not in done.stderr
    assert "/proc/log" in done.stderr and "set ROS_LOG_DIR to a folder that" in done.stderr


@pytest.mark.parametrize("domain", ["233", "4294967296"])
def test_a_domain_id_that_dds_does_not_support_is_reported_in_one_line(
    domain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fast DDS would end the process with its own text. Cyclone DDS adds a line of its own."""
    monkeypatch.setenv("ROS_DOMAIN_ID", domain)
    done = subprocess.run([sys.executable, MATCHER], capture_output=True, text=True, timeout=120)
    middleware = rclpy.get_rmw_implementation_identifier()
    lines = [line for line in done.stderr.splitlines(keepends=True) if "[rmw_" not in line]
    said = f"matcher: ROS_DOMAIN_ID is {domain}, but {middleware} has domains 0 to 232; set it to one of these\n"
    assert (done.returncode, lines) == (1, [said])


def test_a_middleware_without_dds_accepts_any_domain_id() -> None:
    assert domain_fault(233, "rmw_zenoh_cpp") == ""
    assert domain_fault(232, "rmw_cyclonedds_cpp") == "" != domain_fault(233, "rmw_cyclonedds_cpp")


def test_shutting_down_at_the_same_time_as_a_signal_raises_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def race(context: rclpy.Context) -> None:
        monkeypatch.undo()  # only once
        context.shutdown()  # as rclpy's signal thread does
        context.shutdown()

    with domain_id() as domain:
        context = rclpy.Context()
        rclpy.init(context=context, domain_id=domain)
        with pytest.raises(RuntimeError):  # RCLError in Jazzy
            race(context)
        monkeypatch.setattr(rclpy.Context, "try_shutdown", race)
        rclpy.init(domain_id=domain)
        try:
            shut_down()
            assert not rclpy.ok()
            rclpy.init(domain_id=domain)  # nothing is left over
        finally:
            rclpy.try_shutdown()


def test_a_shutdown_of_ros_that_follows_shortly_is_waited_for() -> None:
    with domain_id() as domain:
        rclpy.init(domain_id=domain)
        try:
            assert not told_to_end()
            heard = threading.Timer(0.3, rclpy.shutdown)
            heard.start()
            assert told_to_end()
            heard.join()
        finally:
            rclpy.try_shutdown()


def test_an_error_in_a_callback_is_reported_unless_ros_was_shut_down(capfd: pytest.CaptureFixture[str]) -> None:
    reported: list[Exception] = []
    with domain_id() as domain:
        context = rclpy.Context()
        rclpy.init(context=context, domain_id=domain)
        node = rclpy.create_node("matcher", context=context)
        try:
            publisher = node.create_publisher(String, "status", 10)
            survives(lambda: dict()["?"], node, reported.append)()
            assert "KeyError" in capfd.readouterr().err and len(reported) == 1
            rclpy.shutdown(context=context)
            with pytest.raises((RCLError, InvalidHandle)):  # Jazzy, Kilted
                publisher.publish(String())
            survives(lambda: publisher.publish(String()), node, reported.append)()
            assert capfd.readouterr().err == "" and len(reported) == 1
        finally:
            node.destroy_node()
            rclpy.try_shutdown(context=context)


def test_an_error_in_a_transition_is_reported_unless_ros_was_shut_down(capfd: pytest.CaptureFixture[str]) -> None:
    class Matcher(Node):
        fault = ""

        @explained
        def on_activate(self, publisher: Any) -> TransitionCallbackReturn:
            publisher.publish(String())
            raise KeyError("?")

    with domain_id() as domain:
        context = rclpy.Context()
        rclpy.init(context=context, domain_id=domain)
        node = Matcher("matcher", context=context)
        try:
            publisher = node.create_publisher(String, "status", 10)
            assert node.on_activate(publisher) == TransitionCallbackReturn.FAILURE
            assert "KeyError" in node.fault and "KeyError" in capfd.readouterr().err
            rclpy.shutdown(context=context)
            assert node.on_activate(publisher) == TransitionCallbackReturn.FAILURE
            assert node.fault == "" and capfd.readouterr().err == ""
        finally:
            node.destroy_node()
            rclpy.try_shutdown(context=context)


@pytest.mark.parametrize("while_loading", [True, False])
def test_ctrl_c_twice_during_startup_ends_the_node_without_a_traceback(while_loading: bool, tmp_path: Path) -> None:
    package = tmp_path / "kpmatch_ros"  # replaces the real one: the first Ctrl-C comes in it, the second at the end
    (package / "ros").mkdir(parents=True)
    again = "import atexit, os, signal\natexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
    stopped = "    raise KeyboardInterrupt\n"
    (package / "__init__.py").write_text("")
    (package / "process.py").write_text(
        f"{again}def configure_process():\n{stopped if while_loading else '    pass'}\n"
    )
    (package / "ros" / "__init__.py").write_text("")
    (package / "ros" / "main.py").write_text(f"def main():\n{stopped}")
    done = subprocess.run([sys.executable, MATCHER], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def run_until_exit(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the node's process with ROS arguments with which it cannot start."""
    with domain_id() as domain:
        monkeypatch.setenv("ROS_DOMAIN_ID", str(domain))
        return subprocess.run(
            [sys.executable, MATCHER, "--ros-args", *arguments], capture_output=True, text=True, timeout=120
        )
