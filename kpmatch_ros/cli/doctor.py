"""kpmatch doctor: checks what works on this machine, and says what to do about each fault."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kpmatch_ros
from kpmatch_ros import weights
from kpmatch_ros.cli.common import add_command
from kpmatch_ros.cli.ros_answers import ProcessEndedError, ask_ros
from kpmatch_ros.parameters import Parameters
from kpmatch_ros.ros.domain import domain_fault
from kpmatch_ros.runtime.interpreter import (
    DEPENDENCIES,
    how_to_get,
    how_to_install,
    is_externally_managed,
    numpy_clash,
    unseen_packages,
)
from kpmatch_ros.shell import in_shell, matcher_in_shell

__all__ = ["FAIL", "OK", "WARN", "Finding", "add_doctor", "examine", "run_doctor"]

OK, WARN, FAIL = "OK", "WARN", "FAIL"
_TIMEOUT = 60.0  # seconds for a question to another process


def add_doctor(commands: Any) -> None:
    add_command(
        commands,
        "doctor",
        _doctor,
        "check this machine, and say what to do about each fault",
        "Check PyTorch, the GPU, OpenCV, the weights, ROS 2 and the build of the messages. Exit status 0 if everything "
        "that is installed works, 2 if there is a fault. ROS 2 may be absent: the Python API does not need it.",
        "kpmatch doctor",
    )


def _doctor(options: argparse.Namespace) -> int:
    return 0 if run_doctor() else 2


@dataclass(frozen=True)
class Finding:
    """The result of one check, printed as one line.

    Attributes:
        level: OK; WARN if something is missing that not everybody needs; FAIL if something is at fault.
        subject: what was checked.
        text: what was found.
        remedy: what the user should do; empty if nothing.
    """

    level: str
    subject: str
    text: str
    remedy: str = ""


def run_doctor() -> bool:
    """Print each finding as soon as it is known, and return whether none of them is a fault."""
    marks = {OK: "\033[32m OK \033[0m", WARN: "\033[33mWARN\033[0m", FAIL: "\033[31mFAIL\033[0m"}
    if not sys.stdout.isatty():
        marks = {OK: " OK ", WARN: "WARN", FAIL: "FAIL"}
    counts = {OK: 0, WARN: 0, FAIL: 0}
    findings = []
    for finding in examine():
        findings.append(finding)
        counts[finding.level] += 1
        print(f"[{marks[finding.level]}] {finding.subject:<12} {finding.text}", flush=True)
        if finding.remedy:
            print(f"{'':<20}-> {finding.remedy}", flush=True)
    if counts[FAIL]:
        print(f"\n{_counted(counts[FAIL], 'fault')}, {_counted(counts[WARN], 'warning')}")
    else:
        print("\neverything needed works" + (f", {_counted(counts[WARN], 'warning')}" if counts[WARN] else ""))
    print(f"next: {_next_step(findings)}")
    return counts[FAIL] == 0


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _next_step(findings: list[Finding]) -> str:
    """The next step for the user: repair the first fault, or use what works."""
    again = in_shell("kpmatch doctor")
    for finding in findings:
        if finding.level == FAIL:
            return f"fix {finding.subject} as described above, then {again}"
    if any(finding.level == OK and finding.subject == "node" for finding in findings):
        launch = "ros2 launch kpmatch_ros matcher.launch.py image:=TOPIC"
        if shutil.which("ros2") is None:  # ROS from PyPI has no command ros2
            launch = matcher_in_shell("--ros-args -r image:=TOPIC")
        lacking = {finding.subject for finding in findings if finding.level == WARN}
        whole = not any(each.pip in lacking for each in DEPENDENCIES)  # the demo needs all packages
        return f"{in_shell('kpmatch demo')}, or {launch}" if whole else launch
    return in_shell("kpmatch match A.jpg B.jpg")


def examine() -> Iterator[Finding]:
    """Yield all findings. A check that raises an exception becomes a finding too."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        check_package,
        check_dependencies,
        check_opencv,
        check_scipy,
        check_geometry,
        check_compiled_networks,
        check_pytorch,
        check_weights,
        check_networks,
        check_ros,
    )
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # noqa: BLE001 (a broken check must not hide the results of the next ones)
            text = f"{type(error).__name__}: {_first_line(error)}"
            remedy = ""
            if isinstance(error, ImportError):
                text, remedy = f"not checked: {_first_line(error)}", how_to_get(error.name or "")
            yield Finding(FAIL, check.__name__.removeprefix("check_"), text, remedy)


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def check_package() -> Iterator[Finding]:
    """Check the installed package and Python."""
    place = Path(kpmatch_ros.__file__).parent
    yield Finding(OK, "kpmatch_ros", f"{kpmatch_ros.__version__} at {place}")
    text = f"{platform.python_version()} at {sys.executable}"
    unseen = unseen_packages()
    if unseen:
        remedy = f"set include-system-site-packages = true in {sys.prefix}/pyvenv.cfg"
        text += f", a virtual environment that hides the system's {', '.join(unseen)} from ROS"
        yield Finding(FAIL, "Python", text, remedy)
    else:
        yield Finding(OK, "Python", text)


_CHECKED_APART = ("cv2", "scipy", "torch", "rosbags.image")  # modules that have checks of their own


def check_dependencies() -> Iterator[Finding]:
    """Check that the other packages can be imported; nothing else about them is checked."""
    lacking = False
    for each in DEPENDENCIES:
        if each.module in _CHECKED_APART:
            continue
        try:
            importlib.import_module(each.module)
        except Exception as error:  # noqa: BLE001 (as for OpenCV)
            lacking = True
            text, level = _first_line(error), FAIL
            if each.only_for:
                text, level = f"{text}; without it {each.only_for} do not work", WARN
            yield Finding(level, each.pip, text, _remedy(error, each.module))
    if not lacking:
        names = (each.pip for each in DEPENDENCIES if each.module not in _CHECKED_APART)
        yield Finding(OK, "packages", ", ".join(names))


def _remedy(error: Exception, module: str) -> str:
    """The remedy for a module that cannot be imported: install it, or another module that it needs."""
    named = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    return numpy_clash(module) or how_to_get(named or module) or how_to_get(module)


def check_opencv() -> Iterator[Finding]:
    """Check that OpenCV can be imported and can read the images that it writes."""
    try:
        import cv2
    except Exception as error:  # noqa: BLE001 (ImportError, and other errors if NumPy has the wrong version)
        yield Finding(FAIL, "OpenCV", _first_line(error), _remedy(error, "cv2"))
        return
    import numpy as np

    text = f"{cv2.__version__}, NumPy {np.__version__}"
    pixels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64).astype(np.uint8)
    broken = []
    for extension in (".png", ".jpg"):
        _, encoded = cv2.imencode(extension, pixels)
        decoded = cv2.imdecode(np.frombuffer(encoded.tobytes(), np.uint8), cv2.IMREAD_GRAYSCALE)
        if decoded is None or decoded.shape != pixels.shape:
            broken.append(extension)
    if broken:
        remedy = "install opencv-python-headless instead of this build"
        yield Finding(FAIL, "OpenCV", f"{text}, cannot read the {' and '.join(broken)} that it writes", remedy)
    else:
        yield Finding(OK, "OpenCV", text)


def check_scipy() -> Iterator[Finding]:
    """Check that SciPy can be imported. Like OpenCV, it fails with a NumPy for which it was not built."""
    try:
        import scipy.optimize
        import scipy.spatial.transform
    except Exception as error:  # noqa: BLE001 (as for OpenCV)
        yield Finding(FAIL, "SciPy", _first_line(error), _remedy(error, "scipy"))
    else:
        yield Finding(OK, "SciPy", scipy.__version__)


def check_geometry() -> Iterator[Finding]:
    """Check whether the compiled part of the geometry is in use."""
    try:
        from kpmatch_ros.geometry import compiled
    except Exception:  # noqa: BLE001 (as for OpenCV, whose check has reported it)
        return
    yield _compiled_part("geometry", compiled, "NumPy")


def check_compiled_networks() -> Iterator[Finding]:
    """Check whether the compiled part of the networks is in use on the processor."""
    try:
        from kpmatch_ros.models import compiled
    except Exception:  # noqa: BLE001 (as for PyTorch, whose check reports it)
        return
    if compiled.transforms() and not compiled.available():
        parts = "SuperPoint and LightGlue" if compiled.in_float32() else "SuperPoint"
        text = f"compiled, {compiled.LIBRARY.name}, {parts} in float32; in bfloat16 it needs AVX-512 with bfloat16"
        yield Finding(OK, "networks", text)
    else:
        yield _compiled_part("networks", compiled, "PyTorch", ", on the processor")


def _compiled_part(subject: str, compiled: Any, instead: str, where: str = "") -> Finding:
    """A finding that says whether a module's compiled library is in use, or what is used instead."""
    if compiled.available():
        return Finding(OK, subject, f"compiled, {compiled.LIBRARY.name}{where}")
    if compiled.LIBRARY.exists():
        return Finding(
            WARN, subject, f"{instead}, because {compiled.LIBRARY} is not compatible", "build the package again"
        )
    return Finding(OK, subject, f"{instead}; colcon and pip build a compiled part, which is faster")


def check_pytorch() -> Iterator[Finding]:
    """Check PyTorch, the GPU, and the device and precision that `auto` chooses."""
    try:
        import torch
    except Exception as error:  # noqa: BLE001 (ImportError, and OSError for missing shared libraries)
        yield Finding(FAIL, "PyTorch", f"{_first_line(error)} ({sys.executable})", _remedy(error, "torch"))
        return
    from kpmatch_ros.runtime.device import choose_device, choose_precision, format_name
    from kpmatch_ros.runtime.processor import BFLOAT16, disabled_features

    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    yield Finding(OK, "PyTorch", f"{torch.__version__}, {threads}")
    yield check_gpu(torch)
    device = choose_device("auto")
    precision = format_name(choose_precision("auto", device))
    text = f"auto means device {device}, {precision}"
    if device.type == "cpu" and disabled_features() & BFLOAT16:
        used = torch.backends.cpu.get_cpu_capability()
        text += f": the processor has bfloat16, but PyTorch is limited to the instruction set {used}"
        yield Finding(WARN, "precision", text, "unset ATEN_CPU_CAPABILITY, unless you want that limit")
    else:
        yield Finding(OK, "precision", text)


def check_gpu(torch: Any) -> Finding:
    """Check whether there is a GPU, and whether PyTorch can compute on it."""
    signs = ("/dev/nvidia0", "/dev/nvhost-gpu")  # device files of a PC's GPU and of a Jetson's
    present = any(Path(sign).exists() for sign in signs) or shutil.which("nvidia-smi") is not None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        text = (
            f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, compute capability "
            f"{properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
        )
        try:
            torch.ones(8, 8, device="cuda").mm(torch.ones(8, 8, device="cuda")).sum().item()
        except RuntimeError as error:
            remedy = "install a PyTorch that was built for this GPU, or set device to cpu"
            return Finding(FAIL, "GPU", f"{text}, but a test computation on it fails: {_first_line(error)}", remedy)
        return Finding(OK, "GPU", text)
    if not present:
        return Finding(OK, "GPU", "none; the networks run on the processor")
    if torch.version.cuda is None:
        remedy = "install a PyTorch built for CUDA (on a Jetson, NVIDIA's) to use it"
        return Finding(WARN, "GPU", f"there is one, but PyTorch {torch.__version__} is a build without CUDA", remedy)
    remedy = "compare nvidia-smi's driver and CUDA version with PyTorch's; in a container, give it the GPU (--gpus all)"
    return Finding(WARN, "GPU", f"there is one, but PyTorch (CUDA {torch.version.cuda}) cannot use it", remedy)


def check_weights() -> Iterator[Finding]:
    """Check the weights that are on this machine, and the default ones."""
    defaults = Parameters()
    for item in weights.REGISTRY.values():
        wanted = item.name in (defaults.extractor, defaults.matcher)
        here = weights.presence(item)
        if here.word == "no" and not wanted:
            continue  # optional weights: `kpmatch weights list` shows them
        if here.fault:
            yield Finding(FAIL, "weights", here.fault, here.remedy)
        else:
            checked = "hash correct" if weights.expected_hash(item) else "no hash to check"
            size = f"{item.file.stat().st_size / 1e6:.1f} MB"
            yield Finding(OK, "weights", f"{item.name}: {size}, {checked}, {item.terms}")


def check_networks() -> Iterator[Finding]:
    """Run the default networks on a small picture. This finds faults that imports and versions do not show."""
    import time

    import numpy as np

    from kpmatch_ros.feature_matcher import FeatureMatcher

    started = time.perf_counter()
    matcher = FeatureMatcher()
    loading = time.perf_counter() - started
    picture = np.kron(np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint8), np.ones((8, 8), np.uint8))
    matcher.match(matcher.extract(picture), matcher.extract(picture))
    started = time.perf_counter()
    features = matcher.extract(picture)
    matches = matcher.match(features, features).numpy()
    taken = (time.perf_counter() - started) * 1e3
    itself = np.asarray(matches.indices)
    correct = int((itself[:, 0] == itself[:, 1]).sum())
    text = f"loaded in {loading:.1f} s; extracting and matching a 320 x 240 image takes {taken:.0f} ms"
    if len(features) == 0 or correct < 0.8 * len(features):
        text += f", but only {correct} of {len(features)} keypoints match themselves"
        yield Finding(FAIL, "networks", text, "try precision float32; if that helps, report it with these lines")
    else:
        yield Finding(OK, "networks", text)


def check_ros() -> Iterator[Finding]:
    """Check ROS 2, its middleware, the messages, the image converter and the node's executable."""
    ended = ""
    try:
        answers = ask_ros()
    except ProcessEndedError as error:
        other = _without_chosen_middleware()
        if other is None:
            remedy = f"run {sys.executable} -c 'import rclpy' and look for libraries of two ROS versions"
            yield Finding(FAIL, "ROS 2", str(error), remedy)
            return
        answers, ended = other, str(error)
    if "error" in answers["rclpy"]:
        yield _no_rclpy(answers["rclpy"])
        return
    domain = answers["start"].get("value", os.environ.get("ROS_DOMAIN_ID", "0"))
    distribution = os.environ.get("ROS_DISTRO", "distribution unknown, ROS_DISTRO is not set")
    yield Finding(OK, "ROS 2", f"{distribution}; rclpy at {Path(answers['rclpy']['value']).parent}; domain {domain}")
    wanted = os.environ.get("RMW_IMPLEMENTATION", "the default")
    remedy = "install that middleware (ros-$ROS_DISTRO-rmw-...), or unset RMW_IMPLEMENTATION"
    if ended:
        text = f"{wanted} does not load ({ended}); without RMW_IMPLEMENTATION, {answers['rmw']['value']} does"
        yield Finding(FAIL, "middleware", text, remedy)
    elif "error" in answers["rmw"]:
        yield Finding(FAIL, "middleware", f"{wanted} does not load: {_first_line(answers['rmw']['error'])}", remedy)
    else:
        yield Finding(OK, "middleware", answers["rmw"]["value"])
    if fault := domain_fault(domain, answers["rmw"].get("value", "")):
        yield Finding(FAIL, "start", f"no node can start: {fault}", "set ROS_DOMAIN_ID to an allowed value")
    elif "error" in answers["start"]:
        remedy = (
            "correct what this error names; if it is the logs, set ROS_LOG_DIR to a folder that this user may write to"
        )
        yield Finding(FAIL, "start", f"ROS cannot start: {_first_line(answers['start']['error'])}", remedy)
    yield _messages(answers)
    yield _converter(answers["converter"])
    yield _executable(answers)


def _without_chosen_middleware() -> dict[str, Any] | None:
    """The answers without RMW_IMPLEMENTATION; None if it is not set, or if no middleware loads without it either."""
    if "RMW_IMPLEMENTATION" not in os.environ:
        return None
    try:
        answers = ask_ros(without="RMW_IMPLEMENTATION")
    except ProcessEndedError:
        return None
    return answers if "value" in answers["rmw"] else None


def _no_rclpy(answer: dict[str, str]) -> Finding:
    installed = sorted(Path("/opt/ros").glob("*/setup.bash"))
    if answer["error"] == "ModuleNotFoundError: No module named 'rclpy'":
        remedy = f". {installed[-1]}" if installed and "ROS_DISTRO" not in os.environ else "install ROS 2 for the node"
        text = "not installed for this Python; the Python API and kpmatch match work without it, the node does not"
        return Finding(WARN, "ROS 2", text, remedy)
    remedy = (
        "use the Python version that this ROS was built for, a virtual environment with --system-site-packages, and a "
        "new shell with only one ROS sourced"
    )
    return Finding(FAIL, "ROS 2", f"rclpy cannot be imported: {_first_line(answer['error'])}", remedy)


def _messages(answers: dict[str, Any]) -> Finding:
    build = "build it: colcon build --packages-select kpmatch_ros; . install/setup.sh (in a checkout: make build)"
    prefix = answers["installed"].get("value")
    if "error" in answers["messages"]:
        problem = answers["messages"]
        if prefix is None:
            return Finding(FAIL, "messages", "not built with colcon, or the workspace is not sourced", build)
        used = Path(answers["package"].get("value", "")).parent
        if problem["type"] == "ModuleNotFoundError" and Path(prefix) not in used.parents:
            text = f"the Python package at {used} hides the one with the messages in {prefix}"
            return Finding(FAIL, "messages", text, "pip uninstall kpmatch_ros, or source the workspace last")
        text = f"built in {prefix}, but not usable: {_first_line(problem['error'])}"
        return Finding(FAIL, "messages", text, "remove build/ and install/, and " + build)
    manifest = Path(prefix or "", "share", "kpmatch_ros", "package.xml")
    found = re.search(r"<version>\s*(.*?)\s*</version>", manifest.read_text()) if manifest.is_file() else None
    version = found[1] if found else "unknown"
    if version != kpmatch_ros.__version__:
        text = f"built from version {version}, but this is {kpmatch_ros.__version__}"
        return Finding(FAIL, "messages", text, build)
    return Finding(OK, "messages", f"version {version}, built in {prefix}")


def _converter(answer: dict[str, Any]) -> Finding:
    remedy = f"apt install ros-$ROS_DISTRO-cv-bridge, or {how_to_install('rosbags-image')}"
    if "error" in answer:
        return Finding(FAIL, "converter", _first_line(answer["error"]), numpy_clash("cv2") or remedy)
    module, faults = answer["value"]
    if not module:
        text = f"none: Bayer and YUV images will be refused; mono8, rgb8 and similar encodings work ({faults[:200]})"
        return Finding(WARN, "converter", text, remedy)
    return Finding(OK, "converter", f"{module.split('.')[0]}, for Bayer and YUV images")


_NODE_NEEDS = ("rclpy", "kpmatch_ros.msg", *(each.module for each in DEPENDENCIES if not each.only_for))


def _executable(answers: dict[str, Any]) -> Finding:
    """Check the Python that `ros2 run` starts the node with.

    It is the Python in the executable's first line, which may not be the one that has PyTorch.
    """
    prefix = answers["installed"].get("value")
    script = Path(prefix or "", "lib", "kpmatch_ros", "matcher")
    if prefix is None or not script.is_file():
        return Finding(FAIL, "node", "the executable matcher is not installed", "build and source the workspace")
    first = script.read_text().splitlines()[0].removeprefix("#!").split()
    python = shutil.which(first[-1]) or first[-1]
    question = (
        "import importlib.util, json, sys\n"
        "sys.path = [path for path in sys.path if path]\n"
        "def lacks(name):\n"
        "    try: return importlib.util.find_spec(name) is None\n"
        "    except Exception: return True\n"
        "print(json.dumps([name for name in sys.argv[1:] if lacks(name)]))"
    )
    process = subprocess.run(
        [python, "-c", question, *_NODE_NEEDS], capture_output=True, text=True, timeout=_TIMEOUT, check=False
    )
    if process.returncode:
        said = (process.stderr.strip().splitlines() or [""])[-1]
        return Finding(FAIL, "node", f"{script} runs {python}, which fails: {said}", "repair that Python")
    lacking = json.loads(process.stdout)
    if not lacking:
        return Finding(OK, "node", f"ros2 run starts it with {python}, which has all that the node needs")
    remedy = how_to_install("the missing packages")
    if Path(python).resolve() != Path(sys.executable).resolve() or sys.prefix != sys.base_prefix:
        remedy = f". {sys.prefix}/bin/activate before ros2 run and ros2 launch"
        if not is_externally_managed():
            remedy += f", or {python} -m pip install the missing packages"
    return Finding(FAIL, "node", f"ros2 run starts it with {python}, which lacks {', '.join(lacking)}", remedy)
