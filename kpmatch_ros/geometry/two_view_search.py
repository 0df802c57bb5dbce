"""Candidates for the motion of two views, from random samples of their matches."""

from __future__ import annotations

import functools
import math

import cv2
import numpy as np

from kpmatch_ros.geometry.five_point import POINTS, best_essential
from kpmatch_ros.geometry.robust import TINY
from kpmatch_ros.geometry.two_view_errors import (
    Matches,
    Model,
    Motion,
    depths,
    epipolar_residuals,
    lengths,
    project_turned,
    rotation_residuals,
    whiten,
)
from kpmatch_ros.geometry.two_view_fit import minimise

__all__ = ["SAMPLE", "draw_samples", "search_motions", "search_translations"]

SAMPLE = 200
"""Largest number of matches that a search uses. It is enough to find a motion, which all matches then refine."""

_SEARCHES = 2  # with different seeds and different matches, because one search in twenty ends in a wrong optimum
_LOOKS = (64, 128, 256, 512, 1024, 2048, 3072)  # numbers of samples after which the best one is refined
_MISSED = 1e-3  # probability that no sample has only inliers, at which a search ends
_REFINED = 5  # iterations that refine the motion of a sample
_REFINED_CUTOFF = 3.0  # inlier thresholds, beyond which a match does not count there
_TRANSLATIONS = 200  # directions tried with a given rotation
_VOTERS = 120  # matches that vote for them


def search_motions(
    matches: Matches,
    inlier_threshold: float,
    normalised_threshold: float,
    searches: int = _SEARCHES,
    fewest: float = 0.0,
) -> list[Motion]:
    """Candidates by RANSAC with several seeds.

    Args:
        normalised_threshold: the inlier threshold in normalised units.
        fewest: number of inliers below which a motion is of no interest. The fewer matches that is, the longer the
            search for a motion that does not exist.
    """
    share = fewest / max(len(matches), 1)
    found = (
        _search(matches.sample(SAMPLE, seed), inlier_threshold, normalised_threshold, seed, share)
        for seed in range(searches)
    )
    return [motion for motion in found if motion is not None]


def _search(
    matches: Matches, inlier_threshold: float, normalised_threshold: float, seed: int, share: float
) -> Motion | None:
    """The motion with the lowest cost, by RANSAC with local optimisation (Chum, Matas, Kittler, DAGM 2003).

    A sample of noisy inliers costs more than the refined motion of another one. Therefore samples are compared with
    samples: at each look, the motion of the best one is refined if none before cost less.
    """
    if len(matches) < POINTS:
        return None
    best, lowest, lowest_of_samples, needed = None, math.inf, math.inf, _samples_needed(share)
    for start, end in zip((0, *_LOOKS), _LOOKS):
        if start >= needed:
            break
        end = min(end, math.ceil(needed))
        samples = draw_samples(len(matches), _chances(seed)[start:end])
        found = best_essential(matches, samples, inlier_threshold, lowest_of_samples)
        if found is None:
            continue
        essential, lowest_of_samples = found
        motion = _decompose(essential, matches, inlier_threshold, normalised_threshold)
        motion = minimise(Model.EPIPOLAR, matches, motion, _REFINED_CUTOFF * inlier_threshold, _REFINED)
        squares, limit = epipolar_residuals(matches, motion) ** 2, inlier_threshold**2
        cost = float(np.minimum(squares, limit).sum())
        if cost < lowest:
            best, lowest = motion, cost
            needed = min(needed, _samples_needed(float((squares < limit).mean())))
    return best


def _samples_needed(share: float) -> float:
    """The number of samples of which one has only inliers, but for a probability of _MISSED; at least the first look.

    The scene may be weak, so that a sample with only inliers is not enough.
    """
    return max(_LOOKS[0], math.log(_MISSED) / math.log1p(-(min(max(share, 0.01), 0.999) ** POINTS)))


def draw_samples(count: int, chances: np.ndarray) -> np.ndarray:
    """Samples (s, 5) int32 of different indices below `count`, from random numbers (s, 5) between 0 and 1."""
    chosen = (chances * (count - np.arange(POINTS))).astype(np.int32)
    # Each number counts the indices that are left. It skips those chosen before, in ascending order.
    for column in range(1, POINTS):
        for before in np.sort(chosen[:, :column], axis=1).T:
            chosen[:, column] += chosen[:, column] >= before
    return chosen


@functools.lru_cache(maxsize=8)
def _chances(seed: int) -> np.ndarray:
    """Random numbers (s, 5) between 0 and 1, the same for the same seed."""
    chances = np.random.default_rng(seed).random((_LOOKS[-1], POINTS))
    chances.setflags(write=False)
    return chances


def _decompose(essential: np.ndarray, matches: Matches, inlier_threshold: float, normalised_threshold: float) -> Motion:
    """The one of the four motions of an essential matrix that has most matches in front of both cameras."""
    *rotations, translation = cv2.decomposeEssentialMat(essential)
    shift = translation.ravel()
    near = matches.select(np.abs(epipolar_residuals(matches, Motion(rotations[0], shift))) < inlier_threshold)
    votes = []
    for rotation in rotations:
        depth0, depth1, squared_sine = depths(near, Motion(rotation, shift))
        # A match that the rotation alone explains has a depth of uncertain sign. Half a vote distinguishes rotations.
        weights = 0.5 + 0.5 * (squared_sine > normalised_threshold**2)
        votes.append((float(weights[np.minimum(depth0, depth1) > 0].sum()), Motion(rotation, shift)))
        votes.append((float(weights[np.maximum(depth0, depth1) < 0].sum()), Motion(rotation, -shift)))
    return max(votes, key=lambda vote: vote[0])[1]


def search_translations(matches: Matches, rotation: np.ndarray, inlier_threshold: float) -> list[Motion]:
    """The translation that most of these matches agree with, given the rotation: RANSAC with samples of two matches.

    It finds the few near points of a scene that is mostly far away, where samples of five rarely contain two of them.
    """
    if len(matches) < 2:
        return []
    matches = matches.sample(_VOTERS)
    normals = np.cross(matches.rays0, rotation @ matches.rays1, axis=0)  # of the epipolar planes
    pairs = np.random.default_rng(0).integers(len(matches), size=(_TRANSLATIONS, 2))
    directions = np.cross(normals[:, pairs[:, 0]], normals[:, pairs[:, 1]], axis=0)  # intersections of two such planes
    directions = (directions / np.maximum(lengths(directions), TINY)).astype(np.float32)
    # Inverse depth moves a match from its rotated position by a positive multiple of t_xy - t_z (x, y).
    projected, _, factors = project_turned(matches, rotation)
    (x, y), factors = projected.astype(np.float32)[:, :, None], factors.astype(np.float32)[:, :, None]
    away = whiten(directions[0] - x * directions[2], directions[1] - y * directions[2], factors)
    residual = rotation_residuals(matches, rotation)[:, :, None].astype(np.float32)
    across = residual[0] * away[1] - residual[1] * away[0]
    along = residual[0] * away[0] + residual[1] * away[1]
    near = across * across < inlier_threshold**2 * (away[0] * away[0] + away[1] * away[1])
    votes = np.array([(near & (along > 0)).sum(axis=0), (near & (along < 0)).sum(axis=0)])
    backwards, best = np.unravel_index(votes.argmax(), votes.shape)
    if votes[backwards, best] == 0:
        return []
    translation = directions[:, best].astype(np.float64) * (-1 if backwards else 1)
    return [Motion(rotation, translation / np.linalg.norm(translation))]
