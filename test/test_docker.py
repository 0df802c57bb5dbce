"""Tests of the containers, as far as they can be tested without Docker."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ["launch", "kpmatch_ros", "matcher.launch.py"]


def commands_given_to_ros2(folder: Path, namespace: str | None, *words: str) -> tuple[int, list[str]]:
    """Return the entry point's exit status, and the commands that it gave to a `ros2` which reports an active node."""
    script = (ROOT / "docker" / "entrypoint.sh").read_text().replace("/workspace", str(folder))
    (folder / "install").mkdir()
    (folder / "install" / "local_setup.bash").touch()
    ros2 = folder / "ros2"
    ros2.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {folder}/asked\necho 'active [3]'\n")
    ros2.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "ROS_DISTRO": "none"}
    if namespace is not None:
        environment["KPMATCH_NAMESPACE"] = namespace
    done = subprocess.run(["bash", "-c", script, "entrypoint.sh", *words], env=environment, capture_output=True)
    return done.returncode, (folder / "asked").read_text().splitlines()


@pytest.mark.parametrize("words", [[], ["image:=/camera/image_raw", "max_keypoints:=512"]])
@pytest.mark.parametrize("namespace", [None, "", "/"])
def test_a_container_without_a_namespace_starts_the_node(
    tmp_path: Path, namespace: str | None, words: list[str]
) -> None:
    """ros2 launch refuses `namespace:=` as malformed."""
    assert commands_given_to_ros2(tmp_path, namespace, *words) == (0, [*LAUNCH, *words])


@pytest.mark.parametrize("namespace", ["robot/front", "/robot/front", "//robot/front//"])
def test_node_and_health_check_use_the_same_namespace(tmp_path: Path, namespace: str) -> None:
    (tmp_path / "start").mkdir()
    (tmp_path / "health").mkdir()
    assert commands_given_to_ros2(tmp_path / "start", namespace, "a:=b") == (
        0,
        [*LAUNCH, "namespace:=robot/front", "a:=b"],
    )
    health = commands_given_to_ros2(tmp_path / "health", namespace, "healthy")
    assert health == (0, ["lifecycle", "get", "/robot/front/matcher"])


def test_the_health_check_finds_a_node_without_a_namespace(tmp_path: Path) -> None:
    assert commands_given_to_ros2(tmp_path, None, "healthy") == (0, ["lifecycle", "get", "/matcher"])


def test_docker_ignores_what_git_ignores() -> None:
    """Environments and builds of other distributions take gigabytes, and are built for this machine."""
    ignored = re.findall(r"^([^#\n]+?)/?$", (ROOT / ".gitignore").read_text(), re.MULTILINE)
    # Git's patterns apply in every folder unless they begin with a slash. Docker's patterns need `**/` for that.
    in_dockers_spelling = {name[1:] if name[0] == "/" else f"**/{name}" for name in ignored}
    assert len(ignored) > 10
    assert in_dockers_spelling <= set((ROOT / ".dockerignore").read_text().splitlines())
