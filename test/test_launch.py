"""What `ros2 launch kpmatch_ros matcher.launch.py` does with its arguments.

The launch file is performed for real. To see what the node is told, /bin/true runs in its place (launch's own
`launch-prefix`) and its command line is given to rclpy, which reads it as it does in the node.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("launch_ros", reason="launch comes with a ROS installation, not from PyPI")
rclpy = pytest.importorskip("rclpy")

import launch.logging  # noqa: E402
from ament_index_python.packages import get_package_share_directory  # noqa: E402
from domain_coordinator import domain_id  # noqa: E402
from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity, LaunchService  # noqa: E402
from launch.actions import (  # noqa: E402
    DeclareLaunchArgument,
    GroupAction,
    IncludeLaunchDescription,
    RegisterEventHandler,
)
from launch.event_handlers import OnProcessExit, OnProcessStart  # noqa: E402
from launch.launch_description_sources import (  # noqa: E402
    PythonLaunchDescriptionSource,
    get_launch_description_from_python_launch_file,
)
from launch_ros.actions import PushRosNamespace  # noqa: E402
from lifecycle_msgs.srv import GetState  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402

SHARE = Path(get_package_share_directory("kpmatch_ros"))
LAUNCH_FILE = str(SHARE / "launch" / "matcher.launch.py")


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A ROS domain of its own, and a folder for the logs and parameter files that launch writes and leaves."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("ROS_LOG_DIR", str(tmp_path))
    launch.logging.reset()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    with domain_id() as domain:
        monkeypatch.setenv("ROS_DOMAIN_ID", str(domain))
        yield


@pytest.fixture
def declared(apart: None) -> dict[str, DeclareLaunchArgument]:
    description = get_launch_description_from_python_launch_file(LAUNCH_FILE)
    return {argument.name: argument for argument in description.get_launch_arguments()}


def include(**arguments: str) -> IncludeLaunchDescription:
    return IncludeLaunchDescription(PythonLaunchDescriptionSource(LAUNCH_FILE), launch_arguments=arguments.items())


def run(*entities: LaunchDescriptionEntity) -> int:
    service = LaunchService(noninteractive=True)
    service.include_launch_description(LaunchDescription(list(entities)))
    return int(service.run())


class Told:
    """A node of the name that the launch file gives, as it comes out of the command line that it gives."""

    def __init__(self, *around: LaunchDescriptionEntity, **arguments: str) -> None:
        started: list[list[str]] = []
        note = OnProcessStart(on_start=lambda event, _context: started.append(event.cmd))
        group = GroupAction([*around, include(**arguments, **{"launch-prefix": "true"})])
        assert run(RegisterEventHandler(note), group) == 0
        ((_true, self.executable, *self.command_line),) = started
        context = rclpy.Context()
        rclpy.init(context=context)
        try:
            node = rclpy.create_node(
                "unnamed",
                context=context,
                cli_args=self.command_line,
                automatically_declare_parameters_from_overrides=True,
                start_parameter_services=False,
            )
            self.name = node.get_fully_qualified_name()
            self.parameters = {name: item.value for name, item in node.get_parameters_by_prefix("").items()}
            topics = [f"{camera}{topic}" for camera in ("", "left/", "right/") for topic in ("image", "camera_info")]
            self.topics = {topic: node.resolve_topic_name(topic) for topic in topics}
            node.destroy_node()
        finally:
            context.shutdown()


@pytest.fixture
def params_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("matcher:\n  ros__parameters:\n    device: cuda:1\n    queue: all\n    min_inliers: 31\n")
    return path


def test_the_arguments_are_those_of_the_readme(declared: dict[str, DeclareLaunchArgument]) -> None:
    topics = {"image", "camera_info", "left_image", "left_camera_info", "right_image", "right_camera_info"}
    parameters = {"mode", "image_transport", "rectified", "extractor", "matcher", "device", "precision", "queue"}
    ros = {"namespace", "params_file", "use_sim_time", "log_level", "autostart", "respawn"}
    assert set(declared) == topics | parameters | ros


def test_each_argument_is_described_and_has_a_default(declared: dict[str, DeclareLaunchArgument]) -> None:
    undescribed = {"no description given", ""}
    assert [name for name, argument in declared.items() if argument.description in undescribed] == []
    assert [name for name, argument in declared.items() if argument.default_value is None] == []


def test_a_value_that_is_no_choice_is_refused(declared: dict[str, DeclareLaunchArgument]) -> None:
    parameters = {"mode", "image_transport", "rectified", "precision", "queue", "autostart"}
    limited = [argument for argument in declared.values() if argument.choices]
    assert {argument.name for argument in limited} == parameters | {"use_sim_time", "log_level", "respawn"}
    for argument in limited:
        context = LaunchContext()
        context.launch_configurations[argument.name] = "nonsense"
        with pytest.raises(RuntimeError, match=f'"{argument.name}" provided value "nonsense" is not valid'):
            argument.execute(context)


def test_without_arguments_the_node_has_the_packaged_parameters_and_topics() -> None:
    told = Told()
    assert Path(told.executable).parts[-2:] == ("kpmatch_ros", "matcher")
    assert told.name == "/matcher"
    assert told.command_line.count("--params-file") == 1
    assert told.command_line[told.command_line.index("--params-file") + 1] == str(SHARE / "config" / "matcher.yaml")
    assert told.topics == {topic: f"/{topic}" for topic in told.topics}
    assert told.parameters["use_sim_time"] is False


def test_an_argument_that_is_not_given_leaves_the_parameter_file_alone(params_file: Path) -> None:
    parameters = Told(params_file=str(params_file)).parameters
    assert {name: parameters[name] for name in ("device", "queue", "min_inliers")} == {
        "device": "cuda:1",
        "queue": "all",
        "min_inliers": 31,
    }
    assert "mode" not in parameters and "autostart" not in parameters


@pytest.mark.parametrize("key", ["matcher", "/robot/matcher", "/**"])
def test_an_argument_that_is_given_overrides_the_parameter_file(params_file: Path, key: str) -> None:
    namespace = "robot" if key.startswith("/robot") else ""
    params_file.write_text(params_file.read_text().replace("matcher", key))
    parameters = Told(params_file=str(params_file), namespace=namespace, device="cpu").parameters
    assert {name: parameters[name] for name in ("device", "queue", "min_inliers")} == {
        "device": "cpu",
        "queue": "all",
        "min_inliers": 31,
    }


def test_every_parameter_reaches_the_node_with_its_type() -> None:
    given = {
        "mode": "stereo",
        "image_transport": "compressed",
        "extractor": "2024",
        "matcher": "nearest",
        "device": "cuda:1",
        "precision": "bfloat16",
        "queue": "all",
    }
    parameters = Told(**given, rectified="True", autostart="false", use_sim_time="true").parameters
    expected = {**given, "rectified": True, "autostart": False, "use_sim_time": True}
    assert {name: parameters[name] for name in expected} == expected


def test_topics_are_remapped_and_camera_info_stays_beside_its_image() -> None:
    told = Told(image="/front/image_raw", left_image="l/image_rect", right_image="r", right_camera_info="/right/info")
    assert told.topics == {
        "image": "/front/image_raw",
        "camera_info": "/front/camera_info",
        "left/image": "/l/image_rect",
        "left/camera_info": "/l/camera_info",
        "right/image": "/r",
        "right/camera_info": "/right/info",
    }


def test_the_namespace_holds_the_node_its_topics_and_its_logger() -> None:
    told = Told(PushRosNamespace("fleet"), namespace="robot1", image="/front/image_raw", log_level="debug")
    assert told.name == "/fleet/robot1/matcher"
    assert told.topics["image"] == "/front/image_raw"
    assert told.topics["left/image"] == "/fleet/robot1/left/image"
    assert told.command_line[told.command_line.index("--log-level") + 1] == "fleet.robot1.matcher:=debug"


def test_a_parameter_file_in_the_home_folder_is_found(params_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(params_file.parent))
    assert Told(params_file=f"~/{params_file.name}").parameters["min_inliers"] == 31


def test_a_missing_parameter_file_stops_the_launch(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(include(**{"params_file": "/no/such.yaml", "launch-prefix": "true"})) == 1
    output = capsys.readouterr().out
    assert "there is no file /no/such.yaml" in output
    assert "process started" not in output


@pytest.mark.parametrize(
    "section", ["/**", "robot/matcher", "/robot/matcher", "/*/matcher", "/**/matcher", "robot:\n matcher"]
)
def test_a_parameter_file_for_this_node_is_taken(
    params_file: Path, section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    params_file.write_text(f"{section}: {{ros__parameters: {{min_inliers: 31}}}}\n")
    assert Told(params_file=str(params_file), namespace="robot").parameters["min_inliers"] == 31
    assert "nothing in it applies" not in capsys.readouterr().out


@pytest.mark.parametrize("section", ["matcher", "/*", "/robot/match", "/robot/matcher/**/x"])
def test_a_parameter_file_for_other_nodes_is_reported(
    params_file: Path, section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    params_file.write_text(f"{section}: {{ros__parameters: {{min_inliers: 31}}}}\n")
    assert "min_inliers" not in Told(params_file=str(params_file), namespace="robot").parameters
    assert "has no section for /robot/matcher, so nothing in it applies" in capsys.readouterr().out


def test_the_launch_file_is_read_without_loading_torch(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({LAUNCH_FILE!r})['generate_launch_description']()\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def wait_for_state(node_name: str, label: str, ended: threading.Event) -> str:
    """The node's lifecycle state once it is `label`, or the last one seen before the process ended."""
    context = rclpy.Context()
    rclpy.init(context=context)
    seen = "no node"
    try:
        node = rclpy.create_node("observer", context=context)
        executor = SingleThreadedExecutor(context=context)
        client = node.create_client(GetState, f"{node_name}/get_state")
        deadline = time.monotonic() + 120.0
        while seen != label and not ended.is_set() and time.monotonic() < deadline:
            if client.wait_for_service(timeout_sec=0.5):
                answer = client.call_async(GetState.Request())
                rclpy.spin_until_future_complete(node, answer, executor, timeout_sec=1.0)
                if answer.done():
                    seen = answer.result().current_state.label
        node.destroy_node()
    finally:
        context.shutdown()
    return seen


def test_the_launched_node_becomes_active_and_ends_cleanly() -> None:
    service = LaunchService(noninteractive=True)
    namespace = f"test_{uuid.uuid4().hex[:12]}"  # no other node on the machine answers for this one
    exit_codes: list[int] = []
    ended = threading.Event()
    note = OnProcessExit(on_exit=lambda event, _context: exit_codes.append(event.returncode))
    actions = [RegisterEventHandler(note), include(namespace=namespace, device="cpu")]
    service.include_launch_description(LaunchDescription(actions))

    def watch() -> str:
        try:
            return wait_for_state(f"/{namespace}/matcher", "active", ended)
        finally:
            service.shutdown()

    with ThreadPoolExecutor() as pool:
        state = pool.submit(watch)
        return_code = service.run()
        ended.set()
    assert state.result() == "active"
    assert (return_code, exit_codes) == (0, [0])
