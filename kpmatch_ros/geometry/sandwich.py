"""Covariance of an M-estimate: H^-1 G H^-1 (Huber, Robust Statistics).

H is the loss's whole Hessian: its Gauss-Newton part takes noise for parallax. G is the covariance of the loss's
gradient, by what the residuals pull: matches do not err alike (White, Econometrica 1980).
"""

from __future__ import annotations

import numpy as np

from kpmatch_ros.geometry.robust import SMALLEST_CURVATURE, TINY

__all__ = ["jackknifed", "left_out", "student_factor", "whitening_axes"]

_SMALLEST_REST = 0.1  # 1 less the leverage
_SLIGHT = 0.1  # a leverage: its square is small


def whitening_axes(gauss_newton: np.ndarray, hessian: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Axes in which the Gauss-Newton Hessian is the identity, and the whole one diagonal and not far from it.

    Args:
        gauss_newton: (p, p) J'J of an estimate's p numbers.
        hessian: (p, p) the whole one.
        floor: least eigenvalue of J'J.

    Returns:
        The axes (p, p), in columns, and the whole Hessian's diagonal (p,), at least SMALLEST_CURVATURE.
    """
    information, axes = np.linalg.eigh(gauss_newton)
    axes = axes / np.sqrt(np.maximum(information, floor))
    curvatures, turn = np.linalg.eigh(axes.T @ hessian @ axes)
    return axes @ turn, np.maximum(curvatures, SMALLEST_CURVATURE)


def jackknifed(pulls: np.ndarray, leverage: np.ndarray) -> np.ndarray:
    """What the residuals of n matches pull, (p, n), without their own effect on the estimate.

    A match with leverage (n,) leaves a residual below its error (MacKinnon and White, Journal of Econometrics 1985).
    """
    return np.asarray(pulls / np.maximum(1 - leverage, _SMALLEST_REST))


def left_out(pulls: np.ndarray, arms: np.ndarray, weights: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """What n matches of several residuals each pull, (p, n), without their own effect on the estimate.

    A match often sets one direction of the estimate almost by itself, and has little to do with the others. One
    leverage for all of its residuals takes the mean of these: the error of the direction that it sets is then as small
    as the residual that it leaves. Each match is left out of the Hessian instead, with all of its directions (Bell and
    McCaffrey, Survey Methodology 2002).

    Args:
        pulls: (p, n) gradients, unweighted, in axes where the whole Hessian is the identity.
        arms: (p, d, n) jacobian in the same axes.
        weights: (n,) of the loss.
        slopes: (n,) of these weights, by half of the squared residuals.
    """
    weighted, size = pulls * weights, len(pulls)
    leverage = weights * (arms * arms).sum(axis=(0, 1)) + slopes * (pulls * pulls).sum(axis=0)
    # To first order, where leverage is slight.
    own = np.einsum("idn,dn->in", arms * weights, np.einsum("jdn,jn->dn", arms, weighted))
    found = weighted + own + pulls * (slopes * (pulls * weighted).sum(axis=0))
    strong = np.flatnonzero(leverage > _SLIGHT)
    if len(strong):
        arms, pulls = arms[..., strong], pulls[:, strong]
        hessians = np.einsum("idn,jdn->nij", arms * weights[strong], arms)
        hessians += np.einsum("in,jn->nij", pulls * slopes[strong], pulls)
        rests, axes = np.linalg.eigh(np.eye(size) - hessians)
        along = np.einsum("nij,in->nj", axes, weighted[:, strong]) / np.maximum(rests, _SMALLEST_REST)
        found[:, strong] = np.einsum("nij,nj->in", axes, along)
    return np.asarray(found)


def student_factor(pulls: np.ndarray) -> float:
    """Factor on the sum of products of pulls (p, n), for how little n of them tell of a covariance.

    With k degrees of freedom, errors over that covariance look k / (k - p - 1) times as large: its inverse is
    Wishart's. Pulls with heavy tails are worth fewer, by their kurtosis (Mardia, Biometrika 1970).
    """
    size = len(pulls)
    shares = (pulls * (np.linalg.pinv(pulls @ pulls.T, hermitian=True) @ pulls)).sum(axis=0)
    worth = size * (size + 2) / max(float(shares @ shares), TINY)
    return worth / max(worth - size - 1, worth / 4)
