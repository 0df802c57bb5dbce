"""Shared functions for tests of `kpmatch bag` and `kpmatch archive`."""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kpmatch_ros.bags import read_messages
from kpmatch_ros.messages import nanoseconds

Run = Callable[..., tuple[int, str, str]]
QUICK = ("--device", "cpu", "--precision", "float32", "--matcher", "nearest", "--max-keypoints", "256")
FIRST = 1_700_000_000_000_000_000
SIZE = (160, 120)


def stamps(count: int, period: int = 100_000_000) -> list[int]:
    return [FIRST + i * period for i in range(count)]


def refused(result: tuple[int, str, str]) -> str:
    """Check that the command refused its arguments, and return the one line of its error text."""
    status, out, err = result
    assert status == 2 and out == ""
    assert err.endswith("\n") and err.count("\n") == 1 and err.startswith("kpmatch bag: ")
    return err


def by_topic(path: Path) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for record in read_messages(path):
        found.setdefault(record.topic, []).append(record)
    return found


def table(out: Path) -> dict[str, dict[str, str]]:
    """Return the table that `kpmatch archive` wrote, with one row per bag."""
    with (out / "archive.csv").open(newline="") as file:
        return {row["bag"]: row for row in csv.DictReader(file)}


def header_stamp(message: Any) -> int:
    return nanoseconds(message.header.stamp)


def bag_command(*words: Any) -> None:
    """Run `kpmatch bag` in a process that gives bit-identical results to the node's process.

    All libraries use one thread. This runs the installed program, because the source checkout has no compiled part.
    """
    command = ["kpmatch", "bag", *map(str, words)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def differences(ours: list[Any], theirs: list[Any]) -> list[str]:
    """Return the fields in which two lists of messages differ, with the largest difference for numbers."""
    found = [] if len(ours) == len(theirs) else [f"{len(ours)} and {len(theirs)} messages"]
    for number, (one, other) in enumerate(zip(ours, theirs)):
        for field in one.get_fields_and_field_types():
            a, b = getattr(one, field), getattr(other, field)
            if hasattr(a, "get_fields_and_field_types"):
                found += [f"{number}.{field}: {inner}" for inner in differences([a], [b])]
            elif not np.array_equal(np.asarray(a), np.asarray(b)):
                numbers = np.asarray(a).dtype.kind in "fiu" and np.shape(a) == np.shape(b)
                by = np.abs(np.subtract(a, b, dtype=np.float64)).max() if numbers else f"{np.shape(a)}, {np.shape(b)}"
                found.append(f"{number}.{field} by {by}")
    return found


def read_tum(path: Path) -> tuple[list[str], np.ndarray]:
    lines = path.read_text().splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    return [row[0] for row in rows], np.array([[float(value) for value in row] for row in rows])
