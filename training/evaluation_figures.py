"""Figures with intervals from matchers' results, and tables of the figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ANGLES", "Result", "calibration", "describe", "markdown"]

Array = NDArray[np.float64]

ANGLES = (5, 10, 20)  # degrees
LIMITS = (1, 2, 3)  # pixels
CELL = 32  # pixels
RESAMPLES = 2000
INTERVAL = (5, 95)  # percentiles: 90 %
BINS = 10  # of scores


@dataclass(frozen=True)
class Result:
    """The result of a matcher for a pair.

    Attributes:
        points0: (M, 2) points of image 0, pixels.
        scores: (M,) in [0, 1] or NaN.
        errors: (M,) pixels, NaN where the ground truth is unknown.
        max_error: largest error of a correct match, pixels.
        keypoints: number of keypoints in each image.
        poses: (orders,) errors of poses, degrees; None if the pair has no pose.
        place: what the pair shows. Results of pairs of one place are correlated.
    """

    points0: Array
    scores: Array
    errors: Array
    max_error: float
    keypoints: tuple[int, int]
    poses: Array | None
    place: str

    def numbers(self) -> dict[str, float]:
        """Return the numbers to sum over pairs; ``judged`` counts the matches whose ground truth is known."""
        judged = ~np.isnan(self.errors)
        correct = judged & (self.errors <= self.max_error)
        numbers = {
            "keypoints": sum(self.keypoints) / 2,
            "matches": len(self.errors),
            "judged": judged.sum(),
            "right": correct.sum(),
            "precision": correct.sum() / max(judged.sum(), 1),
            "cells": len(np.unique((self.points0[correct] // CELL).astype(int), axis=0)),
        }
        numbers |= {f"within {limit} px": (judged & (self.errors <= limit)).sum() for limit in LIMITS}
        for angle in ANGLES if self.poses is not None else ():
            numbers[f"AUC at {angle}"] = 100 * np.clip(1 - self.poses / angle, 0, None).mean()
        return {name: float(number) for name, number in numbers.items()}


def _mean(name: str) -> Callable[[dict[str, Array]], Array]:
    return lambda sums: sums[name] / sums["pairs"]


def _share(name: str) -> Callable[[dict[str, Array]], Array]:
    return lambda sums: sums[name] / np.maximum(sums["judged"], 1e-9)


FIGURES: dict[str, Callable[[dict[str, Array]], Array]] = {
    **{name: _mean(name) for name in ("keypoints", "matches", "right", "precision", "cells")},
    **{f"within {limit} px": _share(f"within {limit} px") for limit in LIMITS},
    **{f"AUC at {angle}": _mean(f"AUC at {angle}") for angle in ANGLES},
}
"""Figures from sums over pairs, for each resample: means over pairs, and shares of all matches together."""


def _figures(results: Sequence[Result], draws: Array) -> dict[str, Array]:
    """Return each figure (1 + RESAMPLES,) for the pairs themselves and for their resamples."""
    rows = [result.numbers() for result in results]
    sums = {name: draws @ np.array([row[name] for row in rows]) for name in rows[0]} | {"pairs": draws.sum(axis=1)}
    # A figure is left out if its numbers are missing, for example poses of planar pairs.
    return {name: figure(sums) for name, figure in FIGURES.items() if name in sums}


def _draws(places: Sequence[str]) -> Array:
    """Return how often (1 + RESAMPLES, pairs) each pair counts: first once, then as often as its place is drawn.

    Places are drawn with replacement; all pairs of a place are drawn together.
    """
    rng = np.random.default_rng(0)
    names, number = np.unique(np.asarray(places), return_inverse=True)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    return np.concatenate([np.ones((1, len(places))), drawn[:, number]])


def _interval(values: Array) -> dict[str, float]:
    low, high = np.percentile(values[1:], INTERVAL)
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def describe(results: dict[str, list[Result]], reference: str) -> dict[str, Any]:
    """Compute the figures of the matchers for a group, with bootstrap intervals over places.

    Args:
        results: by the matcher's name, for the same pairs in the same order.
        reference: the matcher to which the others' paired differences are computed.
    """
    places = [result.place for result in next(iter(results.values()))]
    draws = _draws(places)
    figures = {name: _figures(found, draws) for name, found in results.items()}
    table: dict[str, Any] = {}
    for name, found in results.items():
        table[name] = {
            "figures": {figure: _interval(values) for figure, values in figures[name].items()},
            "calibration": calibration(found),
        }
        if reference in results and name != reference:
            table[name]["difference"] = {
                figure: _interval(values - figures[reference][figure]) for figure, values in figures[name].items()
            }
    return {"pairs": len(places), "places": len(set(places)), "matchers": table}


def calibration(results: Sequence[Result]) -> dict[str, Any] | None:
    """For each bin of the score, return the number of matches, their mean score, and the share of correct ones.

    ``expected error`` is the mean over matches of the difference between the last two. None without scores.
    """
    scores = np.concatenate([result.scores for result in results])
    correct = np.concatenate([result.errors <= result.max_error for result in results])
    judged = ~np.isnan(np.concatenate([result.errors for result in results])) & ~np.isnan(scores)
    if not judged.any():
        return None
    scores, correct = scores[judged], correct[judged]
    number = np.minimum((scores * BINS).astype(int), BINS - 1)
    bins, error = [], 0.0
    for each in range(BINS):
        here = number == each
        if here.any():
            score, share = scores[here].mean(), correct[here].mean()
            bins.append({"matches": int(here.sum()), "score": float(score), "right": float(share)})
            error += here.mean() * abs(score - share)
    return {"expected error": float(error), "bins": bins}


# --- tables ----------------------------------------------------------------------------------------------------------


def markdown(groups: dict[str, Any], reference: str) -> str:
    """Format the figures of :func:`describe` by group as Markdown tables."""
    parts = []
    for group, described in groups.items():
        matchers = described["matchers"]
        posed = any(f"AUC at {ANGLES[0]}" in row["figures"] for row in matchers.values())
        header = ["matcher", "matches", "correct", "precision", "≤ 1 / 2 / 3 px (%)", "cells"]
        header += [f"AUC at {'/'.join(map(str, ANGLES))}°", f"AUC at 10°, difference to {reference}"] if posed else []
        header += [f"≤ 1 px, difference to {reference}", "calibration error"]
        pairs, places = described["pairs"], described["places"]
        title = f"### {group}, {pairs} pairs" + (f" of {places} places" if places < pairs else "")
        lines = [title, "", _row(header), _row(["---"] * len(header))]
        lines += [_row(_cells(name, row, posed)) for name, row in matchers.items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _cells(name: str, row: dict[str, Any], posed: bool) -> list[str]:
    def value(figure: str, factor: float = 1, digits: int = 0) -> str:
        return f"{factor * row['figures'][figure]['value']:.{digits}f}"

    def difference(figure: str, factor: float = 1) -> str:
        if "difference" not in row:
            return ""
        d = row["difference"][figure]
        return f"{factor * d['value']:+.1f} ({factor * d['low']:+.1f} to {factor * d['high']:+.1f})"

    cells = [name, value("matches"), value("right"), value("precision", 1, 3)]
    cells.append(" / ".join(value(f"within {limit} px", 100) for limit in LIMITS))
    cells.append(value("cells", 1, 1))
    if posed:
        cells.append(" / ".join(value(f"AUC at {angle}", 1, 1) for angle in ANGLES))
        cells.append(difference("AUC at 10"))
    cells.append(difference("within 1 px", 100))
    calibrated = row["calibration"]
    cells.append(
        "" if calibrated is None or math.isnan(calibrated["expected error"]) else f"{calibrated['expected error']:.3f}"
    )
    return cells


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
