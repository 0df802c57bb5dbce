"""Other motions that explain the matches of two views: the likelihood's profile over the translation's direction.

Where the geometry constrains the motion little, as with few surfaces or with matches in a small part of the image, the
likelihood has more than one maximum. Far from each other, they may be nearly as high. The covariance of one does not
tell of the others.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from kpmatch_ros.geometry import compiled
from kpmatch_ros.geometry.robust import SMALLEST_CURVATURE, TINY, TUKEY
from kpmatch_ros.geometry.two_view_errors import Matches, Motion, depths, gains

__all__ = ["profile_covariance", "profile_directions", "refine_turns"]

_DIRECTIONS = 60  # of half a sphere: 15 degrees apart
_CUTOFFS = (8.0, 4.0, 2.0, 2.0, 2.0)  # inlier thresholds: where Tukey's loss ends, step by step
_SMALLEST = 0.01  # deviation, inlier thresholds
_FOUND = 5  # motions, at most
_BAND = 10.0  # inlier thresholds: where wrong matches are; with a narrow band, right ones would tell less than they do
_STEPS = (15, 5)  # of directions along the ridge and across it
_REACH = (8.0, 3.0)  # standard deviations, at first
# The reach is doubled where the likelihood is not low at the end: three standard deviations are 4.5 of its logarithm.
# Of poses of a plane in a strip of an image, 10 of 90 were wrong and sure without it, 4 of 97 after one time, 2 of 90
# after two.
_GROWTHS, _RIM = 2, 4.5
_LOST = 100.0  # of log-likelihood: a motion so far below the likeliest counts nothing, even by a tenth of that
_SAME = 1e-6  # variances of the noise: by less, only rounding changes residuals
_FARTHEST = math.radians(60.0)
_SINGULAR = 1e-12  # part of the largest eigenvalue
_NOT_LOST = 1e-14  # part of the trace: above rounding
_APART = math.cos(math.radians(10.0))


def profile_directions(
    matches: Matches, rotations: list[np.ndarray], inlier_threshold: float, deviation: float
) -> list[Motion]:
    """The likeliest motions whose directions of translation are more than 10 degrees apart, the likeliest first.

    For each of many directions, the rotation is refined by Gauss-Newton, from each start, for all at once. The noise is
    taken to be alike in all directions.

    Args:
        matches: some of them, wrong ones too.
        rotations: where to start, (3, 3) each.
        inlier_threshold: largest residual of an inlier, pixels.
        deviation: standard deviation of the keypoints' noise, pixels.
    """
    shifts = np.tile(_half_sphere(_DIRECTIONS), (len(rotations), 1))
    turns = np.repeat(np.array(rotations), _DIRECTIONS, axis=0)
    turns, residuals = refine_turns(matches, turns, shifts, _CUTOFFS, inlier_threshold, deviation)
    scores = gains(np.abs(residuals), deviation, inlier_threshold).sum(axis=1)
    found: list[Motion] = []
    for index in np.argsort(-scores, kind="stable"):
        if len(found) < _FOUND and all(abs(shifts[index] @ one.translation) < _APART for one in found):
            near = matches.select(np.abs(residuals[index]) < inlier_threshold)
            found.append(_facing(near, Motion(turns[index], shifts[index])))
    return found


def profile_covariance(
    matches: Matches,
    motion: Motion,
    covariance: np.ndarray,
    inlier_threshold: float,
    deviation: float,
    evidence: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Covariances (6, 6) of a motion by the likelihood around it, nowhere smaller than that by its curvature.

    Where the geometry constrains the motion little, the likelihood is a long, bent ridge. Its curvature at the top does
    not tell how long. Over a grid of directions around the motion's, the rotation is refined, and the second moments
    about the motion are taken, weighted by the likelihood, as far as it tells.

    Args:
        matches: some of them, wrong ones too.
        motion: the likeliest one.
        covariance: (6, 6) of the translation's direction and the rotation, by the likelihood's curvature.
        inlier_threshold: largest residual of an inlier, pixels.
        deviation: standard deviation of the keypoints' noise, pixels.
        evidence: how many independent matches each of these stands for.

    Returns:
        by the likelihood as far as its curvature says that it reaches, and as far as it does.
    """
    variances, axes = np.linalg.eigh(covariance[:3, :3])
    reach = np.minimum(np.sqrt(np.maximum(variances[:0:-1], TINY)) * _REACH, _FARTHEST)
    # To first order, the rotation follows the direction like this.
    follow = covariance[3:, :3] @ np.linalg.pinv(covariance[:3, :3], rcond=1e-9, hermitian=True)
    found = [covariance]
    for _ in range(1 + _GROWTHS):
        along, across = (np.linspace(-length, length, steps) for length, steps in zip(reach, _STEPS))
        offsets = np.array([[a, b] for a in along for b in across]) @ axes[:, :0:-1].T
        angles = np.linalg.norm(offsets, axis=1, keepdims=True)
        shifts = np.cos(angles) * motion.translation + np.sinc(angles / math.pi) * offsets
        turns = _turned(np.tile(motion.rotation, (len(shifts), 1, 1)), offsets @ follow.T)
        turns, residuals = refine_turns(matches, turns, shifts, _CUTOFFS[-3:], inlier_threshold, deviation)
        scores = evidence * gains(np.abs(residuals), deviation, _BAND * inlier_threshold).sum(axis=1)
        losses = scores.max() - scores
        some = np.append(np.flatnonzero(losses < _LOST), len(losses) // 2)
        losses[some] *= _told(matches, turns[some], shifts[some], residuals[some], deviation)
        grid = losses.reshape(_STEPS)
        weights = np.exp(-losses)
        changes = turns @ motion.rotation.T
        away = np.concatenate([offsets, np.array([cv2.Rodrigues(change)[0][:, 0] for change in changes])], axis=1)
        moments = (away.T * weights) @ away / weights.sum()
        moments[3:, 3:] += covariance[3:, 3:] - follow @ covariance[:3, 3:]
        found.append(_larger(found[-1], moments))
        # A curvature that is too sharp makes the grid too short. The longer one is coarser: both count.
        short = np.array([grid[[0, -1]].min(), grid[:, [0, -1]].min()]) < _RIM
        if not (short & (reach < _FARTHEST)).any():
            break
        reach = np.minimum(np.where(short, 2 * reach, reach), _FARTHEST)
    return found[1], found[-1]


def _larger(covariance: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """The covariance (6, 6), enlarged in the directions in which the second moments (6, 6) are larger."""
    values, axes = np.linalg.eigh(covariance)
    axes = axes[:, 1:] * np.sqrt(np.maximum(values[1:], _SINGULAR * values[-1]))  # but for the translation's length
    inverse = np.linalg.pinv(axes)
    values, turn = np.linalg.eigh(inverse @ moments @ inverse.T)
    axes = axes @ turn * np.sqrt(np.maximum(values, 1.0))
    return np.asarray(axes @ axes.T)


def refine_turns(
    matches: Matches,
    turns: np.ndarray,
    shifts: np.ndarray,
    cutoffs: tuple[float, ...],
    inlier_threshold: float,
    deviation: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Rotations (k, 3, 3) refined by Gauss-Newton, each with its direction of translation (k, 3), for all at once.

    Args:
        matches: n of them.
        turns: where to start.
        shifts: directions.
        cutoffs: inlier thresholds where Tukey's loss ends, step by step.
        inlier_threshold: largest residual of an inlier, pixels.
        deviation: standard deviation of the keypoints' noise, pixels.

    Returns:
        the rotations, and the Sampson distances (k, n) that they leave.
    """
    pixels = [cutoff * inlier_threshold for cutoff in cutoffs]
    # A trust of a tenth of a radian keeps the system regular, also where there is no noise. Through a lens that
    # enlarges a thousand times this is lost to rounding, and a part of the trace is what is not.
    trust = 100 * max(deviation, _SMALLEST * inlier_threshold) ** 2
    if compiled.available():
        return compiled.refine_turns(matches.columns, turns, shifts, pixels, trust)
    # A change here is one of src/two_view.c, too.
    for cutoff in pixels:
        residuals, jacobian = _evaluate(matches, turns, shifts)
        weights = np.maximum(1 - (residuals / cutoff) ** 2, 0.0) ** 2
        weighted = jacobian * weights[:, None]
        hessian = weighted @ jacobian.transpose(0, 2, 1)
        gradient = (weighted @ residuals[..., None])[..., 0]
        trusts = np.maximum(trust, _NOT_LOST * np.trace(hessian, axis1=1, axis2=2))
        hessian[:, range(3), range(3)] += trusts[:, None]
        turns = _turned(turns, -np.linalg.solve(hessian, gradient[..., None])[..., 0])
    return turns, _evaluate(matches, turns, shifts)[0]


def _told(
    matches: Matches, turns: np.ndarray, shifts: np.ndarray, residuals: np.ndarray, deviation: float
) -> np.ndarray:
    """How much of a log-likelihood's difference counts, between each of k motions and the last one: (k,), 0.1 to 1.

    From one motion to the other, a residual changes by where the match is, and by the keypoints' noise along the
    epipolar line, for this turns. The first change tells the motions apart, and its square is expected to be twice the
    difference. With the second one, the right motion's log-likelihood is lower, by the ratio of both to the first. Of a
    plane in a strip of an image, 640 x 160 pixels at 0.3 pixels of noise, noise is 85 % of the change along the
    likelihood's ridge; of a plane that fills 640 x 480 pixels, 8 %.
    """
    essentials = np.cross(shifts[:, :, None], turns, axis=1)
    pixel0, pixel1 = (np.sqrt((noise[0] + noise[2]) / 2) for noise in (matches.noise0, matches.noise1))
    normals = np.empty((len(turns), 4, len(matches)))  # of the right matches, in their four coordinates, pixels
    np.matmul(essentials[:, :2], matches.rays1 * pixel0, out=normals[:, :2])
    np.matmul(essentials[:, :, :2].transpose(0, 2, 1), matches.rays0 * pixel1, out=normals[:, 2:])
    normals /= np.sqrt(np.maximum(np.einsum("kin,kin->kn", normals, normals), TINY))[:, None]
    near = np.abs(residuals) < TUKEY * deviation
    near &= near[-1]
    changed = ((residuals - residuals[-1]) ** 2 * near).sum(axis=1)
    turned = (2 * (1 - np.einsum("kin,in->kn", normals, normals[-1])) * near).sum(axis=1)
    return np.clip(1 - deviation**2 * turned / np.maximum(changed, _SAME * deviation**2), SMALLEST_CURVATURE, 1.0)


def _evaluate(matches: Matches, turns: np.ndarray, shifts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sampson distances (k, n) of k motions and their jacobian (k, 3, n) by the rotation, with a constant variance."""
    rays0, noise0, noise1 = (
        matches.rays0,
        (matches.noise0[0] + matches.noise0[2]) / 2,
        (matches.noise1[0] + matches.noise1[2]) / 2,
    )
    turned = turns @ matches.rays1
    normals = _cross(np.broadcast_to(rays0, turned.shape), shifts[:, :, None])
    line0_x = shifts[:, 1, None] * turned[:, 2] - shifts[:, 2, None] * turned[:, 1]
    line0_y = shifts[:, 2, None] * turned[:, 0] - shifts[:, 0, None] * turned[:, 2]
    line1 = turns[:, :, :2].transpose(0, 2, 1) @ normals
    variance = noise0 * (line0_x**2 + line0_y**2) + noise1 * (line1[:, 0] ** 2 + line1[:, 1] ** 2)
    precision = 1 / np.sqrt(np.maximum(variance, TINY))
    residuals = (turned * normals).sum(axis=1) * precision
    return residuals, _cross(turned, normals) * precision[:, None]


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cross products of vectors (k, 3, n)."""
    return np.stack(
        [
            a[:, 1] * b[:, 2] - a[:, 2] * b[:, 1],
            a[:, 2] * b[:, 0] - a[:, 0] * b[:, 2],
            a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0],
        ],
        axis=1,
    )


def _turned(turns: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Rotations (k, 3, 3) after steps (k, 3) of angles about the axes (Rodrigues)."""
    angles = np.maximum(np.linalg.norm(steps, axis=1), 1e-12)[:, None, None]
    x, y, z = steps.T
    zero = np.zeros_like(x)
    cross = np.array([[zero, -z, y], [z, zero, -x], [-y, x, zero]]).transpose(2, 0, 1) / angles
    return (np.eye(3) + np.sin(angles) * cross + (1 - np.cos(angles)) * (cross @ cross)) @ turns


def _facing(near: Matches, motion: Motion) -> Motion:
    """The motion, or its opposite: that which has more of the matches in front of both cameras."""
    depth0, depth1, _ = depths(near, motion)
    forward, backward = (np.minimum(depth0, depth1) > 0).sum(), (np.maximum(depth0, depth1) < 0).sum()
    return motion if forward >= backward else Motion(motion.rotation, -motion.translation)


def _half_sphere(count: int) -> np.ndarray:
    """Directions (count, 3), evenly spread over the half of the sphere with z above zero (a Fibonacci lattice)."""
    z = (np.arange(count) + 0.5) / count
    angle = math.pi * (1 + math.sqrt(5)) * np.arange(count)
    radius = np.sqrt(1 - z * z)
    return np.column_stack([radius * np.cos(angle), radius * np.sin(angle), z])
