"""Tests of the messages about missing Python modules, for example after a skipped step of the README's robot recipe."""

from __future__ import annotations

import configparser
import importlib
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from kpmatch_ros.cli import doctor
from kpmatch_ros.cli.doctor import FAIL, OK
from kpmatch_ros.runtime import interpreter
from kpmatch_ros.shell import matcher_in_shell

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def system_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """This Python as a system's Python, whose packages belong to the distribution."""
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("ROS_DISTRO", raising=False)
    return tmp_path


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty virtual environment that this Python considers its own, and a folder of modules outside of it."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    (tmp_path / "venv" / "lib").mkdir(parents=True)
    (tmp_path / "system").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "venv" / "lib"), str(tmp_path / "system")])
    return tmp_path


def test_pip_is_not_suggested_for_an_externally_managed_python(system_python: Path) -> None:
    said = interpreter.how_to_install("torch")
    assert "activate the virtual environment" in said and "--system-site-packages" in said
    assert f"{sys.executable} -m pip" not in said


def test_with_ros_the_virtual_environment_is_suggested_even_if_pip_would_work(
    system_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (system_python / "EXTERNALLY-MANAGED").unlink()
    assert interpreter.how_to_install("torch") == f"{sys.executable} -m pip install torch"
    monkeypatch.setenv("ROS_DISTRO", "humble")
    assert "activate the virtual environment" in interpreter.how_to_install("torch")


def test_the_dependencies_agree_with_setup_cfg_and_package_xml() -> None:
    declared = configparser.ConfigParser()
    declared.read(ROOT / "setup.cfg")
    from_pip = [line.split()[0] for line in declared["options"]["install_requires"].splitlines() if line]
    assert sorted(each.pip for each in interpreter.DEPENDENCIES) == sorted(from_pip)
    manifest = (ROOT / "package.xml").read_text()
    for each in interpreter.DEPENDENCIES:
        assert not each.apt or f"<exec_depend>{each.apt}</exec_depend>" in manifest


@pytest.mark.parametrize(
    ("files", "clash"),
    [
        (["system/cv2.py", "system/numpy.py"], False),
        (["system/cv2.py", "system/numpy.py", "venv/lib/numpy.py"], True),
        (["system/cv2.py", "venv/lib/numpy.py"], False),  # no other NumPy would remain
        (["venv/lib/cv2.py", "system/numpy.py", "venv/lib/numpy.py"], False),
        (["system/numpy.py", "venv/lib/numpy.py"], False),  # OpenCV is missing
    ],
)
def test_removal_is_suggested_for_a_numpy_that_hides_the_systems_numpy(
    files: list[str], clash: bool, environment: Path
) -> None:
    for name in files:
        (environment / name).touch()
    assert ("pip uninstall numpy" in interpreter.numpy_clash("cv2")) == clash


def test_an_environment_without_system_packages_is_a_fault_with_ros(environment: Path) -> None:
    configuration = environment / "venv" / "pyvenv.cfg"
    configuration.write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    (environment / "system" / "numpy.py").touch()
    assert interpreter.unseen_packages() == []  # without ROS it does not need those packages
    (environment / "system" / "rclpy.py").touch()
    importlib.invalidate_caches()
    assert interpreter.unseen_packages() == ["cv2", "psutil", "scipy", "tqdm", "yaml"]
    finding = list(doctor.check_package())[1]
    assert finding.level == FAIL and "cv2" in finding.text and str(configuration) in finding.remedy
    configuration.write_text("home = /usr/bin\ninclude-system-site-packages = true\n")
    assert list(doctor.check_package())[1].level == OK


def test_missing_packages_are_reported_by_node_and_commands_in_one_line(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    venv.create(bare, system_site_packages=False, symlinks=True)
    for name in ("rclpy", "cv2", "numpy", "scipy", "psutil", "yaml"):  # as installed by apt, without PyTorch
        (tmp_path / f"{name}.py").touch()
    places = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "PATH": os.environ["PATH"]}
    for arguments in (
        [ROOT / "scripts" / "matcher"],
        [ROOT / "scripts" / "kpmatch", "bench"],
    ):
        done = subprocess.run(
            [bare / "bin" / "python3", *arguments], env=places, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode != 0 and len(done.stderr.splitlines()) == 1, done.stderr
        assert "Traceback" not in done.stderr and "unexpected error" not in done.stderr
        assert str(bare) in done.stderr and "kpmatch doctor" in done.stderr, done.stderr


def test_the_node_is_named_by_its_full_path_if_it_is_not_on_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "a folder" / "lib" / "kpmatch_ros" / "matcher"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.delenv("KPMATCH_PREFIX", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("AMENT_PREFIX_PATH", f"/opt/none{os.pathsep}{tmp_path / 'a folder'}")
    assert matcher_in_shell("--ros-args") == f"'{program}' --ros-args"
    monkeypatch.setenv("KPMATCH_PREFIX", "/a checkout/tools/with_ros")
    assert matcher_in_shell("--ros-args") == f"'/a checkout/tools/with_ros' '{program}' --ros-args"
    monkeypatch.delenv("KPMATCH_PREFIX")
    monkeypatch.setenv("PATH", str(program.parent))
    assert matcher_in_shell("--ros-args") == "matcher --ros-args"


def test_with_ros_apt_is_suggested_for_opencv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    monkeypatch.setenv("ROS_DISTRO", "jazzy")
    (finding,) = doctor.check_opencv()
    assert finding.level == FAIL and finding.remedy == "sudo apt install python3-opencv"
    monkeypatch.delenv("ROS_DISTRO")
    (finding,) = doctor.check_opencv()
    assert finding.remedy == f"{sys.executable} -m pip install opencv-python-headless"
