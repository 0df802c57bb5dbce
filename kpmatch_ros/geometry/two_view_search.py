"""Candidates for the motion of two views, from random samples of their matches."""

from __future__ import annotations

import cv2
import numpy as np

from kpmatch_ros.geometry.robust import TINY
from kpmatch_ros.geometry.two_view_errors import (
    Matches,
    Motion,
    depths,
    epipolar_residuals,
    lengths,
    project_turned,
    rotation_residuals,
    whiten,
)

__all__ = ["SAMPLE", "search_motions", "search_translations"]

SAMPLE = 200
"""Largest number of matches that a search uses. It is enough to find a motion, which all matches then refine."""

_SEARCHES = 2  # with different seeds and different matches, because one search in twenty ends in a wrong optimum
_SEARCH_ITERATIONS = 2000
_TRANSLATIONS = 200  # directions tried with a given rotation
_VOTERS = 120  # matches that vote for them


def search_motions(
    matches: Matches, inlier_threshold: float, normalised_threshold: float, searches: int = _SEARCHES
) -> list[Motion]:
    """Candidates by RANSAC with several seeds. `normalised_threshold` is the inlier threshold in normalised units."""
    candidates = []
    for seed in range(searches):
        params = cv2.UsacParams()
        params.randomGeneratorState = seed
        params.isParallel = False  # otherwise the result changes from call to call
        params.sampler = cv2.SAMPLING_UNIFORM
        params.score = cv2.SCORE_METHOD_MSAC  # OpenCV's MAGSAC fails with points that are not in pixels
        params.loMethod = cv2.LOCAL_OPTIM_INNER_LO
        params.loIterations = 10
        params.loSampleSize = 14
        params.maxIterations = _SEARCH_ITERATIONS
        params.confidence = 0.999
        params.threshold = normalised_threshold
        sample = matches.sample(SAMPLE, seed)
        rays1, rays0 = (np.ascontiguousarray(rays[:2].T) for rays in (sample.rays1, sample.rays0))
        nothing = np.zeros(0)
        try:
            essential, _ = cv2.findEssentialMat(rays1, rays0, np.eye(3), np.eye(3), nothing, nothing, params)
        except cv2.error:  # degenerate points
            continue
        if essential is not None and essential.shape == (3, 3) and np.isfinite(essential).all():
            candidates.append(_decompose(essential, sample, inlier_threshold, normalised_threshold))
    return candidates


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
