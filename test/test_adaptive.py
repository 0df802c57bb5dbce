"""Tests that the benchmark of early stopping and pruning prints a line for each precision and number of keypoints."""

from __future__ import annotations

import re
from typing import Any

import pytest

adaptive = pytest.importorskip("benchmarks.adaptive")


def test_the_table_has_the_time_and_the_layers_of_each_mode(capsys: Any) -> None:
    adaptive.main(["--keypoints", "64", "100", "--precision", "float32", "--pairs", "2", "--apart", "2"])
    title, head, *lines = capsys.readouterr().out.splitlines()
    assert "2 pairs 2 apart" in title and re.split(r"\s{2,}", head.strip())[2:] == list(adaptive.MODES)
    assert [line.split()[:2] for line in lines] == [["float32", "64"], ["float32", "100"]]
    for line in lines:
        times, layers = zip(*[map(float, pair) for pair in re.findall(r"(\d+) \((\d\.\d)\)", line)])
        assert len(times) == 4 and min(times) > 0
        assert layers[0] == layers[1] == 9.0 and max(layers[2:]) <= 9.0
