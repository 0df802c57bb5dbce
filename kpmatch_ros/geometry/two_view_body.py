"""Matches on the robot's own body, which stand still in the image while the scene moves."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kpmatch_ros.geometry.robust import FALSE_ALARM_RATE, design_effect, log_false_alarms
from kpmatch_ros.geometry.two_modes import rival_of
from kpmatch_ros.geometry.two_view_errors import Motion, agrees, gains, lengths, residual_sizes, rotation_residuals
from kpmatch_ros.geometry.two_view_motion import best_candidate
from kpmatch_ros.geometry.two_view_problem import Problem
from kpmatch_ros.geometry.two_view_search import search_motions, search_translations

__all__ = ["Body", "find_own_body"]

# The scene has at least _SMALLEST_SCENE of the matches. Its motion explains at least _EXPLAINED of the scene. Matches
# that stand still support this motion by at most _CONTRADICTED of the support by the scene's matches.
_SMALLEST_SCENE = 0.2
_EXPLAINED = 0.6
_CONTRADICTED = 0.5


class Body(NamedTuple):
    """Mask (n,) of matches on the robot's own body, None without any; and candidates for the others' motion."""

    mask: np.ndarray | None
    candidates: list[Motion]


def find_own_body(problem: Problem) -> Body:
    """Test whether the matches that stand still in the image contradict the motion of the rest.

    If they do, they are on an object that moves with the camera, like the robot's own body, or the camera stands still
    in front of a moving object.
    """
    matches, inlier_threshold = problem.matches, problem.inlier_threshold
    still = lengths(rotation_residuals(matches, np.eye(3))) < inlier_threshold
    if still.sum() < problem.required or (~still).sum() < max(problem.required, _SMALLEST_SCENE * len(matches)):
        return Body(None, [])
    scene, body = problem.select(~still), problem.select(still)
    fewest = _EXPLAINED * len(scene.matches)
    own = search_motions(scene.matches, inlier_threshold, problem.normalised_threshold, fewest=fewest)
    found = best_candidate(scene.matches, own, inlier_threshold)
    if found is None:
        return Body(None, [])
    agreeing = agrees(scene.matches, found, inlier_threshold)
    if agreeing.sum() < fewest:
        return Body(None, [])
    if not _contradicts(scene, body, found, agreeing):
        return Body(None, own)
    whole = search_motions(matches, inlier_threshold, problem.normalised_threshold, 1)
    whole += search_translations(scene.matches, np.eye(3), inlier_threshold)
    both = best_candidate(matches, [found, *whole], inlier_threshold)
    assert both is not None
    agreeing_both = agrees(scene.matches, both, inlier_threshold)
    if agreeing_both.mean() >= _EXPLAINED:
        return Body(still, own) if _contradicts(scene, body, both, agreeing_both) else Body(None, [both, *whole])
    effect = design_effect(agreeing, problem.independent_points)
    if rival_of(scene.matches, found, both, inlier_threshold, scene.deviation(found), effect).is_consistent:
        return Body(None, [both, *whole])
    return Body(still, own)


def _contradicts(scene: Problem, body: Problem, motion: Motion, agree: np.ndarray) -> bool:
    """Whether a motion that explains the scene's matches in the mask `agree` does not explain the body."""
    inlier_threshold = scene.inlier_threshold
    if log_false_alarms(agree, np.full(len(agree), scene.chance), 5) > math.log(FALSE_ALARM_RATE):
        return False
    deviation = scene.deviation(motion)
    support = [
        gains(residual_sizes(side.matches, motion, inlier_threshold), deviation, inlier_threshold)
        for side in (scene, body)
    ]
    return bool(support[1].mean() <= _CONTRADICTED * support[0][agree].mean())
