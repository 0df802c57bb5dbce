"""The figures of kpmatch bench, their table and their plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kpmatch_ros
from kpmatch_ros.tables import format_table

__all__ = ["STAGES", "Comparison", "Row", "Spread", "draw", "report"]

STAGES = ("decode", "convert", "upload", "extract", "match", "pose", "publish")

_SHOWN = ("extractor", "matcher", "device", "precision", "max_keypoints", "refine")  # shown elsewhere in the report


@dataclass(frozen=True)
class Spread:
    """The median of several values, and the lower and upper quartile."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(round(median, 4), round(lower, 4), round(upper, 4))


@dataclass(frozen=True)
class Comparison:
    """Another implementation compared with this package. Ratios are its time over ours: above 1 if we are faster.

    Attributes:
        peer: name and version of the other implementation.
        work: "pair", "sequence" or "sequence, features kept".
        wall: its wall time, milliseconds.
        cpu: its processor time, milliseconds.
        matches: mean number of matches that it found.
        wall_ratio: ratio of wall times, each from two measurements made one after the other.
        cpu_ratio: the same for processor time.
    """

    peer: str
    work: str
    wall: Spread
    cpu: Spread
    matches: float
    wall_ratio: Spread
    cpu_ratio: Spread


@dataclass(frozen=True)
class Row:
    """The measurements with one setting; times in milliseconds.

    Attributes:
        extractor: the network, as in the parameter.
        matcher: the network, as in the parameter.
        parameters: of the frames of the sequence, by name: those that differ from the defaults.
        device: name of the GPU, or cpu.
        precision: number format.
        width: of the images, pixels.
        height: of the images, pixels.
        calibrated: whether the camera's calibration is known; otherwise the pose was computed with an invented one.
        max_keypoints: as requested.
        keypoints: mean number found in an image.
        matches: mean number for a pair of the sequence.
        layers: mean number that the matcher ran.
        stages: wall time by stage; ``upload`` is a part of ``extract``.
        frame: wall time of a frame of the sequence, from the pixels to the pose; its reference's features are cached.
        frame_cpu: processor time of the same work.
        pair: wall time of a still pair, both images extracted and matched.
        pair_cpu: processor time of the same work.
        resident_mb: peak memory of the process, MB; None if other implementations ran in it or it cannot be measured.
        gpu_mb: peak memory allocated on the GPU, MB; None on the processor.
        comparisons: with other implementations.
    """

    extractor: str
    matcher: str
    parameters: dict[str, Any]
    device: str
    precision: str
    width: int
    height: int
    calibrated: bool
    max_keypoints: int
    keypoints: float
    matches: float
    layers: float
    stages: dict[str, Spread]
    frame: Spread
    frame_cpu: Spread
    pair: Spread
    pair_cpu: Spread
    resident_mb: float | None
    gpu_mb: float | None
    comparisons: list[Comparison]


def report(rows: list[Row], machine: dict[str, Any], with_ros: bool) -> str:
    cores = f"{machine['cores']} cores" if machine["cores"] > 1 else "1 core"
    lines = [
        f"{machine['processor']} ({machine['instructions']}), {cores}, {machine['threads']} threads"
        + "".join(f"; {gpu}" for gpu in machine["gpus"]),
        f"kpmatch_ros {kpmatch_ros.__version__}, PyTorch {machine['torch']}, Python {machine['python']}, "
        f"{machine['system']}",
        _setting(rows[0]),
        "",
        "times are medians in milliseconds; frame: of a sequence whose reference features are cached; pair: two images",
    ]
    stages = [name for name in STAGES if name in rows[0].stages]
    head = ["device", "precision", "image", "keypoints", "matches", "layers"]
    head += [*stages, "frame", "frames/s", "CPU", "pair", "CPU", "MB", *(["GPU MB"] if machine["gpus"] else [])]
    table = [head]
    for row in rows:
        cells = [row.device, row.precision, f"{row.width}x{row.height}", f"{row.keypoints:.0f}/{row.max_keypoints}"]
        cells += [f"{row.matches:.0f}", f"{row.layers:.1f}"]
        cells += [_short(row.stages[name].median) for name in stages]
        cells += [_short(row.frame.median), f"{1e3 / row.frame.median:.2f}", _short(row.frame_cpu.median)]
        cells += [_short(row.pair.median), _short(row.pair_cpu.median)]
        cells.append("" if row.resident_mb is None else f"{row.resident_mb:.0f}")
        if machine["gpus"]:
            cells.append("" if row.gpu_mb is None else f"{row.gpu_mb:.0f}")
        table.append(cells)
    lines.append(format_table(table, range(3, len(table[0]))))
    lines.append("upload is a part of extract; decode (of JPEG), convert and publish are not included in frame")
    if not all(row.calibrated for row in rows):
        lines.append(
            "the calibration was made up, because none is known: with a wrong calibration, a pose takes more time"
        )
    if any(row.comparisons for row in rows):
        lines.append(
            "refine was off, because the others do not track points: without --against, a frame takes more time"
        )
    if not with_ros:
        lines.append("publish was not measured: it needs ROS 2 and the built messages")
    if any(row.comparisons for row in rows):
        lines += [
            "",
            "other implementations, measured in alternation with this package, without the pose; ratio of their time "
            "to ours: median (quartiles)",
        ]
        table = [["", "precision", "image", "keypoints", "work", "matches", "ms", "time ratio", "CPU time ratio"]]
        for row in rows:
            for one in row.comparisons:
                cells = [one.peer, f"ours {row.precision}", f"{row.width}x{row.height}", f"{row.max_keypoints}"]
                cells += [one.work, f"{one.matches:.0f}", _short(one.wall.median)]
                table.append([*cells, _ratio(one.wall_ratio), _ratio(one.cpu_ratio)])
        lines.append(format_table(table, (3, 5, 6)))
    return "\n".join(lines)


def _setting(row: Row) -> str:
    """The networks, and the parameters that differ from the defaults and have no column in the table."""
    others = [
        f"{name} {str(value).lower() if isinstance(value, bool) else value}"
        for name, value in row.parameters.items()
        if name not in _SHOWN
    ]
    return "; ".join([f"{row.extractor} with {row.matcher}", *([", ".join(others)] if others else [])])


def _short(milliseconds: float) -> str:
    return (
        f"{milliseconds:.2f}"
        if milliseconds < 10
        else f"{milliseconds:.1f}"
        if milliseconds < 100
        else (f"{milliseconds:.0f}")
    )


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.lower:.2f} to {spread.upper:.2f})"


def draw(path: Path, rows: list[Row], machine: dict[str, Any]) -> None:
    """Plot the time of a frame against the number of keypoints, with a line for each setting and implementation."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        size = f"{row.width}x{row.height}"
        lines.setdefault(f"kpmatch_ros {row.device} {row.precision} {size}", []).append(
            (row.keypoints, row.frame.median)
        )
        for one in row.comparisons:
            if one.work != "pair":
                kept = one.work.partition(", ")[2]
                label = f"{one.peer} {row.device} {size}" + (f" ({kept})" if kept else "")
                lines.setdefault(label, []).append((row.keypoints, one.wall.median))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, points in lines.items():
        axes.plot(*zip(*sorted(set(points))), marker="o", label=label, linestyle="-" if "kpmatch" in label else "--")
    ticks = sorted({round(row.keypoints) for row in rows})
    if ticks[0] > 0:  # images without keypoints cannot be shown on a logarithmic axis
        axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("keypoints per image")
    axes.set_ylabel("milliseconds per frame")
    axes.set_title(f"{machine['processor']}, {machine['threads']} threads", fontsize=10)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
