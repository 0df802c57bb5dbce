"""Shared fixtures: recorded data, textured images, and random weights that behave like trained weights."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The test workers share the cores. Waiting threads spin, and would take another worker's core.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Messages check the values assigned to their fields, as they always do in ROS 2 Humble.
os.environ.setdefault("ROS_PYTHON_CHECK_FIELDS", "1")

import cv2
import numpy as np
import psutil
import pytest
import torch
from half_products import fast_products
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kpmatch_ros import weights
from kpmatch_ros.geometry import compiled
from kpmatch_ros.models import LightGlue, SuperGlue, SuperPoint

Texture = Callable[[int, int, int], NDArray[np.uint8]]
Randomise = Callable[[nn.Module, int], None]
SaveFolder = Callable[..., Path]
RecordDifference = Callable[[str, float], None]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Background jobs of a shell ignore SIGINT. Processes that a test starts and interrupts would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # small networks gain nothing from more threads, and lose a lot if the cores are shared

_DIFFERENCE = "largest difference: "

# The slowest test files, from about two minutes down to a quarter of a minute. They run first: a worker takes a whole
# file (pyproject.toml), so a slow file at the end would keep one worker busy while the others are idle.
_LONGEST = [
    *("replay", "endurance", "node", "stereo_node", "gpu", "training", "stereo_sequence", "project", "precision"),
    *("bag_command", "bag_command_stereo", "stereo_slam", "base_frame", "archive", "mutations", "estimators", "fuzz"),
    *("lightglue_parity", "aliked", "bench", "cpp_front_end", "match_service", "round_up", "network", "demo", "launch"),
]


def pytest_xdist_auto_num_workers() -> int:
    """One worker per core that has 2 GB of memory, but at least three: nodes wait for half of their time."""
    return max(3, min(len(os.sched_getaffinity(0)), psutil.virtual_memory().available // 2_000_000_000))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="module")
def fast_half_products() -> Iterator[None]:
    """Makes products in half precision fast on a processor without instructions for them (half_products.py)."""
    with fast_products():
        yield


@pytest.fixture(scope="session")
def recorded_data() -> Path:
    """The folder of recorded bags and image pairs, from KPMATCH_DATA. Without this variable the tests are skipped."""
    folder = os.environ.get("KPMATCH_DATA")
    if not folder:
        pytest.skip("there is no recorded data: KPMATCH_DATA names its folder")
    assert Path(folder).is_dir(), f"KPMATCH_DATA names {folder}, which is no folder"
    return Path(folder)


@pytest.fixture(scope="module", params=["compiled", "NumPy"])
def geometry(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs every test of a file twice: with the compiled part of the geometry, and with NumPy."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "NumPy":
            patch.setattr(compiled, "available", lambda: False)
        elif not compiled.available():
            pytest.skip("the compiled part is not built")
        yield


@pytest.fixture
def kpmatch(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """kpmatch(words...) runs the command and returns exit status, stdout and stderr."""

    from kpmatch_ros.cli import main  # needs the bag libraries, which may be missing on a machine for GPU tests

    def run(*words: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture(scope="session")
def texture() -> Texture:
    """texture(height, width, seed) returns a uint8 grey image with structure at several scales everywhere."""

    def make(height: int, width: int, seed: int) -> NDArray[np.uint8]:
        random = np.random.default_rng(seed)
        image = np.zeros((height, width))
        for scale in (2, 5, 13):
            noise = random.normal(size=(max(height // scale, 2), max(width // scale, 2)))
            image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        image = (image - image.min()) / (image.max() - image.min())
        return (255 * image).round().astype(np.uint8)

    return make


@pytest.fixture(scope="session")
def views(texture: Texture) -> list[NDArray[np.uint8]]:
    """Twelve small images of a moving textured plane."""
    wide = texture(150, 240, 5)
    return [np.ascontiguousarray(wide[i : i + 120, 4 * i : 4 * i + 160]) for i in range(12)]


@pytest.fixture(scope="session")
def walk() -> list[NDArray[np.uint8]]:
    """The sequence of RGB images of the demo bag, 320 x 240."""
    from kpmatch_ros.bags.demo import demo_frames  # needs the bag libraries, too

    return [cv2.resize(frame.image, (320, 240), interpolation=cv2.INTER_AREA) for frame in demo_frames(12)]


@pytest.fixture(scope="module")
def warped(texture: Texture) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float64]]:
    """Two images, and the homography that maps the first to the second."""
    homography = np.array([[0.97, 0.05, 6.0], [-0.04, 0.98, 9.0], [8e-5, -4e-5, 1.0]])
    picture = cv2.GaussianBlur(texture(180, 240, 3), (0, 0), 1)
    return picture, cv2.warpPerspective(picture, homography, (240, 180)), homography


@pytest.fixture(scope="module")
def pictures(texture: Texture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three views of a texture, and a file that is not a picture."""
    folder = tmp_path_factory.mktemp("pictures")
    wide = texture(100, 140, 5)
    for i in range(3):
        cv2.imwrite(str(folder / f"{i}.png"), wide[4 * i : 4 * i + 80, 6 * i : 6 * i + 96])
    (folder / "notes.txt").write_text("none")
    return folder


@pytest.fixture(scope="session")
def picture(texture: Texture) -> Callable[..., Tensor]:
    """picture(height, width, seed=0) returns a colourful (3, H, W) image in [0, 1]."""

    def make(height: int, width: int, seed: int = 0) -> Tensor:
        channels = [texture(height, width, 10 * seed + i) for i in range(3)]
        return torch.from_numpy(np.stack(channels)).float() / 255

    return make


@pytest.fixture(scope="session")
def fetched() -> Callable[[str], Path]:
    """fetched(name) returns the file of registered weights, downloaded if necessary, or skips the test on failure."""

    def fetch(name: str) -> Path:
        try:
            return weights.fetch(name)
        except weights.WeightsError as error:
            pytest.skip(str(error))

    return fetch


@pytest.fixture(scope="session")
def randomise_superpoint(texture: Texture) -> Randomise:
    """randomise_superpoint(model, seed) sets random weights with varied scores and distinctive descriptors.

    Plain random weights give flat scores and nearly equal descriptors. So every convolution is scaled such that its
    outputs on a textured image have mean 0 and a given spread in each channel, as with batch normalisation.
    """

    def randomise(model: nn.Module, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        hooks: list[RemovableHandle] = []

        def normalise(spread: float) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
            def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                mean, scale = output.mean((0, 2, 3)), output.std((0, 2, 3)) / spread
                module.weight.data /= scale[:, None, None, None]
                module.bias.data.copy_((module.bias - mean) / scale)
                return (output - mean[:, None, None]) / scale[:, None, None]

            return hook

        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data.copy_(torch.randn(module.weight.shape, generator=generator))
                spread = 3.0 if name.endswith("conv_score_b") else 1.0
                hooks.append(module.register_forward_hook(normalise(spread)))
        image = torch.from_numpy(texture(96, 128, seed)).float()[None, None] / 255
        with torch.no_grad():
            features: Any = model.get_submodule("encoder")(image)
            features = getattr(features, "last_hidden_state", features)
            for head in ("keypoint_decoder.conv_score_", "descriptor_decoder.conv_descriptor_"):
                hidden = model.get_submodule(head + "a")(features).relu()
                model.get_submodule(head + "b")(hidden)
        for handle in hooks:
            handle.remove()

    return randomise


@pytest.fixture(scope="session")
def randomise_lightglue() -> Randomise:
    """randomise_lightglue(model, seed) sets random weights that match similar descriptors.

    Attention is peaked, so that errors in it are visible. Confidence grows from layer to layer, so that early stopping
    occurs after a few layers. Matchability differs between points, so that some points are pruned.
    """
    spreads = {
        "projector": lambda fan: 1.0,
        "input_projection": lambda fan: 1 / math.sqrt(fan),
        "q_proj": lambda fan: 1.2,
        "k_proj": lambda fan: 1.2,
        "v_proj": lambda fan: 1 / math.sqrt(fan),
        "o_proj": lambda fan: 1 / math.sqrt(fan),
        "fc1": lambda fan: 1 / math.sqrt(fan),
        "fc2": lambda fan: 0.2 / fan,  # small changes of the states per layer, otherwise matches would be random
        "final_projection": lambda fan: 24 / math.sqrt(fan),
        "matchability": lambda fan: 3.0,
        "token": lambda fan: 3.0,
    }

    def randomise(model: nn.Module, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if name.startswith("keypoint_detector."):
                continue
            layer = re.search(r"\.(\d+)\.", name)
            module, kind = name.rsplit(".", 2)[-2:]
            mean = 0.0
            if module == "layer_norm":
                spread, mean = 0.2, float(kind == "weight")
            elif kind == "weight":
                spread = spreads[module](parameter.shape[-1])
            elif module == "token" and layer is not None:
                spread, mean = 0.0, 2.0 * int(layer[1]) - 3.0
            elif module == "matchability":
                spread, mean = 0.0, 1.0
            else:
                spread = 0.01
            parameter.data.copy_(mean + spread * torch.randn(parameter.shape, generator=generator))

    return randomise


@pytest.fixture(scope="session")
def randomise_superglue() -> Randomise:
    """randomise_superglue(model, seed) sets random weights: similar descriptors match, and every layer matters."""

    def randomise(model: nn.Module, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(tensor: Tensor, spread: float) -> None:
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * spread)

        for name, module in model.named_modules():
            if name.startswith("keypoint_detector"):
                continue
            if isinstance(module, nn.BatchNorm1d):
                assert module.running_mean is not None and module.running_var is not None
                normal(module.running_mean, 0.3)
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
                normal(module.weight, 0.2)
                module.weight.data += 1
                normal(module.bias, 0.1)
            if isinstance(module, nn.Linear):
                size = module.in_features
                last = re.search(r"(encoder|mlp)\.\d+$", name) is not None  # last layer of a perceptron: small weights
                normal(module.weight, (0.15 if last else 1.0) / math.sqrt(size))
                normal(module.bias, 0.02 if last else 0.1)
            if name.endswith("final_proj"):
                rotation = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
                module.weight.data.copy_(rotation * math.sqrt(10 * math.sqrt(size)))
                module.bias.data.zero_()
        model.bin_score.data.fill_(2.0)  # type: ignore[union-attr,operator]

    return randomise


SMALL_SUPERPOINT: dict[str, Any] = {
    "encoder_hidden_sizes": [16, 16, 32, 32],
    "decoder_hidden_size": 32,
    "descriptor_decoder_dim": 64,
    "keypoint_threshold": 0.1,
    "max_keypoints": -1,
    "border_removal_distance": 0,
}
SMALL_LIGHTGLUE: dict[str, Any] = {"descriptor_dim": 64, "num_hidden_layers": 5, "num_attention_heads": 4}
SMALL_SUPERGLUE: dict[str, Any] = {
    "hidden_size": 64,
    "keypoint_encoder_sizes": [16, 32],
    "gnn_layers_types": ["self", "cross", "self", "cross"],
}


@pytest.fixture(scope="session")
def small_superpoint() -> dict[str, Any]:
    """The configuration of a small, fast SuperPoint with the usual structure."""
    return dict(SMALL_SUPERPOINT)


@pytest.fixture(scope="session")
def small_lightglue() -> dict[str, Any]:
    """The configuration of a LightGlue for the descriptors of small_superpoint."""
    return dict(SMALL_LIGHTGLUE)


@pytest.fixture(scope="session")
def small_superglue() -> dict[str, Any]:
    """The configuration of a SuperGlue for the descriptors of small_superpoint."""
    return dict(SMALL_SUPERGLUE)


@pytest.fixture(scope="session")
def random_folder(
    tmp_path_factory: pytest.TempPathFactory,
    randomise_superpoint: Randomise,
    randomise_lightglue: Randomise,
    randomise_superglue: Randomise,
) -> SaveFolder:
    """random_folder(seed=0, superpoint={}, lightglue={}, superglue=None) makes a folder with matcher and detector.

    The matcher is a SuperGlue if its configuration is given, otherwise a LightGlue.
    """

    def save(
        seed: int = 0,
        superpoint: dict[str, Any] | None = None,
        lightglue: dict[str, Any] | None = None,
        superglue: dict[str, Any] | None = None,
    ) -> Path:
        detector_config = {**SMALL_SUPERPOINT, **(superpoint or {})}
        detector = SuperPoint(**detector_config)
        randomise_superpoint(detector, seed)
        matcher: LightGlue | SuperGlue
        if superglue is None:
            config = {**SMALL_LIGHTGLUE, **(lightglue or {})}
            matcher = LightGlue(input_dim=detector.descriptor_size, **config)
            randomise_lightglue(matcher, seed)
        else:
            config = {**SMALL_SUPERGLUE, **superglue}
            matcher = SuperGlue(**config)
            randomise_superglue(matcher, seed)
        tensors = {f"keypoint_detector.{name}": tensor for name, tensor in detector.state_dict().items()}
        folder = tmp_path_factory.mktemp("weights")
        save_file({**tensors, **matcher.state_dict()}, folder / "model.safetensors")
        detector_config["model_type"] = "superpoint"
        config.update(model_type=matcher.MODEL_TYPE, keypoint_detector_config=detector_config)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return save


@pytest.fixture(scope="session")
def lightglue(small_lightglue: dict[str, Any], randomise_lightglue: Randomise) -> Callable[..., LightGlue]:
    """lightglue(seed=0, **config) returns a small LightGlue with random weights."""

    def make(seed: int = 0, **config: Any) -> LightGlue:
        model = LightGlue(**{**small_lightglue, "input_dim": 64, **config})
        randomise_lightglue(model, seed)
        return model

    return make


@pytest.fixture(scope="session")
def superglue(small_superglue: dict[str, Any], randomise_superglue: Randomise) -> Callable[..., SuperGlue]:
    """superglue(seed=0, **config) returns a small SuperGlue with random weights."""

    def make(seed: int = 0, **config: Any) -> SuperGlue:
        model = SuperGlue(**{**small_superglue, **config})
        randomise_superglue(model, seed)
        return model

    return make


@pytest.fixture(scope="session")
def cpp_programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the C++ programs, built as a separate project that gets only CMAKE_PREFIX_PATH."""
    for tool in ("cmake", os.environ.get("CXX", "c++")):
        if shutil.which(tool) is None:
            pytest.fail(f"{tool} is missing: the C++ programs cannot be built; try `apt-get install cmake g++`")
    base = shared_folder(tmp_path_factory)
    source, build = Path(__file__).parent / "cpp", base / "cpp"
    with (base / "cpp.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (["cmake", "-S", str(source), "-B", str(build)], ["cmake", "--build", str(build)]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                pytest.fail(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout}")
    return build


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder shared by all workers. With a lock, the first worker builds in it while the others wait."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def shared_scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Shares the rendered courtyard, which takes seconds to build, with all workers and the processes they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KPMATCH_SCENES", str(shared_folder(tmp_path_factory)))
        yield


@pytest.fixture(scope="session")
def tf2_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables of a process with tf2_msgs/TFMessage, which ROS on PyPI lacks."""
    base = shared_folder(tmp_path_factory)
    package, install = base / "tf2" / "tf2_msgs", base / "tf2" / "install" / "tf2_msgs"
    with (base / "tf2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not install.exists():
            (package / "msg").mkdir(parents=True)
            (package / "msg" / "TFMessage.msg").write_text("geometry_msgs/TransformStamped[] transforms\n")
            (package / "package.xml").write_text(
                '<package format="3"><name>tf2_msgs</name><version>0.0.1</version><description>TFMessage</description>'
                '<maintainer email="dev@example.com">tests</maintainer><license>BSD</license>'
                "<buildtool_depend>ament_cmake</buildtool_depend><depend>geometry_msgs</depend>"
                "<member_of_group>rosidl_interface_packages</member_of_group></package>"
            )
            (package / "CMakeLists.txt").write_text(
                "cmake_minimum_required(VERSION 3.16)\nproject(tf2_msgs)\nfind_package(ament_cmake REQUIRED)\n"
                "find_package(geometry_msgs REQUIRED)\nfind_package(rosidl_default_generators REQUIRED)\n"
                'rosidl_generate_interfaces(tf2_msgs "msg/TFMessage.msg" DEPENDENCIES geometry_msgs)\nament_package()\n'
            )
            command = ["colcon", "build", "--cmake-args", "-DBUILD_TESTING=OFF"]
            done = subprocess.run(command, cwd=base / "tf2", capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    (modules,) = install.glob("lib/python*/site-packages")
    places = {"AMENT_PREFIX_PATH": install, "LD_LIBRARY_PATH": install / "lib", "PYTHONPATH": modules}
    before = {name: os.pathsep.join(filter(None, [str(place), os.environ.get(name)])) for name, place in places.items()}
    return {**os.environ, **before}


@pytest.fixture
def record_difference(record_property: Callable[[str, object], None]) -> RecordDifference:
    """record_difference(what, value) records a difference. The end of the run shows the largest one of all tests."""
    return lambda what, value: record_property(_DIFFERENCE + what, float(value))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print a table of the largest differences between results and the reference implementations."""
    found: dict[str, list[float]] = defaultdict(list)
    for report in terminalreporter.getreports("passed"):
        for name, value in getattr(report, "user_properties", []):
            if name.startswith(_DIFFERENCE):
                found[name.removeprefix(_DIFFERENCE)].append(value)
    if found:
        terminalreporter.section("largest difference from the reference implementations")
        width = max(map(len, found))
        for name, values in sorted(found.items()):
            terminalreporter.line(f"{name:{width}}  {max(values):8.2g}  ({len(values)} comparisons)")


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of threads that PyTorch and the compiled part use in the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
