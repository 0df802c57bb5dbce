"""Tests that a recording reveals the readout time of its camera if the camera rotates."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from bag_harness import QUICK, Run, refused
from scipy.spatial.transform import Rotation
from test_rolling_shutter import Ride

from kpmatch_ros.bags.demo import DEMO_BAG
from kpmatch_ros.bags.readout import Readout, ReadoutSearch
from kpmatch_ros.frames import Result
from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.parameters import Parameters


@dataclass(frozen=True)
class LookingAround(Ride):
    """A moving camera that starts to look around, by this angle in radians, at some time."""

    around: float = 0.3
    start: float = 0.0

    def pose(self, time: np.ndarray) -> tuple[Rotation, np.ndarray]:
        times = self.start + np.append(time, 0.0)
        angles = self.around * np.column_stack([np.sin(0.3 * times), 0.5 * np.cos(0.23 * times)])
        turns = Rotation.from_euler("yx", angles)
        places = np.column_stack([0.05 * times, 0.2 * np.sin(0.1 * times), 0.03 * times])
        return turns[-1].inv() * turns[:-1], turns[-1].inv().apply(places[:-1] - places[-1])


def searched(
    readout: float, around: float, pairs: int = 15, status: PoseStatus = PoseStatus.OK, interval: float = 0.1
) -> ReadoutSearch:
    """Return the search after a ride with this readout time in seconds, looking around by this angle in radians."""
    found = ReadoutSearch(Parameters())
    frames = [
        SimpleNamespace(stamp=round(1e9 * interval * number), camera=Ride().camera) for number in range(pairs + 1)
    ]
    for number in range(pairs):
        points0, points1 = LookingAround(around=around, start=number).matches(readout / interval, number, count=150)
        pair = SimpleNamespace(
            reference=frames[number],
            current=frames[number + 1],
            reference_points=points0.astype(np.float32),
            points=points1.astype(np.float32),
            pose=SimpleNamespace(status=status, metric=False),
        )
        found.add(cast(Result, SimpleNamespace(pair=pair)), 0.0)
    return found


def search(*ride: float, **options: Any) -> Readout | None:
    """Return the result for such a ride."""
    return searched(*ride, **options).found()


@pytest.mark.parametrize(("readout", "interval"), [(0.0, 0.1), (0.02, 0.1), (0.02, 0.0334)])
def test_the_readout_time_of_a_rotating_camera_is_found(readout: float, interval: float) -> None:
    found = search(readout, 0.3, pairs=12, interval=interval)
    assert found is not None and found.is_sure and found.pairs == 11
    assert abs(found.best - readout) < 0.002 and found.low - 0.001 < readout < found.high + 0.001


def test_the_readout_time_of_a_camera_that_hardly_turns_is_uncertain() -> None:
    found = search(0.033, 0.01, pairs=12)
    assert found is not None and not found.is_sure


def test_a_camera_too_fast_for_the_search_is_named_as_the_reason() -> None:
    found = searched(0.0025, 0.3, pairs=12, interval=0.005)
    assert found.found() is None and "the frames follow each other in less than 0.008 s" in found.in_words()


@pytest.mark.parametrize("missing", [{"pairs": 10}, {"status": PoseStatus.AMBIGUOUS}])
def test_too_few_pairs_with_a_pose_give_no_readout_time(missing: dict[str, Any]) -> None:
    assert search(0.02, 0.3, **{"pairs": 12, **missing}) is None


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "not known: fewer than 10 pairs"),
        (Readout(0.01, 0.0, 0.03, 20), "the camera should turn more"),
        (Readout(0.0, 0.0, 0.001, 20), "a global shutter"),
        (Readout(0.02, 0.019, 0.021, 20), "0.0200 s (90 %: 0.0190 to 0.0210, 20 pairs): a rolling shutter; set"),
    ],
)
def test_the_result_is_explained_in_words(found: Readout | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReadoutSearch, "found", lambda self: found)
    assert words in ReadoutSearch(Parameters()).in_words()


def test_kpmatch_bag_estimates_the_readout_time_on_request(kpmatch: Run, tmp_path: Path) -> None:
    status, out, _ = kpmatch("bag", DEMO_BAG, tmp_path / "out", *QUICK, "--max-keypoints", "400", "--readout", "--json")
    assert status == 0 and json.loads(out)["readout"]["pairs"] == 10  # of twelve frames
    rows = kpmatch("bag", DEMO_BAG, tmp_path / "few", *QUICK, "--min-inliers", "257", "--readout")[1].splitlines()
    assert any(line.startswith("readout") and "not known: fewer than 10 pairs" in line for line in rows)


def test_the_option_readout_is_refused_for_stereo(kpmatch: Run, tmp_path: Path) -> None:
    error = refused(kpmatch("bag", DEMO_BAG, tmp_path / "out", "--readout", "--mode", "stereo"))
    assert "--readout: works with one camera only" in error and not (tmp_path / "out").exists()
