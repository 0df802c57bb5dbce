"""Other motions that explain the matches of two views: the likelihood's profile over the translation's direction.

If the geometry is weak, as with few surfaces or with matches in a small part of the image, the likelihood has more than
one maximum. Distant maxima may be almost equally high. The covariance at one maximum does not include the others.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial.transform import Rotation

from kpmatch_ros.geometry import compiled
from kpmatch_ros.geometry.robust import SMALLEST_CURVATURE, TINY, TUKEY
from kpmatch_ros.geometry.two_view_errors import Matches, Motion, depths, gains

__all__ = ["profile_covariance", "profile_directions", "refine_turns"]

_DIRECTIONS = 60  # over half a sphere: 15 degrees apart
_CUTOFFS = (8.0, 4.0, 2.0, 2.0, 2.0)  # cutoffs of Tukey's loss in successive steps, in inlier thresholds
_SMALLEST = 0.01  # smallest deviation, in inlier thresholds
_MOST_MOTIONS = 5  # that profile_directions returns
_BAND = 10.0  # inlier thresholds: range of wrong matches; a narrow one would understate the weight of correct matches
_STEPS = (15, 5)  # directions along the ridge and across it
_REACH = (8.0, 3.0)  # standard deviations, first reach of the grid
# The reach is doubled if the likelihood is not low at the end: three standard deviations are 4.5 of its logarithm. For
# a plane in a strip of an image, 10 of 90 poses were overconfident (OK, but wrong) without doubling, 4 of 97 after one
# doubling, and 2 of 90 after two.
_GROWTHS, _RIM = 2, 4.5
_NEGLIGIBLE = 100.0  # log-likelihood below the maximum: no weight, even with a tenth of the difference
_SAME = 1e-6  # variances of the noise: smaller changes of residuals are rounding
_FARTHEST = math.radians(60.0)
_SINGULAR = 1e-12  # relative to the largest eigenvalue
_ABOVE_ROUNDING = 1e-14  # relative to the trace
_APART = math.cos(math.radians(10.0))


def profile_directions(
    matches: Matches, rotations: list[np.ndarray], inlier_threshold: float, deviation: float
) -> list[Motion]:
    """The likeliest motions with directions of translation more than 10 degrees apart, in decreasing likelihood.

    For each of many directions, Gauss-Newton refines the rotation from each start, for all of them at once. The noise
    is assumed to be the same in all directions of the image.

    Args:
        matches: a sample of them, including wrong ones.
        rotations: starts, (3, 3) each.
        inlier_threshold: largest residual of an inlier, pixels.
        deviation: standard deviation of the keypoints' noise, pixels.
    """
    shifts = np.tile(_half_sphere(_DIRECTIONS), (len(rotations), 1))
    turns = np.repeat(np.array(rotations), _DIRECTIONS, axis=0)
    turns, residuals = refine_turns(matches, turns, shifts, _CUTOFFS, inlier_threshold, deviation)
    scores = gains(np.abs(residuals), deviation, inlier_threshold).sum(axis=1)
    found: list[Motion] = []
    for index in np.argsort(-scores, kind="stable"):
        if len(found) < _MOST_MOTIONS and all(abs(shifts[index] @ one.translation) < _APART for one in found):
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
    """Covariances (6, 6) of a motion from the likelihood around it, at least as large as that from its curvature.

    If the geometry is weak, the likelihood is a long, curved ridge. Its curvature at the top does not show its length.
    This function refines the rotation on a grid of directions around the motion's. It returns the second moments about
    the motion, weighted by the likelihood.

    Args:
        matches: a sample of them, including wrong ones.
        motion: the likeliest motion.
        covariance: (6, 6) of the translation's direction and the rotation, from the likelihood's curvature.
        inlier_threshold: largest residual of an inlier, pixels.
        deviation: standard deviation of the keypoints' noise, pixels.
        evidence: number of independent matches that each of these matches represents.

    Returns:
        the covariance on the first grid, whose reach comes from the curvature, and on the last grid.
    """
    variances, axes = np.linalg.eigh(covariance[:3, :3])
    reach = np.minimum(np.sqrt(np.maximum(variances[:0:-1], TINY)) * _REACH, _FARTHEST)
    # First-order change of the rotation with the direction.
    response = covariance[3:, :3] @ np.linalg.pinv(covariance[:3, :3], rcond=1e-9, hermitian=True)
    found = [covariance]
    for _ in range(1 + _GROWTHS):
        along, across = (np.linspace(-length, length, steps) for length, steps in zip(reach, _STEPS))
        offsets = np.array([[a, b] for a in along for b in across]) @ axes[:, :0:-1].T
        angles = np.linalg.norm(offsets, axis=1, keepdims=True)
        shifts = np.cos(angles) * motion.translation + np.sinc(angles / math.pi) * offsets
        turns = _turned(np.tile(motion.rotation, (len(shifts), 1, 1)), offsets @ response.T)
        turns, residuals = refine_turns(matches, turns, shifts, _CUTOFFS[-3:], inlier_threshold, deviation)
        scores = evidence * gains(np.abs(residuals), deviation, _BAND * inlier_threshold).sum(axis=1)
        losses = scores.max() - scores
        some = np.append(np.flatnonzero(losses < _NEGLIGIBLE), len(losses) // 2)
        losses[some] *= _informative_part(matches, turns[some], shifts[some], residuals[some], deviation)
        grid = losses.reshape(_STEPS)
        weights = np.exp(-losses)
        changes = turns @ motion.rotation.T
        away = np.concatenate([offsets, Rotation.from_matrix(changes).as_rotvec()], axis=1)  # cv2: 0 below 1e-5
        moments = (away.T * weights) @ away / weights.sum()
        moments[3:, 3:] += covariance[3:, 3:] - response @ covariance[:3, 3:]
        found.append(_larger(found[-1], moments))
        # A too sharp curvature makes the grid too short. The longer grid is coarser, so both count.
        short = np.array([grid[[0, -1]].min(), grid[:, [0, -1]].min()]) < _RIM
        if not (short & (reach < _FARTHEST)).any():
            break
        reach = np.minimum(np.where(short, 2 * reach, reach), _FARTHEST)
    return found[1], found[-1]


def _larger(covariance: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """The covariance (6, 6), enlarged in the directions where the second moments (6, 6) are larger."""
    values, axes = np.linalg.eigh(covariance)
    axes = axes[:, 1:] * np.sqrt(np.maximum(values[1:], _SINGULAR * values[-1]))  # without the translation's length
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
    """Rotations (k, 3, 3) refined by Gauss-Newton, each with its direction of translation (k, 3), all at once.

    Args:
        matches: n matches.
        turns: starts.
        shifts: directions.
        cutoffs: cutoffs of Tukey's loss in successive steps, in inlier thresholds.
        inlier_threshold: largest residual of an inlier, pixels.
        deviation: standard deviation of the keypoints' noise, pixels.

    Returns:
        the rotations, and their Sampson distances (k, n).
    """
    pixels = [cutoff * inlier_threshold for cutoff in cutoffs]
    # A prior of a tenth of a radian keeps the system regular, even without noise. With a lens that magnifies a thousand
    # times, rounding removes this term. A part of the trace is then large enough.
    prior_information = 100 * max(deviation, _SMALLEST * inlier_threshold) ** 2
    if compiled.available():
        return compiled.refine_turns(matches.columns, turns, shifts, pixels, prior_information)
    # Keep this equal to src/two_view_profile.c.
    for cutoff in pixels:
        residuals, jacobian = _evaluate(matches, turns, shifts)
        weights = np.maximum(1 - (residuals / cutoff) ** 2, 0.0) ** 2
        weighted = jacobian * weights[:, None]
        hessian = weighted @ jacobian.transpose(0, 2, 1)
        gradient = (weighted @ residuals[..., None])[..., 0]
        added = np.maximum(prior_information, _ABOVE_ROUNDING * np.trace(hessian, axis1=1, axis2=2))
        hessian[:, range(3), range(3)] += added[:, None]
        turns = _turned(turns, -np.linalg.solve(hessian, gradient[..., None])[..., 0])
    return turns, _evaluate(matches, turns, shifts)[0]


def _informative_part(
    matches: Matches, turns: np.ndarray, shifts: np.ndarray, residuals: np.ndarray, deviation: float
) -> np.ndarray:
    """Part (k,), 0.1 to 1, of a log-likelihood difference that counts, between each of k motions and the last one.

    From one motion to the other, a residual changes for two reasons: the position of the match, and the keypoints'
    noise along the epipolar line, because this line turns. The first change distinguishes the motions, and its expected
    square is twice the difference. The second change lowers the correct motion's log-likelihood, by the ratio of both
    changes to the first. For a plane in a strip of an image, 640 x 160 pixels with 0.3 pixels of noise, noise is 85 %
    of the change along the likelihood's ridge. For a plane that fills 640 x 480 pixels, it is 8 %.
    """
    essentials = np.cross(shifts[:, :, None], turns, axis=1)
    pixel0, pixel1 = (np.sqrt((noise[0] + noise[2]) / 2) for noise in (matches.noise0, matches.noise1))
    normals = np.empty((len(turns), 4, len(matches)))  # of the constraint, in the four coordinates of a match, pixels
    np.matmul(essentials[:, :2], matches.rays1 * pixel0, out=normals[:, :2])
    np.matmul(essentials[:, :, :2].transpose(0, 2, 1), matches.rays0 * pixel1, out=normals[:, 2:])
    normals /= np.sqrt(np.maximum(np.einsum("kin,kin->kn", normals, normals), TINY))[:, None]
    near = np.abs(residuals) < TUKEY * deviation
    near &= near[-1]
    changed = ((residuals - residuals[-1]) ** 2 * near).sum(axis=1)
    turned = (2 * (1 - np.einsum("kin,in->kn", normals, normals[-1])) * near).sum(axis=1)
    return np.clip(1 - deviation**2 * turned / np.maximum(changed, _SAME * deviation**2), SMALLEST_CURVATURE, 1.0)


def _evaluate(matches: Matches, turns: np.ndarray, shifts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sampson distances (k, n) of k motions, and their jacobian (k, 3, n) by the rotation at constant variance."""
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
    """Rotations (k, 3, 3) after rotation steps (k, 3) about the axes (Rodrigues)."""
    angles = np.maximum(np.linalg.norm(steps, axis=1), 1e-12)[:, None, None]
    x, y, z = steps.T
    zero = np.zeros_like(x)
    cross = np.array([[zero, -z, y], [z, zero, -x], [-y, x, zero]]).transpose(2, 0, 1) / angles
    return (np.eye(3) + np.sin(angles) * cross + (1 - np.cos(angles)) * (cross @ cross)) @ turns


def _facing(near: Matches, motion: Motion) -> Motion:
    """The motion or the one with opposite translation: whichever has more matches in front of both cameras."""
    depth0, depth1, _ = depths(near, motion)
    forward, backward = (np.minimum(depth0, depth1) > 0).sum(), (np.maximum(depth0, depth1) < 0).sum()
    return motion if forward >= backward else Motion(motion.rotation, -motion.translation)


def _half_sphere(count: int) -> np.ndarray:
    """Directions (count, 3), evenly spread over the half of the sphere with z > 0 (a Fibonacci lattice)."""
    z = (np.arange(count) + 0.5) / count
    angle = math.pi * (1 + math.sqrt(5)) * np.arange(count)
    radius = np.sqrt(1 - z * z)
    return np.column_stack([radius * np.cos(angle), radius * np.sin(angle), z])
