"""Keypoint noise as covariances (3, n) of normalised coordinates: variance of x, covariance, variance of y."""

from __future__ import annotations

import numpy as np

__all__ = ["noise_times", "normalised_noise"]


def normalised_noise(jacobian: np.ndarray) -> np.ndarray:
    """(3, n) for noise of one pixel, from the jacobian (n, 2, 2) of :meth:`Camera.normalise_with_jacobian`."""
    (xx, xy), (yx, yy) = jacobian.transpose(1, 2, 0)
    return np.array([xx * xx + xy * xy, xx * yx + xy * yy, yx * yx + yy * yy])


def noise_times(noise: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Products (2, n) of the symmetric matrices (3, n) with the first two of the coordinates (k, n)."""
    product = noise[:2] * vectors[0]
    product += noise[1:] * vectors[1]
    return product
