"""Tests of `ros2 launch kpmatch_ros matcher.launch.py` and its arguments.

The launch file is really run, see launch_harness.py.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("launch_ros", reason="launch comes with a ROS installation, not from PyPI")
rclpy = pytest.importorskip("rclpy")

from ament_index_python.packages import PackageNotFoundError, get_package_share_directory  # noqa: E402
from launch import LaunchContext, LaunchDescription, LaunchService  # noqa: E402
from launch.actions import DeclareLaunchArgument, ExecuteLocal, RegisterEventHandler  # noqa: E402
from launch.event_handlers import OnProcessExit, OnProcessStart  # noqa: E402
from launch.launch_description_sources import get_launch_description_from_python_launch_file  # noqa: E402
from launch_harness import SHARE, LaunchedNode, include, isolated_launch, launched, run  # noqa: E402, F401  (a fixture)
from launch_ros.actions import PushRosNamespace, SetParameter, SetParametersFromFile  # noqa: E402
from lifecycle_msgs.srv import GetState  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402

from kpmatch_ros.parameters import declarations  # noqa: E402

LAUNCH_FILE = str(SHARE / "launch" / "matcher.launch.py")


@pytest.fixture
def declared() -> dict[str, DeclareLaunchArgument]:
    description = get_launch_description_from_python_launch_file(LAUNCH_FILE)
    return {argument.name: argument for argument in description.get_launch_arguments()}


@pytest.fixture
def params_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("matcher:\n  ros__parameters:\n    device: cuda:1\n    queue: all\n    min_inliers: 31\n")
    return path


def test_the_arguments_are_all_parameters_topics_and_launch_options(
    declared: dict[str, DeclareLaunchArgument],
) -> None:
    topics = {f"{side}{topic}" for side in ("", "left_", "right_") for topic in ("image", "camera_info", "mask_topic")}
    ros = {
        "namespace",
        "params_file",
        "use_sim_time",
        "log_level",
        "respawn",
        "respawn_max_retries",
        "required",
        "rviz",
    }
    assert set(declared) == topics | {item.name for item in declarations()} | ros


def test_each_argument_is_described_and_has_a_default(declared: dict[str, DeclareLaunchArgument]) -> None:
    undescribed = {"no description given", ""}
    assert [name for name, argument in declared.items() if argument.description in undescribed] == []
    assert [name for name, argument in declared.items() if argument.default_value is None] == []


def test_a_value_outside_the_choices_is_refused(declared: dict[str, DeclareLaunchArgument]) -> None:
    parameters = {item.name for item in declarations() if item.choices or item.type is bool}
    limited = [argument for argument in declared.values() if argument.choices]
    launchs = {"use_sim_time", "log_level", "respawn", "required", "rviz"}
    assert {argument.name for argument in limited} == parameters | launchs
    for argument in limited:
        context = LaunchContext()
        context.launch_configurations[argument.name] = "nonsense"
        with pytest.raises(RuntimeError, match=f'"{argument.name}" provided value "nonsense" is not valid'):
            argument.execute(context)


def test_without_arguments_the_node_has_the_packaged_parameters_and_topics() -> None:
    node = LaunchedNode()
    assert Path(node.executable).parts[-2:] == ("kpmatch_ros", "matcher")
    assert node.name == "/matcher"
    assert node.command_line.count("--params-file") == 1
    assert node.command_line[node.command_line.index("--params-file") + 1] == str(SHARE / "config" / "matcher.yaml")
    assert node.topics == {topic: f"/{topic}" for topic in node.topics}
    assert node.parameters["use_sim_time"] is False


def test_an_argument_that_is_not_given_does_not_override_the_parameter_file(params_file: Path) -> None:
    parameters = LaunchedNode(params_file=str(params_file)).parameters
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
    parameters = LaunchedNode(params_file=str(params_file), namespace=namespace, device="cpu").parameters
    assert {name: parameters[name] for name in ("device", "queue", "min_inliers")} == {
        "device": "cpu",
        "queue": "all",
        "min_inliers": 31,
    }


@pytest.mark.parametrize("before", ["/robot/matcher", "robot/matcher", "/**", "/robot/*"])
@pytest.mark.parametrize("last", ["/**", "/robot/matcher", "/robot:\n  matcher"])
def test_an_argument_overrides_every_section_of_the_parameter_file(params_file: Path, before: str, last: str) -> None:
    """ROS merges the sections of all files. The last section wins, and that may be the parameter file's."""
    values = "{device: 'cuda:1', use_sim_time: false, qos_overrides: {/image: {subscription: {depth: 7}}}}"
    params_file.write_text(
        f"{before}: {{ros__parameters: {{queue: all}}}}\n/other: {{ros__parameters: {{x: 1}}}}\n"
        f"{last}: {{ros__parameters: {values}}}\n"
    )
    parameters = LaunchedNode(
        params_file=str(params_file), namespace="robot", device="cpu", use_sim_time="true"
    ).parameters
    expected = {"device": "cpu", "queue": "all", "use_sim_time": True, "qos_overrides./image.subscription.depth": 7}
    assert {name: parameters.get(name) for name in expected} == expected


@pytest.mark.parametrize("text", ["1", "1e5", "y", "0x10", "été", "🤖"])
def test_a_string_stays_a_string_even_if_it_looks_like_a_number_or_boolean(text: str) -> None:
    assert LaunchedNode(extractor=text).parameters["extractor"] == text


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
    numbers = {"max_keypoints": 512, "max_gap": 2.0, "width_confidence": -1.0}
    texts = {"max_keypoints": "512", "max_gap": "2", "width_confidence": "-1"}
    parameters = LaunchedNode(**given, **texts, rectified="True", autostart="false", use_sim_time="true").parameters
    expected = {**given, **numbers, "rectified": True, "autostart": False, "use_sim_time": True}
    assert {name: type(parameters[name]) for name in numbers} == {name: type(value) for name, value in numbers.items()}
    assert {name: parameters[name] for name in expected} == expected


def test_topics_are_remapped_and_camera_info_stays_beside_its_image() -> None:
    node = LaunchedNode(
        image="/front/image_raw",
        left_image="l/image_rect",
        right_image="r",
        right_camera_info="/right/info",
        left_mask_topic="/body",
    )
    assert node.topics == {
        "image": "/front/image_raw",
        "camera_info": "/front/camera_info",
        "mask": "/front/mask",
        "left/image": "/l/image_rect",
        "left/camera_info": "/l/camera_info",
        "left/mask": "/body",
        "right/image": "/r",
        "right/camera_info": "/right/info",
        "right/mask": "/mask",
    }


def test_the_namespace_applies_to_the_node_its_topics_and_its_logger() -> None:
    node = LaunchedNode(PushRosNamespace("fleet"), namespace="robot1", image="/front/image_raw", log_level="debug")
    assert node.name == "/fleet/robot1/matcher"
    assert node.topics["image"] == "/front/image_raw"
    assert node.topics["left/image"] == "/fleet/robot1/left/image"
    assert node.command_line[node.command_line.index("--log-level") + 1] == "fleet.robot1.matcher:=debug"


def test_a_parameter_file_in_the_home_folder_is_found(params_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(params_file.parent))
    assert LaunchedNode(params_file=f"~/{params_file.name}").parameters["min_inliers"] == 31


def test_a_missing_parameter_file_stops_the_launch(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(include(**{"params_file": "/no/such.yaml", "launch-prefix": "true"})) == 1
    output = capsys.readouterr().out
    assert "there is no file /no/such.yaml" in output
    assert "process started" not in output


@pytest.mark.parametrize("content", ["a: [", "a: &a [*a]", "\xff"])
def test_a_parameter_file_that_is_not_yaml_is_named(params_file: Path, content: str) -> None:
    params_file.write_text(content, encoding="latin-1")
    status, log = launched(f"params_file:={params_file}")
    assert status == 1 and f"params_file: {params_file}: is n" in log


@pytest.mark.parametrize(
    "section", ["/**", "robot/matcher", "/robot/matcher", "/*/matcher", "/**/matcher", "robot:\n matcher"]
)
def test_a_parameter_file_for_this_node_is_used(
    params_file: Path, section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    params_file.write_text(f"{section}: {{ros__parameters: {{min_inliers: 31}}}}\n")
    assert LaunchedNode(params_file=str(params_file), namespace="robot").parameters["min_inliers"] == 31
    assert "nothing in it applies" not in capsys.readouterr().out


@pytest.mark.parametrize("section", ["matcher", "/*", "/robot/match", "/robot/matcher/**/x"])
def test_a_parameter_file_for_other_nodes_is_reported(
    params_file: Path, section: str, capsys: pytest.CaptureFixture[str]
) -> None:
    params_file.write_text(f"{section}: {{ros__parameters: {{min_inliers: 31}}}}\n")
    assert "min_inliers" not in LaunchedNode(params_file=str(params_file), namespace="robot").parameters
    assert "has no section for /robot/matcher, so nothing in it applies" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("max_keypoint:=512", "has no argument max_keypoint, did you mean max_keypoints?"),
        ("min-inliers:=20", "has no argument min-inliers, did you mean min_inliers?"),
        ("colour:=red", "has no argument colour."),
        ("max_keypoints:=many", "max_keypoints is 'many'; it must be a whole number"),
        ("max_keypoints:=0", "max_keypoints is 0; it must be 1 to 16384"),
        ("max_gap:=long", "max_gap is 'long'; it must be a number"),
        ("device:=gpu", "device is 'gpu'"),
        ("respawn_max_retries:=abc", "respawn_max_retries is 'abc'; it must be a whole number"),
        ("rviz:=true", "rviz2 is not installed"),
    ],
)
def test_an_invalid_argument_is_named_and_stops_the_launch(word: str, said: str) -> None:
    if word.startswith("rviz") and find_package("rviz2"):
        pytest.skip("rviz2 is installed")
    status, log = launched(word)
    assert status == 1 and said in log
    assert "process started" not in log


def find_package(name: str) -> bool:
    try:
        get_package_share_directory(name)
    except PackageNotFoundError:
        return False
    return True


def test_unknown_arguments_of_an_including_launch_file_are_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    assert LaunchedNode(robot="r2d2", max_keypoint="512", device="cpu").parameters["device"] == "cpu"
    output = capsys.readouterr().out
    assert "has no argument max_keypoint, did you mean max_keypoints?" in output
    assert "robot" not in output


@pytest.mark.parametrize("name", ["matcher.launch.py", "two_cameras.launch.py"])
def test_an_including_launch_file_of_the_same_name_may_have_other_arguments(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(
        "from launch import LaunchDescription as Description\n"
        "from launch.actions import IncludeLaunchDescription as Include\n"
        f"def generate_launch_description(): return Description([Include({LAUNCH_FILE!r})])\n"
    )
    status, log = launched("robot:=r2d2", "launch-prefix:=true", file=str(tmp_path / name))
    assert status == 0 and "process started" in log


def test_the_launch_file_may_be_given_by_its_path() -> None:
    status, log = launched("colour:=red", file=LAUNCH_FILE)
    assert status == 1 and "matcher.launch.py has no argument colour." in log


def test_parameters_of_an_including_launch_file_override_the_packaged_defaults(tmp_path: Path) -> None:
    (tmp_path / "robot.yaml").write_text(
        "/**: {ros__parameters: {min_inliers: 31}}\nlidar: {ros__parameters: {a: 1}}\n"
    )
    around = {"refine": False, "max_gap": 2, "max_keypoints": 77, "robot_radius": 0.3}
    file = SetParametersFromFile(str(tmp_path / "robot.yaml"))
    node = LaunchedNode(file, *(SetParameter(name, value) for name, value in around.items()), max_keypoints="512")
    expected = {"refine": False, "max_gap": 2.0, "max_keypoints": 512, "min_inliers": 31}
    assert {name: node.parameters[name] for name in expected} == expected


def test_mode_and_transport_of_an_including_launch_file_apply_to_the_topics() -> None:
    stereo = LaunchedNode(SetParameter("mode", "stereo"), left_image=LEFT, right_image="/right/image_raw/compressed")
    assert (stereo.parameters["mode"], stereo.parameters["image_transport"]) == ("stereo", "compressed")
    assert stereo.topics["left/image"] == "/left/image_raw" and stereo.topics["right/image"] == "/right/image_raw"
    mono = LaunchedNode(SetParameter("image_transport", "compressed"), image="/front/image_raw")
    assert (mono.parameters["image_transport"], mono.topics["image"]) == ("compressed", "/front/image_raw")


def test_a_parameter_file_overrides_an_including_launch_file_with_a_message(
    params_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    around = {"device": "cpu", "min_inliers": 40, "queue": "all", "max_gap": 2.0}
    parameters = LaunchedNode(
        *(SetParameter(name, value) for name, value in around.items()), params_file=str(params_file), min_inliers="50"
    ).parameters
    expected = {"device": "cuda:1", "min_inliers": 50, "queue": "all", "max_gap": 2.0}
    assert {name: parameters[name] for name in expected} == expected
    assert (
        f"{params_file} sets device, and so does SetParameter in an including launch file: the file takes precedence"
        in capsys.readouterr().out
    )


def test_an_invalid_value_of_an_including_launch_file_stops_the_launch(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(SetParameter("max_keypoints", 0), include(**{"launch-prefix": "true"})) == 1
    assert "SetParameter: max_keypoints is 0; it must be 1 to 16384" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["max_keypoint", "frobnicate"])
def test_an_unknown_key_in_the_nodes_own_section_stops_the_launch(params_file: Path, key: str) -> None:
    params_file.write_text(f"matcher: {{ros__parameters: {{{key}: 512}}}}\n")
    status, log = launched(f"params_file:={params_file}")
    assert status == 1 and f"/matcher has {key}, which is not a parameter of the matcher" in log


def test_a_section_for_all_nodes_may_contain_parameters_of_other_nodes(
    params_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params_file.write_text("/**: {ros__parameters: {max_keypoint: 512, frobnicate: 1, min_inliers: 31}}\n")
    assert LaunchedNode(params_file=str(params_file)).parameters["min_inliers"] == 31
    output = capsys.readouterr().out
    assert "has max_keypoint, which is not a parameter of the matcher, did you mean max_keypoints?" in output
    assert "frobnicate" not in output


def test_a_compressed_topic_sets_the_image_transport() -> None:
    node = LaunchedNode(image="/front/image_raw/compressed")
    assert node.topics["image"] == "/front/image_raw" and node.topics["camera_info"] == "/front/camera_info"
    assert node.parameters["image_transport"] == "compressed"


def test_a_compressed_topic_with_raw_transport_is_refused() -> None:
    status, log = launched("image:=/front/image_raw/compressed", "image_transport:=raw")
    assert status == 1 and "image_transport:=raw cannot read it" in log


LEFT = "/left/image_raw/compressed"


@pytest.mark.parametrize(
    ("words", "sections"),
    [
        ({"left_image": LEFT}, "{}"),
        ({"left_image": LEFT, "image_transport": "raw"}, "{}"),
        ({"left_image": LEFT, "right_image": LEFT, "mode": "mono"}, "{/**: {ros__parameters: {mode: stereo}}}"),
        ({"image": LEFT}, "{/**: {ros__parameters: {mode: stereo}}}"),
        ({"image": LEFT, "mode": "stereo", "image_transport": "raw"}, "{/**: {ros__parameters: {mode: mono}}}"),
        ({"image": LEFT}, "{/**: {ros__parameters: {mode: mono}}, matcher: {ros__parameters: {mode: stereo}}}"),
    ],
)
def test_a_topic_that_the_mode_does_not_use_sets_no_transport(
    params_file: Path, words: dict[str, str], sections: str
) -> None:
    params_file.write_text(sections)
    parameters = LaunchedNode(params_file=str(params_file), **words).parameters
    assert parameters.get("image_transport") == words.get("image_transport")


def test_compressed_topics_set_the_transport_with_the_mode_of_the_parameter_file(params_file: Path) -> None:
    params_file.write_text("/**: {ros__parameters: {mode: stereo}}\n")
    node = LaunchedNode(params_file=str(params_file), left_image=LEFT, right_image="/right/image_raw/compressed")
    assert node.parameters["image_transport"] == "compressed"
    assert node.topics["left/image"] == "/left/image_raw" and node.topics["right/image"] == "/right/image_raw"


def test_one_compressed_topic_of_a_pair_stops_the_launch() -> None:
    status, log = launched("mode:=stereo", f"left_image:={LEFT}")
    assert status == 1 and "give both cameras' topics with /compressed, or neither" in log


def test_topics_may_begin_with_a_tilde() -> None:
    node = LaunchedNode(image="~/image", namespace="robot")
    assert (node.topics["image"], node.topics["camera_info"]) == ("/robot/matcher/image", "/robot/matcher/camera_info")


def exit_status(*words: str) -> tuple[int, int]:
    """Launch with weights that do not exist, and return the exit status and how often the node was started."""
    starts: list[object] = []
    note = OnProcessStart(on_start=lambda event, _context: starts.append(event))
    arguments = dict(word.split(":=") for word in ("extractor:=/no/such/weights", "device:=cpu", *words))
    return run(RegisterEventHandler(note), include(**arguments)), len(starts)


@pytest.mark.parametrize(("required", "status"), [("true", 1), ("false", 0)])
def test_the_exit_status_of_the_launch_reports_a_required_node_that_failed(required: str, status: int) -> None:
    assert exit_status(f"required:={required}") == (status, 1)


def test_a_respawned_node_ends_the_launch_after_its_last_retry() -> None:
    if not has_retries():
        pytest.skip("this launch has no limit of retries")
    assert exit_status("required:=true", "respawn:=true", "respawn_max_retries:=1") == (1, 2)


def test_a_limit_of_retries_is_refused_if_launch_has_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if has_retries():  # as in Humble

        def without(self: ExecuteLocal, *, respawn: bool = False, respawn_delay: float | None = None) -> None:
            pass

        monkeypatch.setattr(ExecuteLocal, "__init__", without)
    assert exit_status("respawn:=true", "respawn_max_retries:=1") == (1, 0)
    assert "without a limit; leave it out" in "".join(capsys.readouterr())


def has_retries() -> bool:
    return "respawn_max_retries" in inspect.signature(ExecuteLocal.__init__).parameters


def test_the_launch_file_does_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({LAUNCH_FILE!r})['generate_launch_description']()\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def wait_for_state(node_name: str, label: str, ended: threading.Event) -> str:
    """Return the node's lifecycle state once it is `label`, or the last state before the process ended."""
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
    namespace = f"test_{uuid.uuid4().hex[:12]}"  # so that no other node on the machine answers
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
