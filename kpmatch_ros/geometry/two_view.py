"""Relative pose of two calibrated views from matched keypoints.

All errors are in pixels of the images as received, and mean the same for both models of the motion: how far, to first
order, the four coordinates of a match must move to agree with the model (Sampson's distance). With a translation, a
match must lie on its epipolar line: one condition. Under a pure rotation it must lie on one point: two conditions, the
one across the epipolar line and the one along it. Independent keypoint noise of s pixels per coordinate makes an error
of standard deviation s in each condition, whatever the lenses, the focal lengths and the motion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from scipy.special import fdtrc, gammaln

from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose, cross_matrix

__all__ = ["FALSE_ALARM_RATE", "estimate_relative_pose"]

FALSE_ALARM_RATE = 1e-3
"""How often, at most, noise and wrong matches alone are taken for a translation, or for a geometry at all."""

_SMALLEST_SAMPLE = 8  # matches: the five degrees of freedom, and something left over to tell the noise from

_SEARCHES = 2  # from different seeds: one in twenty ends in a wrong optimum
_SEARCH_ITERATIONS = 2000
_TRANSLATIONS = 200  # tried with the rotation given
_HOPEFUL = 1.2  # candidates that disagree more with the matches than the best does, by this factor, are given up

_TUKEY = 4.685  # in standard deviations: 95 % of the efficiency of least squares where the noise is Gaussian
_DEVIATIONS_PER_MEDIAN = 1.4826  # standard deviation over median absolute deviation, Gaussian noise
_LARGEST_LEVERAGE = 0.3  # of one match on the pose: 0 to 1; they add up to the degrees of freedom
_LARGEST_VARIANCE = math.pi**2  # of an angle of which nothing is known
_SMALLEST_CURVATURE = 0.1  # of the loss, in units of Gauss and Newton's approximation to it

# Without translation, the matches may still be further than the gate from where the rotation takes them: slipped along
# an edge, up to so many gates, and so many of them for each one that has not; or wrong, in any direction, but twice as
# often along the longer side of the image as equal chances have it.
_LONGEST_SLIP = 5.0
_SLIPS = 1 / 3
_UNEQUAL = 2.0
# Keypoints jitter along the edges that they lie on, which often have one direction in common: the variance of their
# noise, but for rounding, may be so many times that across this direction (measured: 2.9). And the noise has tails,
# which are left out of the test for small parallax beyond so many standard deviations.
_UNEVEN = 3.0
_TYPICAL = 3.0
# The smallest F-test probability over all directions of translation is about that of the smallest of 50 independent
# ones (simulated: 10 to 50, for 20 to 150 degrees of view and 30 to 800 matches).
_INDEPENDENT_DIRECTIONS = 50

_SETTLED = 1e-6  # part of the cost
_TINY = 1e-30  # instead of zero under a fraction
_AHEAD = 0.02  # cosine: what is further off a camera's axis, 89 degrees, is behind it
_BEHIND = 1e6  # pixels: the error of what is behind a camera
_EVERYTHING = 1e9  # pixels: a cutoff beyond all errors


def estimate_relative_pose(
    points0: np.ndarray,
    points1: np.ndarray,
    camera0: Camera | None,
    camera1: Camera | None,
    *,
    max_reprojection_error: float = 1.0,
    min_inliers: int = 15,
    keypoint_resolution: float = 1.0,
    independent_points: float = math.inf,
) -> RelativePose:
    """Pose of the current camera in the reference camera's optical frame, from matched keypoints.

    Candidates come from RANSAC with the five-point solver (OpenCV; Nister, PAMI 2004), from a homography in case the
    scene is a plane, and from RANSAC for the translation alone, with the rotation given that explains most matches. The
    best is refined by Levenberg-Marquardt on the Sampson errors of all matches in front of the cameras, with Tukey's
    loss scaled to the noise. The same input gives the same answer, on any thread.

    OK needs a test with false-alarm rate FALSE_ALARM_RATE to say that no rotation alone explains the matches, and
    anything but FAILED one that wrong matches would not agree as well. Two views cannot tell a translation from
    objects that move before a standing camera, nor from a calibration that is wrong by more than the noise.

    Args:
        points0: (M, 2) pixels in the reference image as received. NaN and infinity are outliers.
        points1: (M, 2) pixels in the current image, the same matches.
        camera0: calibration of the reference image; None gives NO_CALIBRATION.
        camera1: calibration of the current image.
        max_reprojection_error: of an inlier, pixels.
        min_inliers: fewer matches, or inliers, give TOO_FEW_MATCHES; fewer than 8 always do.
        keypoint_resolution: pixels between neighbouring positions that the detector can give: 1 for whole pixels, more
            where it sees the image made smaller, 0 for none. Parallax below it is taken for rounding, and the
            covariance is no smaller than rounding allows.
        independent_points: how many points at most err independently of each other. Where there are more, the test and
            the covariance are those of so many: more points on the same surfaces would not make the pose surer.

    Returns:
        The pose, or why there is none.

    Raises:
        ValueError: the arrays have another shape, or a parameter is out of range.
    """
    points0, points1 = np.asarray(points0, dtype=np.float64), np.asarray(points1, dtype=np.float64)
    if points0.shape != points1.shape or points0.ndim != 2 or points0.shape[1] != 2:
        raise ValueError(f"points0 and points1 must both have shape (M, 2), not {points0.shape} and {points1.shape}")
    if not 0 < max_reprojection_error < math.inf:
        raise ValueError(f"max_reprojection_error must be a positive number of pixels, not {max_reprojection_error}")
    if not 0 <= keypoint_resolution < math.inf:
        raise ValueError(f"keypoint_resolution must be a number of pixels from 0 up, not {keypoint_resolution}")
    total, gate = len(points0), float(max_reprojection_error)
    required = max(min_inliers, _SMALLEST_SAMPLE)
    if camera0 is None or camera1 is None:
        return RelativePose.undefined(PoseStatus.NO_CALIBRATION, total)
    if total < required:
        return RelativePose.undefined(PoseStatus.TOO_FEW_MATCHES, total)
    matches, usable = _normalise(points0, points1, camera0, camera1)
    if len(matches) < required:
        return RelativePose.undefined(PoseStatus.TOO_FEW_MATCHES, total)

    def to_mask(inliers: np.ndarray) -> np.ndarray:
        mask = np.zeros(total, dtype=bool)
        mask[usable] = inliers
        return mask

    threshold = 2 * gate / (camera0.focal + camera1.focal)
    candidates = _search_motions(matches, gate, threshold)
    candidates += _search_plane(matches, gate, threshold, candidates)
    starts = [np.eye(3)] + [candidate.rotation for candidate in candidates]
    rotation = _fit_rotation(matches, starts, gate, keypoint_resolution)
    turning = _length(_rotation_errors(matches, rotation)) < gate
    candidates += _search_translations(matches.select(~turning), rotation, gate)

    fit = _fit_motion(matches, candidates, gate, keypoint_resolution)
    moving = np.zeros(len(matches), dtype=bool) if fit is None else _agrees(matches, fit.motion, gate)
    # A wrong match is within the gate of its epipolar line with at most this chance: the line is no longer than the
    # image's diagonal, and the error is one in two images.
    width, height = camera0.width, camera0.height
    chance = min(1.0, 2 * math.sqrt(2) * gate * math.hypot(width, height) / (width * height))
    if _log_false_alarms(moving, np.full(len(matches), chance), 5) > math.log(FALSE_ALARM_RATE):
        fit = None

    def alike(inliers: np.ndarray) -> float:
        """How many of these err together: their noise counts for so many times its variance."""
        return max(1.0, float(inliers.sum()) / independent_points)

    noise = _Noise(gate, keypoint_resolution, alike(turning))
    if fit is not None and _is_translation(matches, fit.motion, rotation, turning, noise):
        if moving.sum() < required:
            return RelativePose.undefined(PoseStatus.TOO_FEW_MATCHES, total, to_mask(moving))
        status, motion, inliers = PoseStatus.OK, fit.motion, moving
        covariance = _motion_covariance(fit, noise._replace(alike=alike(moving)))
    else:
        if turning.sum() < required:
            if fit is None:
                return RelativePose.undefined(PoseStatus.FAILED, total)
            return RelativePose.undefined(PoseStatus.TOO_FEW_MATCHES, total, to_mask(turning))
        status, motion, inliers = PoseStatus.NO_TRANSLATION, _Motion(rotation, np.zeros(3)), turning
        covariance = _rotation_covariance(matches, rotation, noise)

    return RelativePose(
        status=status,
        rotation=motion.rotation,
        translation=motion.translation,
        covariance=covariance,
        metric=False,
        num_matches=total,
        num_inliers=int(inliers.sum()),
        median_parallax=_median_parallax(matches.select(inliers), motion.rotation),
        inliers=to_mask(inliers),
    )


class _Motion(NamedTuple):
    """x_ref = rotation x_cur + translation; the translation has length one, or zero for a pure rotation."""

    rotation: np.ndarray
    translation: np.ndarray

    def moved(self, step: np.ndarray) -> _Motion:
        """By three rotation angles about the reference frame's axes and, if there, two along _tangents(translation)."""
        rotation = cv2.Rodrigues(step[:3].reshape(3, 1))[0] @ self.rotation
        if len(step) == 3:
            return _Motion(rotation, self.translation)
        translation = self.translation + _tangents(self.translation) @ step[3:]
        return _Motion(rotation, translation / np.linalg.norm(translation))


class _Noise(NamedTuple):
    """What is known of the keypoints' noise.

    gate: largest error of an inlier, pixels. resolution: of the detector, pixels. alike: points that err together, so
    that the variance of what is estimated from all of them is so many times what independent errors give.
    """

    gate: float
    resolution: float
    alike: float = 1.0


@dataclass(frozen=True, eq=False)
class _Matches:
    """n matches in normalised coordinates, of the reference (0) and the current (1) image.

    rays: (n, 3) with z = 1 in the optical frame. noise: (n, 2, 2), the covariance of x, y for keypoint noise of one
    pixel per coordinate, which holds the focal length and the lens's local magnification.
    """

    rays0: np.ndarray
    rays1: np.ndarray
    noise0: np.ndarray
    noise1: np.ndarray

    def __len__(self) -> int:
        return len(self.rays0)

    def select(self, mask: np.ndarray) -> _Matches:
        return _Matches(self.rays0[mask], self.rays1[mask], self.noise0[mask], self.noise1[mask])


def _normalise(
    points0: np.ndarray, points1: np.ndarray, camera0: Camera, camera1: Camera
) -> tuple[_Matches, np.ndarray]:
    """The matches that both cameras have a direction for, and which (M,) they are."""
    sides = [camera.normalise_with_jacobian(points) for points, camera in ((points0, camera0), (points1, camera1))]
    usable = np.isfinite(sides[0][0]).all(axis=1) & np.isfinite(sides[1][0]).all(axis=1)
    rays0, rays1 = (np.column_stack([points[usable], np.ones(usable.sum())]) for points, _ in sides)
    noise0, noise1 = (np.einsum("nij,nkj->nik", slope[usable], slope[usable]) for _, slope in sides)
    return _Matches(rays0, rays1, noise0, noise1), usable


# Errors of the two models and their slopes: errors (n, d) and slopes (n, d, p) by the p numbers of _Motion.moved.


def _motion_errors(matches: _Matches, motion: _Motion) -> np.ndarray:
    """Sampson error (n,) of each match under a motion with translation, pixels, signed."""
    essential = cross_matrix(motion.translation) @ motion.rotation
    lines0, lines1 = matches.rays1 @ essential.T, matches.rays0 @ essential
    variance = _quadratic(matches.noise0, lines0[:, :2]) + _quadratic(matches.noise1, lines1[:, :2])
    return _dot(matches.rays0, lines0) / np.sqrt(np.maximum(variance, _TINY))


def _motion_slopes(matches: _Matches, motion: _Motion) -> tuple[np.ndarray, np.ndarray]:
    """Sampson errors (n, 1) and their slopes (n, 1, 5)."""
    rotation, translation = motion
    cross = cross_matrix(translation)
    # The essential matrix, then its derivatives: everything below is linear in it.
    essentials = np.array(
        [cross @ rotation]
        + [cross @ cross_matrix(axis) @ rotation for axis in np.eye(3)]
        + [cross_matrix(tangent) @ rotation for tangent in _tangents(translation).T]
    )
    n, k = len(matches), len(essentials)
    lines0 = (matches.rays1 @ essentials.transpose(2, 1, 0).reshape(3, -1)).reshape(n, 3, k)
    lines1 = (matches.rays0 @ essentials.transpose(1, 2, 0).reshape(3, -1)).reshape(n, 3, k)
    values = np.einsum("ni,nik->nk", matches.rays0, lines0)
    normals0 = np.einsum("nij,nj->ni", matches.noise0, lines0[:, :2, 0])
    normals1 = np.einsum("nij,nj->ni", matches.noise1, lines1[:, :2, 0])
    variances = np.einsum("ni,nik->nk", normals0, lines0[:, :2]) + np.einsum("ni,nik->nk", normals1, lines1[:, :2])
    variance = np.maximum(variances[:, 0], _TINY)
    deviation = np.sqrt(variance)
    errors = values[:, 0] / deviation
    slopes = values[:, 1:] / deviation[:, None] - (errors / variance)[:, None] * variances[:, 1:]
    return errors[:, None], slopes[:, None, :]


def _rotation_errors(matches: _Matches, rotation: np.ndarray) -> np.ndarray:
    """Errors (n, 2) of each match under a pure rotation, pixels, in axes of their own; far off where it is behind."""
    projected, ahead, factors = _project_turned(matches, rotation)
    shift = matches.rays0.T[:2] - projected
    return np.where(ahead, _whiten(shift[0], shift[1], factors), _BEHIND).T


def _rotation_slopes(matches: _Matches, motion: _Motion) -> tuple[np.ndarray, np.ndarray]:
    """Errors (n, 2) under the motion's rotation alone and their slopes (n, 2, 3)."""
    projected, ahead, factors = _project_turned(matches, motion.rotation)
    shift, (x, y) = matches.rays0.T[:2] - projected, projected
    xy = x * y
    errors = np.where(ahead, _whiten(shift[0], shift[1], factors), _BEHIND)
    slopes = np.empty((3, 2, len(matches)))
    for slope, dx, dy in zip(slopes, (xy, -1 - x * x, y), (1 + y * y, -xy, -x)):
        slope[:] = np.where(ahead, _whiten(dx, dy, factors), 0.0)
    return errors.T, slopes.T


def _project_turned(matches: _Matches, rotation: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the current image's rays appear in the reference image (2, n), which are ahead of it (n,), and the

    Cholesky factor l00, l10, l11 (3, n) of the difference's covariance for keypoint noise of one pixel in both images.
    """
    turned = rotation @ matches.rays1.T
    ahead = turned[2] > _AHEAD * _length(matches.rays1)
    depth = np.where(ahead, turned[2], 1.0)
    x, y = projected = turned[:2] / depth
    # The derivative of x, y by the current image's coordinates carries that image's noise over.
    (xx, xy), (yx, yy) = (rotation[:2, :2, None] - projected[:, None] * rotation[2, :2, None]) / depth
    (a, b), (_, c) = matches.noise1.T
    own = matches.noise0.T
    noise00 = own[0, 0] + xx * (xx * a + 2 * xy * b) + xy * xy * c
    noise10 = own[0, 1] + xx * (yx * a + yy * b) + xy * (yx * b + yy * c)
    noise11 = own[1, 1] + yx * (yx * a + 2 * yy * b) + yy * yy * c
    factor00 = np.sqrt(noise00)
    factor10 = noise10 / factor00
    factor11 = np.sqrt(np.maximum(noise11 - factor10 * factor10, _TINY))
    return projected, ahead, np.array([factor00, factor10, factor11])


def _whiten(x: np.ndarray, y: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The vectors x, y (n,) by the inverse Cholesky factor: (2, n)."""
    first = x / factors[0]
    return np.array([first, (y - factors[1] * first) / factors[2]])


_Slopes = Callable[[_Matches, _Motion], tuple[np.ndarray, np.ndarray]]


def _minimise(slopes_of: _Slopes, matches: _Matches, motion: _Motion, cutoff: float, iterations: int) -> _Motion:
    """Levenberg-Marquardt on Tukey's loss of the errors' lengths, which ignores those beyond the cutoff (pixels)."""
    damping = 1e-4
    errors, slopes = slopes_of(matches, motion)
    weights, cost = _tukey(_length(errors), cutoff)
    for _ in range(iterations):
        weighted = slopes * weights[:, None, None]
        size = slopes.shape[2]
        hessian = weighted.reshape(-1, size).T @ slopes.reshape(-1, size)
        gradient = weighted.reshape(-1, size).T @ errors.ravel()
        # The second term keeps the system regular where the matches leave a direction free.
        diagonal = hessian.diagonal() + 1e-9 * hessian.trace() + _TINY
        for _ in range(6):
            step = np.linalg.solve(hessian + np.diag(damping * diagonal), -gradient)
            if -gradient @ step < _SETTLED * cost:  # twice what it promises to gain
                return motion
            trial = motion.moved(step)
            trial_errors, trial_slopes = slopes_of(matches, trial)
            trial_weights, trial_cost = _tukey(_length(trial_errors), cutoff)
            if trial_cost < cost:
                break
            damping *= 10
        else:
            return motion
        motion, errors, slopes, weights, cost = trial, trial_errors, trial_slopes, trial_weights, trial_cost
        damping = max(damping / 10, 1e-9)
    return motion


def _tukey(lengths: np.ndarray, cutoff: float) -> tuple[np.ndarray, float]:
    """Weights (n,) and total cost of Tukey's biweight."""
    squares = np.minimum((lengths / cutoff) ** 2, 1)
    return (1 - squares) ** 2, float((squares * (3 - 3 * squares + squares**2)).sum()) * cutoff**2 / 3


def _cutoff(errors: np.ndarray, gate: float, resolution: float) -> float:
    """Where Tukey's loss ends, pixels: so many standard deviations of the noise in these errors, or of rounding."""
    sizes = np.abs(errors)
    near = sizes[sizes < 2 * gate]
    noise = _DEVIATIONS_PER_MEDIAN * float(np.median(near)) if len(near) else gate
    return _TUKEY * max(noise, resolution / math.sqrt(12), 1e-9)


# The motion with translation.


def _search_motions(matches: _Matches, gate: float, threshold: float) -> list[_Motion]:
    """Candidates: RANSAC from several seeds. `threshold` is the gate in normalised coordinates."""
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
        params.threshold = threshold
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
            _Motion(rotation, sign * translation.ravel()) for rotation in (rotation0, rotation1) for sign in (1.0, -1.0)
        ]
        candidates.append(min(four, key=lambda motion: _disagreement(matches, motion, gate)))
    return candidates


def _search_plane(matches: _Matches, gate: float, threshold: float, candidates: list[_Motion]) -> list[_Motion]:
    """The two motions that a plane allows, from a candidate's matches: the search finds either, but one may be wrong.

    If the scene is no plane they are far off, and do no harm.
    """
    if not candidates:
        return []
    inliers = matches.select(_agrees(matches, candidates[0], gate))
    if len(inliers) < _SMALLEST_SAMPLE:
        return []
    rays1, rays0 = inliers.rays1[:, :2].copy(), inliers.rays0[:, :2].copy()
    homography, _ = cv2.findHomography(rays1, rays0, cv2.RANSAC, 2 * threshold, maxIters=100)
    if homography is None or not np.isfinite(homography).all():
        return []
    _, rotations, translations, _ = cv2.decomposeHomographyMat(homography, np.eye(3))
    motions = [
        _Motion(rotation, translation.ravel() / length)
        for rotation, translation in zip(rotations, translations)
        if (length := float(np.linalg.norm(translation))) > 1e-6
    ]
    return sorted(motions, key=lambda motion: _disagreement(inliers, motion, gate))[:2]


def _search_translations(matches: _Matches, rotation: np.ndarray, gate: float) -> list[_Motion]:
    """The translation that most of these matches agree with, given the rotation: RANSAC with two matches a sample.

    Finds the few near points of a scene that is mostly far away, where samples of five rarely hold two of them.
    """
    if len(matches) < 2:
        return []
    normals = np.cross(matches.rays0, matches.rays1 @ rotation.T)  # of the epipolar planes, which hold the translation
    pairs = np.random.default_rng(0).integers(len(matches), size=(_TRANSLATIONS, 2))
    directions = np.cross(normals[pairs[:, 0]], normals[pairs[:, 1]]).T
    directions = (directions / np.maximum(np.linalg.norm(directions, axis=0), _TINY)).astype(np.float32)
    # Nearness moves a match from where the rotation takes it by a positive multiple of t_xy - t_z (x, y).
    projected, _, factors = _project_turned(matches, rotation)
    (x, y), factors = projected.astype(np.float32)[:, :, None], factors.astype(np.float32)[:, :, None]
    away = _whiten(directions[0] - x * directions[2], directions[1] - y * directions[2], factors)
    error = _rotation_errors(matches, rotation).T[:, :, None].astype(np.float32)
    across = np.abs(error[0] * away[1] - error[1] * away[0])
    along = error[0] * away[0] + error[1] * away[1]
    near = across < gate * np.sqrt(away[0] ** 2 + away[1] ** 2)
    votes = np.array([(near & (along > 0)).sum(axis=0), (near & (along < 0)).sum(axis=0)])
    backwards, best = np.unravel_index(votes.argmax(), votes.shape)
    if votes[backwards, best] == 0:
        return []
    translation = directions[:, best].astype(np.float64) * (-1 if backwards else 1)
    return [_Motion(rotation, translation / np.linalg.norm(translation))]


class _Fit(NamedTuple):
    """A motion and the matches that decided it: those in front of the cameras, but for the few that have a degree of

    freedom almost to themselves. Such a match fits whether it is right or wrong.
    """

    motion: _Motion
    support: _Matches


def _fit_motion(matches: _Matches, candidates: list[_Motion], gate: float, resolution: float) -> _Fit | None:
    """The best candidate, refined; None if there is none."""
    if not candidates:
        return None
    disagreements = [_disagreement(matches, candidate, gate) for candidate in candidates]
    refined = [
        _minimise(_motion_slopes, matches, candidate, 3 * gate, 5)
        for candidate, disagreement in zip(candidates, disagreements)
        if disagreement < _HOPEFUL * min(disagreements) + gate**2
    ]
    motion = min(refined, key=lambda motion: _disagreement(matches, motion, gate))
    for _ in range(3):
        support = matches.select(_is_in_front(matches, motion, gate))
        errors, slopes = _motion_slopes(support, motion)
        cutoff = _cutoff(errors, gate, resolution)
        weighted = slopes[:, 0] * np.sqrt(_tukey(_length(errors), cutoff)[0])[:, None]
        leverage = _dot(weighted @ np.linalg.pinv(weighted.T @ weighted), weighted)
        support = support.select(leverage < _LARGEST_LEVERAGE)
        motion = _minimise(_motion_slopes, support, motion, cutoff, 10)
    return _Fit(motion, support)


def _agrees(matches: _Matches, motion: _Motion, gate: float) -> np.ndarray:
    """Which matches (n,) have an error below the gate and are in front of both cameras."""
    return (np.abs(_motion_errors(matches, motion)) < gate) & _is_in_front(matches, motion, gate)


def _disagreement(matches: _Matches, motion: _Motion, gate: float) -> float:
    """Sum of the squared errors (MSAC: none more than the gate's), for what is behind a camera those of a far point."""
    squares = _motion_errors(matches, motion) ** 2
    behind = ~_is_ahead(matches, motion)
    squares[behind] = (_rotation_errors(matches.select(behind), motion.rotation) ** 2).sum(axis=1)
    return float(np.minimum(squares, gate**2).sum())


def _is_in_front(matches: _Matches, motion: _Motion, gate: float) -> np.ndarray:
    """Which matches (n,) triangulate in front of both cameras, or are so far that their depth has no certain sign."""
    front = _is_ahead(matches, motion)
    front[~front] = _length(_rotation_errors(matches.select(~front), motion.rotation)) < gate
    return front


def _is_ahead(matches: _Matches, motion: _Motion) -> np.ndarray:
    """Which matches (n,) triangulate in front of both cameras."""
    rays0, rays1 = matches.rays0, matches.rays1 @ motion.rotation.T
    # Depths of the point where the rays come closest, d0 rays0 = d1 rays1 + t, but for a positive factor.
    along0, along1, between = rays0 @ motion.translation, rays1 @ motion.translation, _dot(rays0, rays1)
    depth0 = along0 * _dot(rays1, rays1) - along1 * between
    depth1 = along0 * between - along1 * _dot(rays0, rays0)
    return (depth0 > 0) & (depth1 > 0)


# The rotation alone.


def _fit_rotation(matches: _Matches, starts: list[np.ndarray], gate: float, resolution: float) -> np.ndarray:
    """The rotation (3, 3) that brings most matches within the gate, from the best of the starts."""
    wide = 16 * gate
    still = [_Motion(rotation, np.zeros(3)) for rotation in starts]
    motion = min(still, key=lambda motion: _tukey(_length(_rotation_errors(matches, motion.rotation)), wide)[1])
    for cutoff in (wide, 4 * gate):
        motion = _minimise(_rotation_slopes, matches, motion, cutoff, 5)
    cutoff = _cutoff(_rotation_errors(matches, motion.rotation), gate, resolution)
    return _minimise(_rotation_slopes, matches, motion, cutoff, 10).rotation


# Which of the two, and how sure.


def _is_translation(
    matches: _Matches, motion: _Motion, rotation: np.ndarray, turning: np.ndarray, noise: _Noise
) -> bool:
    """Whether the rotation alone leaves something to explain, with a false-alarm rate of FALSE_ALARM_RATE.

    Two tests share the rate. For large parallax: whether too many of the matches that the rotation does not explain lie
    along their epipolar lines, on the side of points in front; those that may have slipped are not counted at all. For
    small parallax: the F-test of those it does explain, but for the tails of the noise.
    """
    rate, gate = FALSE_ALARM_RATE / 2, noise.gate
    others = matches.select(~turning)
    distance = _length(_rotation_errors(others, rotation))
    # The chance that an error of this length, in a random direction, ends within the gate of a half-line:
    chances = _UNEQUAL * np.arcsin(np.minimum(gate / np.maximum(distance, _TINY), 1)) / math.pi
    along = _agrees(others, motion, gate)
    slipped = np.flatnonzero(along & (distance < _LONGEST_SLIP * gate))
    counted = np.ones(len(others), dtype=bool)
    counted[slipped[np.argsort(-distance[slipped])][: int(_SLIPS * turning.sum())]] = False
    if _log_false_alarms(along[counted], np.minimum(chances, 1)[counted], 2) < math.log(rate):
        return True
    errors = _rotation_errors(matches, rotation)
    deviation = _cutoff(errors, gate, noise.resolution) / _TUKEY
    typical = turning & (_length(errors) < _TYPICAL * deviation)
    return _small_parallax_chance(matches.select(typical), motion, rotation, noise) < rate


def _log_false_alarms(hits: np.ndarray, chances: np.ndarray, sample: int) -> float:
    """Logarithm of a bound on how many models are expected to be hit as much by chance alone.

    A model is determined by `sample` of the n matches, which hit it anyway, and match i of the others by chances[i]
    (n,). There are n over `sample` models (a contrario RANSAC: Moisan and Stival, IJCV 2004). Hits that are unlikely
    count for more; the bound is Chernoff's.
    """
    count = len(hits)
    if hits.sum() <= sample:
        return math.inf
    weights = np.minimum(-np.log(np.maximum(chances, _TINY)), 1.0)
    score = np.sort(weights[hits])[:-sample].sum()
    powers = np.linspace(0.1, 4, 40)[:, None]
    bounds = np.log1p(chances * np.expm1(powers * weights)).sum(axis=1) - powers[:, 0] * score
    models = gammaln(count + 1) - gammaln(sample + 1) - gammaln(count - sample + 1)
    return float(models + bounds.min())


def _small_parallax_chance(matches: _Matches, motion: _Motion, rotation: np.ndarray, noise: _Noise) -> float:
    """The chance of such errors along the epipolar lines if they are noise, as those across the lines are.

    The F-test of nested models: least squares with a rotation (two conditions a match, three parameters) and with a
    translation (one condition, five parameters). Rounding a displacement to the resolution can make an error of
    up to half of that in each match and in one direction only, so errors across below that are not believed; what is
    not rounding may be _UNEVEN.
    """
    count = len(matches)
    if count < _SMALLEST_SAMPLE:
        return 1.0
    turned = _minimise(_rotation_slopes, matches, _Motion(rotation, np.zeros(3)), _EVERYTHING, 5).rotation
    total = float((_rotation_errors(matches, turned) ** 2).sum())
    # To first order, the translation is what is most nearly in all the planes of the two rays.
    normals = np.cross(matches.rays1 @ turned.T, matches.rays0)
    starts = (motion, _Motion(turned, np.linalg.eigh(normals.T @ normals)[1][:, 0]))
    fits = [_minimise(_motion_slopes, matches, start, _EVERYTHING, 10) for start in starts]
    across = min(float((_motion_errors(matches, fit) ** 2).sum()) for fit in fits)
    variance = across / (count - 5)
    jitter = max(variance - noise.resolution**2 / 12, 0.0)
    allowed = noise.alike * (max(variance, noise.resolution**2 / 8, _TINY) + (_UNEVEN - 1) * jitter)
    ratio = max(total - across, 0.0) / (count + 2) / allowed
    return _INDEPENDENT_DIRECTIONS * float(fdtrc(count + 2, count - 5, ratio))


def _motion_covariance(fit: _Fit, noise: _Noise) -> np.ndarray:
    """(6, 6) covariance of the translation's direction and the rotation."""
    expand = np.zeros((6, 5))
    expand[3:, :3] = np.eye(3)
    expand[:3, 3:] = _tangents(fit.motion.translation)
    return expand @ _covariance(_motion_slopes, fit.support, fit.motion, noise) @ expand.T


def _rotation_covariance(matches: _Matches, rotation: np.ndarray, noise: _Noise) -> np.ndarray:
    """(6, 6) covariance of a unit vector of unknown direction and the rotation."""
    turn = _Motion(rotation, np.zeros(3))
    covariance = np.zeros((6, 6))
    covariance[:3, :3] = np.eye(3) / 3
    covariance[3:, 3:] = _covariance(_rotation_slopes, matches, turn, noise)
    return covariance


def _covariance(slopes_of: _Slopes, matches: _Matches, motion: _Motion, noise: _Noise) -> np.ndarray:
    """Covariance (p, p) of an estimate with Tukey's loss: H^-1 G H^-1, of the loss's Hessian and gradient's covariance.

    With the whole Hessian. Gauss and Newton's part of it takes noise along the epipolar lines for parallax, and is many
    times too sure of the pose where the parallax is small or the epipole in the image.
    """
    errors, slopes = slopes_of(matches, motion)
    size = slopes.shape[2]
    cutoff = _cutoff(errors, noise.gate, noise.resolution)

    def gradient(motion: _Motion) -> np.ndarray:
        errors, slopes = slopes_of(matches, motion)
        return np.einsum("nd,ndp->p", errors * _tukey(_length(errors), cutoff)[0][:, None], slopes)

    offsets = 1e-5 * np.eye(size)
    hessian = np.array([gradient(motion.moved(step)) - gradient(motion.moved(-step)) for step in offsets]) / 2e-5
    hessian = (hessian + hessian.T) / 2

    lengths = _length(errors)
    used = lengths < cutoff
    influences = (errors * _tukey(lengths, cutoff)[0][:, None])[used]
    variance = float((influences**2).sum()) / max(influences.size - size, 1)
    flat = slopes[used].reshape(-1, size)
    information, axes = np.linalg.eigh(flat.T @ flat)
    floor = max(variance, noise.resolution**2 / 12) / _LARGEST_VARIANCE
    axes = axes / np.sqrt(np.maximum(information, max(floor, _TINY)))
    # In these axes Gauss and Newton's Hessian is the identity, and the whole one not far from it.
    curvatures, turn = np.linalg.eigh(axes.T @ hessian @ axes)
    curvatures = np.maximum(curvatures, _SMALLEST_CURVATURE)
    variance = max(variance, float(curvatures.mean()) ** 2 * noise.resolution**2 / 12)  # the second: of rounding
    axes = axes @ turn / curvatures
    variances, axes = np.linalg.eigh(noise.alike * variance * axes @ axes.T)
    return (axes * np.clip(variances, 0, _LARGEST_VARIANCE)) @ axes.T


def _median_parallax(inliers: _Matches, rotation: np.ndarray) -> float:
    """Median displacement, pixels of the reference image, between the matches and where the rotation takes them."""
    projected, ahead, _ = _project_turned(inliers, rotation)
    if not ahead.any():
        return 0.0
    shift = (inliers.rays0.T[:2] - projected).T[ahead]
    return float(np.median(np.sqrt(_quadratic(np.linalg.inv(inliers.noise0[ahead]), shift))))


# Small vector algebra.


def _tangents(direction: np.ndarray) -> np.ndarray:
    """Two orthonormal columns (3, 2), orthogonal to a unit vector: a Householder reflection's."""
    x, y, z = direction
    sign = math.copysign(1.0, z)
    a = -1.0 / (sign + z)
    return np.array([[1 + sign * a * x * x, a * x * y], [sign * a * x * y, sign + a * y * y], [-sign * x, -y]])


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("ni,ni->n", a, b)


def _length(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt(_dot(vectors, vectors))


def _quadratic(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return np.einsum("ni,nij,nj->n", vectors, matrices, vectors)
