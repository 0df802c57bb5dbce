"""Candidates for the motion of two views, from samples of their matches."""

from __future__ import annotations

import cv2
import numpy as np

from kpmatch_ros.geometry.robust import TINY
from kpmatch_ros.geometry.two_view_errors import (
    Matches,
    Motion,
    disagreement,
    project_turned,
    rotation_residuals,
    whiten,
)

__all__ = ["search_motions", "search_translations"]

_SEARCHES = 2  # from different seeds: one in twenty ends in a wrong optimum
_SEARCH_ITERATIONS = 2000
_TRANSLATIONS = 200  # tried with the rotation given


def search_motions(matches: Matches, inlier_threshold: float, normalised_threshold: float) -> list[Motion]:
    """Candidates: RANSAC from several seeds. `normalised_threshold` is the inlier threshold in normalised units."""
    candidates = []
    for seed in range(_SEARCHES):
        params = cv2.UsacParams()
        params.randomGeneratorState = seed
        params.isParallel = False  # or the answer changes from call to call
        params.sampler = cv2.SAMPLING_UNIFORM
        params.score = cv2.SCORE_METHOD_MSAC  # OpenCV's MAGSAC was three to five times less accurate
        params.loMethod = cv2.LOCAL_OPTIM_INNER_LO
        params.loIterations = 10
        params.loSampleSize = 14
        params.maxIterations = _SEARCH_ITERATIONS
        params.confidence = 0.999
        params.threshold = normalised_threshold
        rays1, rays0 = matches.rays1[:, :2].copy(), matches.rays0[:, :2].copy()
        nothing = np.zeros(0)
        try:
            essential, _ = cv2.findEssentialMat(rays1, rays0, np.eye(3), np.eye(3), nothing, nothing, params)
        except cv2.error:  # degenerate points
            continue
        if essential is None or essential.shape != (3, 3) or not np.isfinite(essential).all():
            continue
        rotation0, rotation1, translation = cv2.decomposeEssentialMat(essential)
        four = [
            Motion(rotation, sign * translation.ravel()) for rotation in (rotation0, rotation1) for sign in (1.0, -1.0)
        ]
        candidates.append(min(four, key=lambda motion: disagreement(matches, motion, inlier_threshold)))
    return candidates


def search_translations(matches: Matches, rotation: np.ndarray, inlier_threshold: float) -> list[Motion]:
    """The translation that most of these matches agree with, given the rotation: RANSAC with two matches a sample.

    It finds the few near points of a scene that is mostly far away, where samples of five rarely hold two of them.
    """
    if len(matches) < 2:
        return []
    normals = np.cross(matches.rays0, matches.rays1 @ rotation.T)  # of the epipolar planes, which hold the translation
    pairs = np.random.default_rng(0).integers(len(matches), size=(_TRANSLATIONS, 2))
    directions = np.cross(normals[pairs[:, 0]], normals[pairs[:, 1]]).T
    directions = (directions / np.maximum(np.linalg.norm(directions, axis=0), TINY)).astype(np.float32)
    # Nearness moves a match from where the rotation takes it by a positive multiple of t_xy - t_z (x, y).
    projected, _, factors = project_turned(matches, rotation)
    (x, y), factors = projected.astype(np.float32)[:, :, None], factors.astype(np.float32)[:, :, None]
    away = whiten(directions[0] - x * directions[2], directions[1] - y * directions[2], factors)
    residual = rotation_residuals(matches, rotation).T[:, :, None].astype(np.float32)
    across = np.abs(residual[0] * away[1] - residual[1] * away[0])
    along = residual[0] * away[0] + residual[1] * away[1]
    near = across < inlier_threshold * np.sqrt(away[0] ** 2 + away[1] ** 2)
    votes = np.array([(near & (along > 0)).sum(axis=0), (near & (along < 0)).sum(axis=0)])
    backwards, best = np.unravel_index(votes.argmax(), votes.shape)
    if votes[backwards, best] == 0:
        return []
    translation = directions[:, best].astype(np.float64) * (-1 if backwards else 1)
    return [Motion(rotation, translation / np.linalg.norm(translation))]
