"""Covariance of an M-estimate: H^-1 G H^-1 (Huber, Robust Statistics).

H is the full Hessian of the loss, because its Gauss-Newton part would take noise for parallax. G is the covariance of
the loss's gradient, computed from each residual's contribution, because matches have different errors (White,
Econometrica 1980). Below, `gradients` (p, n) are the contributions of the n matches to the gradient.
"""

from __future__ import annotations

import numpy as np

from kpmatch_ros.geometry.robust import SMALLEST_CURVATURE, TINY

__all__ = ["jackknifed", "leave_one_out", "student_factor", "whitening_axes"]

_SMALLEST_REST = 0.1  # lower bound of 1 minus the leverage
_SMALL_LEVERAGE = 0.1  # its square is negligible


def whitening_axes(gauss_newton: np.ndarray, hessian: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Axes in which the Gauss-Newton Hessian is the identity, and the full Hessian is diagonal.

    Args:
        gauss_newton: (p, p) J'J of an estimate with p parameters.
        hessian: (p, p) the full Hessian.
        floor: smallest eigenvalue of J'J.

    Returns:
        The axes (p, p), in columns, and the full Hessian's diagonal (p,), at least SMALLEST_CURVATURE.
    """
    information, axes = np.linalg.eigh(gauss_newton)
    axes = axes / np.sqrt(np.maximum(information, floor))
    curvatures, turn = np.linalg.eigh(axes.T @ hessian @ axes)
    return axes @ turn, np.maximum(curvatures, SMALLEST_CURVATURE)


def jackknifed(gradients: np.ndarray, leverage: np.ndarray) -> np.ndarray:
    """Gradients (p, n) of n matches, without each match's own effect on the estimate.

    A match with leverage (n,) has a residual below its error (MacKinnon and White, Journal of Econometrics 1985).
    """
    return np.asarray(gradients / np.maximum(1 - leverage, _SMALLEST_REST))


def leave_one_out(
    gradients: np.ndarray, jacobian: np.ndarray, weights: np.ndarray, weight_slopes: np.ndarray
) -> np.ndarray:
    """Gradients (p, n) of n matches with several residuals each, without each match's own effect on the estimate.

    A match often determines one direction of the estimate almost alone, with little effect on the others. A single
    leverage for all of its residuals would average over them. The error of the direction that it determines would then
    look as small as its residual. Instead, each match is removed from the Hessian in all of its directions (Bell and
    McCaffrey, Survey Methodology 2002).

    Args:
        gradients: (p, n), unweighted, in axes where the full Hessian is the identity.
        jacobian: (p, d, n) in the same axes.
        weights: (n,) of the loss.
        weight_slopes: (n,) derivatives of these weights by half of the squared residuals.
    """
    weighted, size = gradients * weights, len(gradients)
    leverage = weights * (jacobian * jacobian).sum(axis=(0, 1)) + weight_slopes * (gradients * gradients).sum(axis=0)
    # First order, for small leverage.
    own = np.einsum("idn,dn->in", jacobian * weights, np.einsum("jdn,jn->dn", jacobian, weighted))
    found = weighted + own + gradients * (weight_slopes * (gradients * weighted).sum(axis=0))
    strong = np.flatnonzero(leverage > _SMALL_LEVERAGE)
    if len(strong):
        jacobian, gradients = jacobian[..., strong], gradients[:, strong]
        hessians = np.einsum("idn,jdn->nij", jacobian * weights[strong], jacobian)
        hessians += np.einsum("in,jn->nij", gradients * weight_slopes[strong], gradients)
        rests, axes = np.linalg.eigh(np.eye(size) - hessians)
        along = np.einsum("nij,in->nj", axes, weighted[:, strong]) / np.maximum(rests, _SMALLEST_REST)
        found[:, strong] = np.einsum("nij,nj->in", axes, along)
    return np.asarray(found)


def student_factor(gradients: np.ndarray) -> float:
    """Factor on the sum of products of gradients (p, n), for a covariance estimated from only n of them.

    With k degrees of freedom, errors relative to that covariance look k / (k - p - 1) times as large, because its
    inverse has a Wishart distribution. Gradients with heavy tails count less, by their kurtosis (Mardia, Biometrika
    1970).
    """
    size, largest = len(gradients), np.abs(gradients).max(initial=0.0)
    if largest < TINY:  # exact matches; the squares would underflow
        return 1.0
    gradients = gradients / largest
    shares = (gradients * (np.linalg.pinv(gradients @ gradients.T, hermitian=True) @ gradients)).sum(axis=0)
    worth = size * (size + 2) / max(float(shares @ shares), TINY)
    return worth / max(worth - size - 1, worth / 4)
