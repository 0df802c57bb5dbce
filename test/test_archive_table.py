"""What the table of kpmatch archive says of each bag."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from bag_harness import QUICK, SIZE, Run, stamps, table
from numpy.typing import NDArray

from kpmatch_ros.bags import BagWriter
from kpmatch_ros.bags.message_types import camera_info_message
from simulation import demo_camera
from simulation.bags import write_camera_bag


@pytest.fixture
def run(kpmatch: Run) -> Run:
    """run(words...): exit status, stdout and stderr of `kpmatch archive`."""
    return functools.partial(kpmatch, "archive")


def test_a_bag_without_the_topics_asked_for_is_not_called_broken(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    fleet = tmp_path / "in"
    for name in ("front", "cut"):
        write_camera_bag(fleet / name, views[:3], stamps(3), demo_camera(*SIZE), image_topic="/front/image")
    write_camera_bag(fleet / "rear", views[:3], stamps(3), demo_camera(*SIZE), image_topic="/rear/image")
    with BagWriter(fleet / "no images") as bag:
        bag.write("/front/camera_info", camera_info_message(demo_camera(*SIZE), stamps(1)[0], "eye"), stamps(1)[0])
    cut = fleet / "cut" / "cut.mcap"
    cut.write_bytes(cut.read_bytes()[:3000])
    status, printed, errors = run(fleet, tmp_path / "out", *QUICK, "--image", "/front/image")
    assert status == 0 and "1 done, 1 broken, 2 unsuitable" in printed
    assert {name: row["state"] for name, row in table(tmp_path / "out").items()} == {
        "cut": "broken",
        "front": "done",
        "no images": "unsuitable",
        "rear": "unsuitable",
    }
    assert f"{fleet / 'rear'}: --image /front/image: there is no such image topic" in errors
    assert f"{fleet / 'no images'}: has no image topic" in errors
    status, _, errors = run(fleet, tmp_path / "none", *QUICK, "--image", "/top/image")
    assert status == 2 and errors.splitlines()[-1] == "kpmatch archive: none of the 4 bags can be used"
