"""Writes the table of an archive of bags: one row per bag, for spreadsheets and for programs."""

from __future__ import annotations

import csv
import importlib.util
import os
from pathlib import Path
from typing import Any

from kpmatch_ros.encodable import encodable
from kpmatch_ros.geometry.pose import PoseStatus

__all__ = ["TABLES", "Row", "write_tables"]

Row = dict[str, Any]
"""The figures of a bag: bag, state, where, message and seconds, and the figures of its replay if it is done.

The figures of the replay are some of :meth:`kpmatch_ros.bags.report.Report.figures`, `recorded` (seconds), and device,
precision and threads, which say what computed them. In a finished bag's folder the row also has `source`, a hash that
distinguishes the bag from others of its name, and `unfinished`: whether the bag may have been incomplete when it was
read, so that a later run may find more in it.

`state` is done; broken if the bag is at fault; unsuitable if it lacks the topics that the user asked for, or offers a
choice of them; or failed if something else is at fault.
"""

TABLES = ("archive.csv", "archive.parquet")
"""Names of the files with the table."""

_LATENCIES = {"latency_p50": "median", "latency_p95": "95 %"}  # milliseconds; column: name in the report


def write_tables(rows: list[Row], out: Path, unfinished: Path) -> list[Path]:
    """Write archive.csv, and archive.parquet if pyarrow is installed. Returns the paths of the written files."""
    reasons = sorted({reason for row in rows for reason in row.get("rejected", {})})
    types = {
        **dict.fromkeys(("bag", "state"), str),
        "frames": int,
        **dict.fromkeys(("rate", "matches", "inliers", "recorded", *_LATENCIES), float),
        **{f"status_{status.name.lower()}": int for status in PoseStatus},
        **dict.fromkeys(("breaks", "odometry_breaks", "unpaired", "rejected"), int),
        **{f"rejected_{reason}": int for reason in reasons},
        "seconds": float,
        **dict.fromkeys(("device", "precision"), str),
        "threads": int,
        **dict.fromkeys(("where", "message"), str),
    }
    lines = []
    for row in rows:
        poses, rejected = row.get("poses"), row.get("rejected")
        line = {name: encodable(text) if isinstance(text := row.get(name), str) else text for name in types}
        for name in ("rejected", "unpaired"):
            line[name] = None if row.get(name) is None else sum(row[name].values())
        for name, percentile in _LATENCIES.items():
            line[name] = (row.get("latency_ms") or {}).get(percentile)
        for status in PoseStatus:
            line[f"status_{status.name.lower()}"] = None if poses is None else poses.get(status.name, 0)
        for reason in reasons:
            line[f"rejected_{reason}"] = None if rejected is None else rejected.get(reason, 0)
        lines.append(line)
    with (unfinished / TABLES[0]).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(types))
        writer.writeheader()
        writer.writerows(lines)
    written = [TABLES[0]]
    if importlib.util.find_spec("pyarrow") is not None:
        import pyarrow
        from pyarrow import parquet

        kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
        schema = pyarrow.schema([(name, kinds[kind]) for name, kind in types.items()])
        parquet.write_table(pyarrow.Table.from_pylist(lines, schema), unfinished / TABLES[1])
        written.append(TABLES[1])
    for name in written:
        os.replace(unfinished / name, out / name)
    return [out / name for name in written]
