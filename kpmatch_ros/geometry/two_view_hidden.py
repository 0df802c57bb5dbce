"""Effect of a translation, too small to be detected, on a rotation that is estimated without it.

If the matches cannot distinguish a translation from zero, only the rotation is fitted. A translation of a millimetre
moves the points of a room by a tenth of a pixel and more, and the rotation follows most of this parallax. The
rotation's covariance from the noise of the keypoints, some thousandths of a pixel for a thousand matches, does not
include this error. The residuals show it: near points move and far points do not, and the rotation cannot follow this.
This part stays in the residuals, and is similar for matches close to each other.
"""

from __future__ import annotations

import math

import numpy as np

from kpmatch_ros.geometry.robust import SMALLEST_CURVATURE, TINY, tukey, tukey_cutoff
from kpmatch_ros.geometry.two_view_errors import Matches, Model, Motion, differentiate, lengths, project_turned, whiten
from kpmatch_ros.geometry.two_view_fit import Noise

__all__ = ["hidden_translation_covariance"]

# Variance over squared mean of the points' inverse depths, if these are uniformly distributed from zero (far away) to
# the nearest point's. With a smaller value, the same residuals would indicate a larger translation.
_UNEVEN_DEPTH = 1 / 3
# Largest number of half waves over the longer side of the matches. Shorter waves have few matches and little variance.
_HALF_WAVES = 5

_PENALTY = 2.0  # of a parameter, in twice the log-likelihood (Akaike, IEEE Trans. Automatic Control 1974)
_SIZES = 60  # number of sizes of the translation that are compared
_SMALLEST_SIZE = 1e-2  # variance of the best visible parallax over that of its noise
_UNOBSERVABLE = 1e-9  # relative to the largest eigenvalue


def hidden_translation_covariance(matches: Matches, rotation: np.ndarray, noise: Noise) -> np.ndarray:
    """Covariance (3, 3) of a rotation's error from a translation that it was estimated without.

    The random effects of a linear model of the residuals (Laird and Ware, Biometrics 1982), in addition to the
    rotation, are the mean inverse depth times the translation, and waves of the inverse depth over the image times the
    translation. The effects are normal with mean zero. The variances of the waves add up to _UNEVEN_DEPTH. They are
    proportional to the squared wavelengths, so that each octave has the same variance. This assumes that scenes look
    similar at all scales. The only unknown is the size of the translation. Its estimate is the likeliest size for the
    residuals, given the noise (restricted maximum likelihood, Patterson and Thompson, Biometrika 1971). It is zero
    unless it explains the residuals better than noise alone, by Akaike's criterion. Errors that matches share count as
    noise: `noise.design_effect` multiplies the variance of the residuals.

    The covariance is the second moment of the effects on the rotation, given the residuals.

    It does not include translations that leave no pattern in the residuals: if all points are equally far, if no point
    has a depth similar to its neighbours, or if the noise hides the parallax. To include these, the covariance of every
    camera that really stands still would have to be many times too large.

    Args:
        matches: all matches, including wrong ones.
        rotation: (3, 3), fitted to the matches.
        noise: of the keypoints.
    """
    residuals, jacobian = differentiate(Model.ROTATION, matches, Motion(rotation, np.zeros(3)))
    sizes = lengths(residuals)
    cutoff = tukey_cutoff(residuals, noise.inlier_threshold, noise.resolution)
    used = np.flatnonzero(sizes < cutoff)
    residuals, jacobian, sizes = residuals[:, used], jacobian[:, :, used].reshape(3, -1), sizes[used]
    # An M-estimate has the error of least squares with these in place of the residuals (Huber, Robust Statistics).
    shares = (sizes / cutoff) ** 2
    curvature = max(float(((1 - shares) * (1 - 3 * shares)).mean()), SMALLEST_CURVATURE)
    pseudo_residuals = (residuals * tukey(sizes, cutoff)[0] / curvature).ravel()
    variance = float(pseudo_residuals @ pseudo_residuals) / max(len(pseudo_residuals) - 3, 1)
    variance = max(variance, noise.resolution**2 / 12, TINY) * noise.design_effect

    effects = _effects(matches.select(used), rotation)
    response = np.linalg.pinv(jacobian @ jacobian.T, rcond=1e-12, hermitian=True) @ (jacobian @ effects.T)
    # The part that the rotation cannot follow.
    unexplained = effects - response.T @ jacobian
    eigenvalues, axes = np.linalg.eigh(unexplained @ unexplained.T)
    response, projections = response @ axes, axes.T @ (unexplained @ pseudo_residuals)
    unobservable = eigenvalues < _UNOBSERVABLE * eigenvalues[-1]
    eigenvalues[unobservable], projections[unobservable] = 0.0, 0.0
    size = _likeliest_size(eigenvalues, projections, variance)
    shrinkage = size / (1 + size * eigenvalues)
    mean = response @ (shrinkage * projections)
    return np.asarray((response * (shrinkage * variance)) @ response.T + np.outer(mean, mean))


def _effects(matches: Matches, rotation: np.ndarray) -> np.ndarray:
    """Changes (k, 2 n) of the residuals by the effects, per standard deviation of each effect."""
    projected, _, factors = project_turned(matches, rotation)
    one, zero = np.ones(len(matches)), np.zeros(len(matches))
    x, y = projected
    by_translation = whiten(np.array([one, zero, -x]), np.array([zero, one, -y]), factors).transpose(1, 0, 2)
    # The stereographic projection does not stretch the edge of a fisheye image.
    places = matches.rays0[:2] / (matches.rays0[2] + lengths(matches.rays0))
    corner = places.min(axis=1, keepdims=True)
    across, down = (places - corner) / max(float(np.ptp(places, axis=1).max()), TINY)
    counts = range(_HALF_WAVES + 1)
    waves = [(i, j) for i in counts for j in counts if 0 < math.hypot(i, j) <= _HALF_WAVES]
    scale = math.sqrt(_UNEVEN_DEPTH / sum(1 / (i * i + j * j) for i, j in waves))
    shapes = [one]
    for i, j in waves:
        deviation = scale / math.hypot(i, j) * math.sqrt(2) ** ((i > 0) + (j > 0))  # of a cosine: 1 / sqrt(2)
        shapes.append(deviation * np.cos(math.pi * i * across) * np.cos(math.pi * j * down))
    return np.asarray((np.array(shapes)[:, None, None] * by_translation).reshape(3 * len(shapes), -1))


def _likeliest_size(eigenvalues: np.ndarray, projections: np.ndarray, variance: float) -> float:
    """The likeliest size of the translation: the variance of the effects over that of the noise.

    Args:
        eigenvalues: (k,) e, zero or positive, in increasing order.
        projections: (k,) independent values with the variance e + size e^2, times that of the noise; zero where e is.
        variance: of the noise.
    """
    squares = projections * projections / np.maximum(eigenvalues * variance, TINY)
    excess = np.max(squares - 1, initial=0.0, where=eigenvalues > 0)
    smallest = _SMALLEST_SIZE / max(float(eigenvalues[-1]), TINY)
    # No projection needs a larger size.
    largest = float(np.max(squares / np.maximum(eigenvalues, TINY), initial=0.0, where=eigenvalues > 0))
    if excess <= 0 or largest <= smallest:
        return 0.0
    sizes = np.concatenate([[0.0], np.geomspace(smallest, largest, _SIZES)])
    growths = 1 + sizes[:, None] * eigenvalues
    losses = (np.log(growths) + squares / growths).sum(axis=1)
    best = int(np.argmin(losses))
    return float(sizes[best]) if losses[best] < losses[0] - _PENALTY else 0.0
