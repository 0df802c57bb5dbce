"""Essential matrices from samples of five matches (Nister, PAMI 2004).

The steps are Nister's: the four matrices that five matches allow, ten cubic equations for their mixture, elimination,
and a polynomial of degree ten. Its real roots are found between the points of a grid, where the polynomial changes its
sign or turns before zero. Without rotation, pairs of roots almost coincide, and rounding moves them by up to 1e-3.

The compiled library computes the same, in src/five_point.c. Change both together.
"""

from __future__ import annotations

import itertools

import numpy as np

from kpmatch_ros.geometry import compiled
from kpmatch_ros.geometry.robust import TINY
from kpmatch_ros.geometry.two_view_errors import Matches

__all__ = ["POINTS", "best_essential", "essential_matrices"]

POINTS = 5
"""Matches in a sample."""

_CELLS = 64  # of the grid, from -1 to 1
_ITERATIONS = 8  # of Newton's method for a root, which begins in the middle of a cell

# The unknowns x, y, z and 1 are numbered from 0 to 3. Monomials of degree three are in the order of Nister's Table 1,
# which eliminates the first ten.
_PAIRS = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3)]
_MONOMIALS = [
    *[(0, 0, 0), (1, 1, 1), (0, 0, 1), (0, 1, 1), (0, 0, 2), (0, 0, 3), (1, 1, 2), (1, 1, 3), (0, 1, 2), (0, 1, 3)],
    *[(0, 2, 2), (0, 2, 3), (0, 3, 3), (1, 2, 2), (1, 2, 3), (1, 3, 3), (2, 2, 2), (2, 2, 3), (2, 3, 3), (3, 3, 3)],
]
_FIRST, _SECOND = np.array(_PAIRS).T
_TIMES = np.zeros((len(_MONOMIALS), 4 * len(_PAIRS)))  # 1 where a pair times an unknown gives a monomial
for _number, (_pair, _unknown) in enumerate(itertools.product(_PAIRS, range(4))):
    _first, _second, _third = sorted((*_pair, _unknown))
    _TIMES[_MONOMIALS.index((_first, _second, _third)), _number] = 1

_IN_CACHE = 128  # matrices whose costs are computed at once


def best_essential(
    matches: Matches, samples: np.ndarray, inlier_threshold: float, cost: float = np.inf
) -> tuple[np.ndarray, float] | None:
    """The essential matrix of the samples with the lowest cost, if that is below the given cost.

    The cost is that of MSAC: the sum of the squared Sampson distances, each at most the square of the threshold.

    Args:
        matches: n matches.
        samples: (s, 5) int32 indices of matches, five different ones in each row.
        inlier_threshold: pixels.
        cost: square pixels.

    Returns:
        the matrix (3, 3), of norm 1, and its cost; None if no matrix costs less than `cost`.
    """
    if compiled.available():
        return compiled.best_essential(matches.columns, samples, inlier_threshold, cost)
    candidates = essential_matrices(matches.rays0.T[samples], matches.rays1.T[samples])
    best = None
    for start in range(0, len(candidates), _IN_CACHE):
        group = candidates[start : start + _IN_CACHE]
        costs = _costs(group, matches, inlier_threshold)
        first = int(np.argmin(costs))
        if costs[first] < cost:
            best, cost = group[first], float(costs[first])
    return None if best is None else (best, cost)


def _costs(candidates: np.ndarray, matches: Matches, inlier_threshold: float) -> np.ndarray:
    """Costs (k,) of essential matrices (k, 3, 3); infinite if they are undefined."""
    shape = (3, len(candidates), len(matches))
    lines0 = (candidates.swapaxes(0, 1).reshape(-1, 3) @ matches.rays1).reshape(shape)
    lines1 = (candidates.transpose(2, 0, 1)[:2].reshape(-1, 3) @ matches.rays0).reshape(2, *shape[1:])
    distances = matches.rays0[0] * lines0[0] + matches.rays0[1] * lines0[1] + matches.rays0[2] * lines0[2]
    variances = _variances(matches.noise0, lines0) + _variances(matches.noise1, lines1)
    squares = distances * distances / np.maximum(variances, TINY)
    costs = np.minimum(squares, inlier_threshold**2).sum(axis=1)
    return np.where(np.isfinite(costs), costs, np.inf)


def _variances(noise: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """Variances (k, n) of the distances from lines (2 or 3, k, n), for noise (3, n) as in Matches."""
    x, y = lines[:2]
    return np.asarray((noise[0] * x + 2 * noise[1] * y) * x + noise[2] * y * y)


def essential_matrices(rays0: np.ndarray, rays1: np.ndarray) -> np.ndarray:
    """All essential matrices E with rays0' E rays1 = 0, of all samples (s, 5, 3): (k, 3, 3), each of norm 1."""
    basis = _null_space(rays0, rays1)
    equations = _equations(basis)
    solvable = np.linalg.slogdet(equations[:, :, :10])[0] != 0  # False for a singular system; NaN is removed at the end
    basis, equations = basis[solvable], equations[solvable]
    rows = _eliminate(np.linalg.solve(equations[:, :, :10], equations[:, :, 10:]))
    polynomials = _determinant(rows)
    found = []
    # A root z beyond -1 to 1 is the root 1 / z of the polynomial with reversed coefficients.
    for reverse in (False, True):
        sample, roots = _roots(polynomials[:, ::-1] if reverse else polynomials)
        s, c = (np.ones_like(roots), roots) if reverse else (roots, np.ones_like(roots))
        found.append(_mix(basis[sample], rows[sample], s, c))
    matrices = np.concatenate(found)
    return np.asarray(matrices[np.isfinite(matrices).all(axis=(1, 2))])


def _null_space(rays0: np.ndarray, rays1: np.ndarray) -> np.ndarray:
    """Four orthonormal matrices (s, 4, 3, 3) with rays0' E rays1 = 0 for all five matches, by Householder's QR."""
    conditions = (rays0[..., :, None] * rays1[..., None, :]).reshape(len(rays0), POINTS, 9)
    basis = np.zeros((len(rays0), 4, 9))
    basis[:, range(4), range(POINTS, 9)] = 1
    normals = []
    for k in range(POINTS):
        normal = conditions[:, k].copy()
        normal[:, :k] = 0
        normal[:, k] += np.copysign(np.sqrt((normal * normal).sum(axis=1)), normal[:, k])
        normal *= np.sqrt(2 / np.maximum((normal * normal).sum(axis=1), TINY))[:, None]
        conditions[:, k + 1 :] = _reflect(conditions[:, k + 1 :], normal)
        normals.append(normal)
    for normal in reversed(normals):
        basis = _reflect(basis, normal)
    return basis.reshape(-1, 4, 3, 3)


def _reflect(vectors: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Vectors (s, m, 9) after a Householder reflection. The normal (s, 9) has the squared length 2."""
    return np.asarray(vectors - (vectors @ normal[:, :, None]) * normal[:, None])


def _equations(basis: np.ndarray) -> np.ndarray:
    """Coefficients (s, 10, 20) of the cubic equations for x, y, z: those of the trace, and that of the determinant."""
    one, other = basis[:, _FIRST], basis[:, _SECOND]
    twice = (_FIRST != _SECOND)[:, None, None]
    squares = one @ other.swapaxes(2, 3)
    squares = squares + twice * squares.swapaxes(2, 3)
    halves = 0.5 * np.trace(squares, axis1=2, axis2=3)
    cubes = squares[:, :, None] @ basis[:, None] - halves[:, :, None, None, None] * basis[:, None]
    minors = np.cross(one[:, :, 1], other[:, :, 2]) + twice[:, 0] * np.cross(other[:, :, 1], one[:, :, 2])
    determinants = minors @ basis[:, :, 0].swapaxes(1, 2)
    whole = np.concatenate([cubes.reshape(-1, len(_PAIRS), 4, 9), determinants[..., None]], axis=3)
    return np.asarray((_TIMES @ whole.reshape(-1, 4 * len(_PAIRS), 10)).swapaxes(1, 2))


def _eliminate(reduced: np.ndarray) -> np.ndarray:
    """Nister's three equations in x, y and 1, whose coefficients are polynomials of z: (s, 3, 3, 5), ascending.

    Args:
        reduced: (s, 10, 10) coefficients of the last ten monomials, after the first ten were eliminated.
    """
    rows = np.zeros((len(reduced), 3, 3, 5))
    for row, first in enumerate((4, 6, 8)):  # x²z, y²z and xyz; the next one times z gives the same monomial
        for column, (start, degree) in enumerate(((0, 2), (3, 2), (6, 3))):
            descending = slice(start, start + degree + 1)
            rows[:, row, column, : degree + 1] += reduced[:, first, descending][:, ::-1]
            rows[:, row, column, 1 : degree + 2] -= reduced[:, first + 1, descending][:, ::-1]
    return rows


def _determinant(rows: np.ndarray) -> np.ndarray:
    """Determinants (s, 11) of the equations (s, 3, 3, 5), ascending polynomials of z."""
    x, y, one = rows[:, :, 0, :4], rows[:, :, 1, :4], rows[:, :, 2]
    whole = np.zeros((len(rows), 11))
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        whole += _times(one[:, i], _times(x[:, j], y[:, k]) - _times(x[:, k], y[:, j]))
    return whole


def _times(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Products of polynomials (s, m) and (s, n): (s, m + n - 1)."""
    product = np.zeros((len(one), one.shape[1] + other.shape[1] - 1))
    for power in range(one.shape[1]):
        product[:, power : power + other.shape[1]] += one[:, power : power + 1] * other
    return product


def _roots(polynomials: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Roots from -1 to 1 of polynomials (s, 11), ascending: the numbers (k,) of the polynomials, and the roots (k,)."""
    grid = np.linspace(-1.0, 1.0, _CELLS + 1)
    values, slopes = _values(polynomials[:, :, None], grid)
    positive = values >= 0
    approaches = positive != (slopes >= 0)  # from left to right, the value approaches zero
    same = positive[:, 1:] == positive[:, :-1]
    sample, cell = np.nonzero(same & approaches[:, :-1] & ~approaches[:, 1:])
    low, high, above = grid[cell], grid[cell + 1], positive[sample, cell]
    turning = _root(polynomials[sample, 1:] * np.arange(1, polynomials.shape[1]), low, high, above)
    crosses = (_values(polynomials[sample], turning)[0] >= 0) != above
    pairs, low, high, turning, above = (each[crosses] for each in (sample, low, high, turning, above))
    sample, cell = np.nonzero(~same)
    samples = np.concatenate([sample, pairs, pairs])
    lows, highs = np.concatenate([grid[cell], low, turning]), np.concatenate([grid[cell + 1], turning, high])
    rises = np.concatenate([positive[sample, cell + 1], ~above, above])
    return samples, _root(polynomials[samples], lows, highs, rises)


def _root(polynomials: np.ndarray, low: np.ndarray, high: np.ndarray, rises: np.ndarray) -> np.ndarray:
    """The root (k,) of each polynomial (k, m) between low and high, by Newton's method. `rises`: its sign at high."""
    root = 0.5 * (low + high)
    for _ in range(_ITERATIONS):
        value, slope = _values(polynomials, root)
        above = (value >= 0) == rises
        low, high = np.where(above, low, root), np.where(above, root, high)
        with np.errstate(divide="ignore", invalid="ignore"):
            root = root - value / slope
        root = np.where((root >= low) & (root <= high), root, 0.5 * (low + high))
    return root


def _values(polynomials: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values of polynomials (s, 11, ...), ascending, and their derivatives, by Horner's scheme."""
    value, slope = polynomials[:, -1] + 0 * places, 0 * places
    for power in reversed(range(polynomials.shape[1] - 1)):
        slope = slope * places + value
        value = value * places + polynomials[:, power]
    return value, slope


def _mix(basis: np.ndarray, rows: np.ndarray, s: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The essential matrices (k, 3, 3) for the roots z = s / c (k,)."""
    s, c = s[:, None, None], c[:, None, None]
    powers = [s**power * c ** (4 - power) for power in range(5)]
    system = sum(rows[..., power] * powers[power] for power in range(5))
    (first, second, third) = system[:, 0], system[:, 1], system[:, 2]
    solutions = np.stack([np.cross(first, second), np.cross(first, third), np.cross(second, third)], axis=1)
    sizes = (solutions * solutions).sum(axis=2)
    x, y, one = solutions[range(len(sizes)), sizes.argmax(axis=1)].T[:, :, None, None]
    mixed = c * (x * basis[:, 0] + y * basis[:, 1]) + one * (s * basis[:, 2] + c * basis[:, 3])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(mixed / np.sqrt((mixed * mixed).sum(axis=(1, 2), keepdims=True)))
