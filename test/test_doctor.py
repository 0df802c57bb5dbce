"""Tests of kpmatch doctor's findings, on this machine and on machines with faults."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kpmatch_ros
from kpmatch_ros import weights
from kpmatch_ros.cli import doctor
from kpmatch_ros.cli.doctor import FAIL, OK, WARN, Finding
from kpmatch_ros.geometry import compiled as compiled_geometry
from kpmatch_ros.models import compiled as compiled_networks
from kpmatch_ros.runtime import processor
from kpmatch_ros.runtime.interpreter import how_to_get
from kpmatch_ros.weights import sources

ROOT = Path(__file__).resolve().parents[1]


def findings(check: Any) -> dict[str, Finding]:
    """Return the findings of a check by subject; the last one if a subject has several."""
    return {finding.subject: finding for finding in check()}


def run(tmp_path: Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run the command as a separate process in a folder without a package, with changed environment variables."""
    changed = {**os.environ, **environment}
    command = [sys.executable, "-m", "kpmatch_ros.cli", "doctor"]
    variables = {name: value for name, value in changed.items() if value is not None}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=variables)


def test_a_complete_installation_has_no_fault(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout and "everything needed works" in done.stdout and done.stderr == ""
    for subject in (
        "PyTorch",
        "GPU",
        "precision",
        "OpenCV",
        "SciPy",
        "geometry",
        "weights",
        "networks",
        "ROS 2",
        "middleware",
        "messages",
    ):
        assert f"] {subject}" in done.stdout
    assert f"version {kpmatch_ros.__version__}, built in" in done.stdout and "converter" in done.stdout
    assert "ros2 run starts it with" in done.stdout


def test_without_ros_there_is_a_warning_and_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kpmatch: Callable[..., tuple[int, str, str]]
) -> None:
    # This module hides the real one, as in a Python without ROS. The doctor imports it in a separate process.
    (tmp_path / "rclpy.py").write_text("raise ModuleNotFoundError(\"No module named 'rclpy'\", name='rclpy')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    status, out, _ = kpmatch("doctor")
    assert status == 0 and "FAIL" not in out
    assert "[WARN] ROS 2" in out and "Python API and kpmatch match work without it" in out


def test_a_ros_for_another_python_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rclpy.py").write_text("import rclpy._rclpy_pybind11")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (finding,) = doctor.check_ros()
    assert finding.level == FAIL and "Python version" in finding.remedy


def test_a_ros_that_aborts_the_process_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rclpy.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (finding,) = doctor.check_ros()
    assert finding.level == FAIL and "ended the process" in finding.text


def test_a_missing_middleware_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMW_IMPLEMENTATION", "rmw_no_such_thing")
    found = findings(doctor.check_ros)
    assert found["middleware"].level == FAIL and "rmw_no_such_thing" in found["middleware"].text
    assert "unset RMW_IMPLEMENTATION" in found["middleware"].remedy
    # The other checks run without it.
    assert [found[subject].level for subject in ("ROS 2", "messages", "node")] == [OK, OK, OK]


def test_a_log_folder_that_cannot_be_created_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_LOG_DIR", "/proc/log")  # a place where not even root can create a folder
    (finding,) = (each for each in doctor.check_ros() if each.level == FAIL)
    assert "ROS cannot start" in finding.text and "/proc/log" in finding.text and "ROS_LOG_DIR" in finding.remedy


def test_a_domain_id_outside_the_range_of_dds_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", "300")
    (finding,) = (each for each in doctor.check_ros() if each.level == FAIL)
    assert "ROS_DOMAIN_ID is 300" in finding.text and finding.remedy == "set ROS_DOMAIN_ID to an allowed value"
    monkeypatch.setenv("ROS_DOMAIN_ID", "-1")  # rcl's value for the default
    found = findings(doctor.check_ros)
    assert "start" not in found and found["ROS 2"].text.endswith("domain 0")


def test_messages_that_are_not_built_are_a_fault_with_the_build_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def without(variable: str) -> str:
        entries = os.environ.get(variable, "").split(os.pathsep)
        return os.pathsep.join(entry for entry in entries if "kpmatch_ros" not in entry and entry != str(ROOT))

    for variable in ("PYTHONPATH", "AMENT_PREFIX_PATH"):
        monkeypatch.setenv(variable, without(variable))
    found = findings(doctor.check_ros)
    assert found["messages"].level == FAIL and "colcon build" in found["messages"].remedy
    assert found["node"].level == FAIL


def test_a_pip_installation_that_hides_the_messages_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "kpmatch_ros"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '9'")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    finding = findings(doctor.check_ros)["messages"]
    assert finding.level == FAIL and str(package) in finding.text and "pip uninstall" in finding.remedy


def test_messages_of_another_version_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kpmatch_ros, "__version__", "99.0.0")
    finding = findings(doctor.check_ros)["messages"]
    assert finding.level == FAIL and "99.0.0" in finding.text and "colcon build" in finding.remedy


@pytest.mark.parametrize("externally_managed", [False, True], ids=["pip may install", "pip may not install"])
def test_a_node_that_ros2_run_starts_without_pytorch_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, externally_managed: bool
) -> None:
    monkeypatch.setattr(doctor, "is_externally_managed", lambda: externally_managed)
    bare = tmp_path / "python3"  # first on PATH, like the system's Python if no virtual environment is active
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    finding = findings(doctor.check_ros)["node"]
    assert finding.level == FAIL and str(bare) in finding.text and "torch" in finding.text
    assert "activate" in finding.remedy
    assert (f"{bare} -m pip install" in finding.remedy) != externally_managed


def test_damaged_weights_are_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    item = weights.find("superpoint-open")
    shutil.copytree(item.path, tmp_path / "copy")
    with (tmp_path / "copy" / "model.safetensors").open("r+b") as stream:
        stream.seek(100_000)
        stream.write(b"?")
    monkeypatch.setattr(sources.resources, "files", lambda package: tmp_path)
    damaged = weights.Weights(**{**vars(item), "source": weights.Packaged("copy")})
    monkeypatch.setitem(weights.REGISTRY, item.name, damaged)
    levels = [finding.level for finding in doctor.check_weights() if item.name in finding.text]
    assert levels[0] == FAIL


def test_weights_that_may_not_be_used_commercially_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    item = weights.find("superpoint-open")
    limited = weights.Weights(**{**vars(item), "commercial": False, "licence": "CC-BY-NC-4.0"})
    monkeypatch.setitem(weights.REGISTRY, item.name, limited)
    text = next(finding.text for finding in doctor.check_weights() if item.name in finding.text)
    assert "CC-BY-NC-4.0, NO COMMERCIAL USE" in text


def test_optional_weights_that_are_not_fetched_are_not_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    far = weights.Weights(
        "far-away", "superpoint", "MIT", True, "a test", weights.Wheel("far-away==1.0", "x.pth"), 1, "0" * 64
    )
    monkeypatch.setenv("KPMATCH_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(weights.REGISTRY, far.name, far)
    assert {finding.level for finding in doctor.check_weights()} == {OK}


def test_missing_pytorch_is_a_fault_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (finding,) = doctor.check_pytorch()
    assert finding.level == FAIL and "pip install torch" in finding.remedy


def test_a_cpu_instruction_limit_that_disables_bfloat16_gives_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(processor, "_all_features", lambda: frozenset({"avx2", "avx512_bf16"}))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    limited = findings(doctor.check_pytorch)["precision"]
    assert limited.level == WARN and "float32" in limited.text and "AVX2" in limited.text
    assert "unset ATEN_CPU_CAPABILITY" in limited.remedy
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert findings(doctor.check_pytorch)["precision"] == Finding(OK, "precision", "auto means device cpu, bfloat16")


def test_an_opencv_incompatible_with_numpy_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cv2.py").write_text("raise AttributeError('_ARRAY_API not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv2")
    (finding,) = doctor.check_opencv()
    assert finding.level == FAIL and "_ARRAY_API" in finding.text and "opencv" in finding.remedy


@pytest.mark.parametrize(
    ("built_for", "remedy"), [(None, "built for CUDA"), ("12.8", "nvidia-smi")], ids=["processor", "CUDA"]
)
def test_a_gpu_that_pytorch_does_not_use_gives_a_warning(
    monkeypatch: pytest.MonkeyPatch, built_for: str | None, remedy: str
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("PyTorch uses the GPU here")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", built_for)
    finding = doctor.check_gpu(torch)
    assert finding.level == WARN and remedy in finding.remedy


@pytest.mark.parametrize("check", [doctor.check_geometry, doctor.check_compiled_networks])
def test_a_compiled_library_of_another_version_gives_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, check: Callable[[], Any]
) -> None:
    for module in (compiled_geometry, compiled_networks):
        monkeypatch.setattr(module, "LIBRARY", tmp_path / "old.so")
        monkeypatch.setattr(module, "available", lambda: False)
    monkeypatch.setattr(compiled_networks, "transforms", lambda: False)
    (finding,) = check()
    assert finding.level == OK and "colcon and pip build a compiled part" in finding.text
    (tmp_path / "old.so").touch()
    (finding,) = check()
    assert finding.level == WARN and "old.so is not compatible" in finding.text and "build" in finding.remedy


def test_a_processor_without_support_for_the_compiled_networks_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_networks, "transforms", lambda: True)
    monkeypatch.setattr(compiled_networks, "available", lambda: False)
    (finding,) = doctor.check_compiled_networks()
    assert finding.level == OK and "AVX-512" in finding.text


def test_a_check_that_raises_is_a_fault_and_the_others_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("the disk is on fire")
        yield

    checks = (
        "dependencies",
        "opencv",
        "scipy",
        "geometry",
        "compiled_networks",
        "pytorch",
        "weights",
        "networks",
        "ros",
    )
    for name in checks:
        monkeypatch.setattr(doctor, f"check_{name}", broken)
    found = list(doctor.examine())
    assert [finding.level for finding in found] == [OK, OK] + [FAIL] * len(checks)
    assert "the disk is on fire" in found[-1].text


@pytest.mark.parametrize("name", ["psutil", "safetensors", "yaml"])
def test_a_missing_required_package_is_a_fault_with_the_install_command(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("ROS_DISTRO", raising=False)  # on a robot, apt has most packages
    monkeypatch.setitem(sys.modules, name, None)
    (finding,) = doctor.check_dependencies()
    assert finding.level == FAIL and finding.subject.lower().endswith(name)
    assert finding.remedy == how_to_get(name) and "pip install" in finding.remedy


@pytest.mark.parametrize("name", ["rosbags", "tqdm"])
def test_a_missing_package_of_some_commands_gives_a_warning_that_names_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    (finding,) = doctor.check_dependencies()
    assert finding.level == WARN and "kpmatch bag, demo, bench and archive" in finding.text
    assert finding.remedy == how_to_get(name)
    monkeypatch.setattr(doctor, "examine", lambda: iter([finding, Finding(OK, "node", "there")]))
    assert doctor.run_doctor() and "kpmatch demo" not in capsys.readouterr().out


def test_a_check_without_its_package_names_the_package_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking() -> Any:
        raise ModuleNotFoundError("No module named 'psutil'", name="psutil")
        yield

    for name in ("opencv", "scipy", "geometry", "compiled_networks", "pytorch", "weights", "networks", "ros"):
        monkeypatch.setattr(doctor, f"check_{name}", lacking)
    *_, finding = doctor.examine()
    assert finding.level == FAIL and "not checked: No module named 'psutil'" in finding.text
    assert finding.remedy == how_to_get("psutil")


def test_a_fault_gives_exit_status_2_and_each_finding_shows_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kpmatch_ros.cli import main

    lines = [Finding(OK, "one", "well"), Finding(WARN, "two", "odd", "look"), Finding(FAIL, "three", "bad", "fix it")]
    monkeypatch.setattr(doctor, "examine", lambda: iter(lines))
    assert main(["doctor"]) == 2
    out = capsys.readouterr().out
    assert "[FAIL] three" in out and "-> fix it" in out and "-> look" in out and "1 fault, 1 warning" in out
    monkeypatch.setattr(doctor, "examine", lambda: iter(lines[:2]))
    assert main(["doctor"]) == 0
