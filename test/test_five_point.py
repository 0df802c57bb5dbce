"""Tests of essential matrices from samples of five matches, and of the search for a motion."""

from __future__ import annotations

import numpy as np
import pytest
from compiled_geometry import needed, with_numpy
from two_view_fuzz import matches_of, motion_of
from two_view_scenes import CAMERA, Scene

from kpmatch_ros.geometry import compiled, two_view_search
from kpmatch_ros.geometry.five_point import POINTS, best_essential, essential_matrices
from kpmatch_ros.geometry.two_view_errors import Matches, Motion, essential_matrix, normalise_matches
from kpmatch_ros.geometry.two_view_search import draw_samples, search_motions

THRESHOLD = 1.0  # pixels


def exact(seed: int, count: int = POINTS) -> tuple[Matches, Motion]:
    """Matches without noise, and their motion."""
    random = np.random.default_rng(seed)
    motion = motion_of(random)
    points = np.vstack([random.uniform(-1, 1, (2, 8 * count)), np.ones(8 * count)]) * random.uniform(2, 6, 8 * count)
    seen = motion.rotation.T @ (points - motion.translation[:, None])
    ahead = np.flatnonzero(seen[2] > 0.1)[:count]
    columns = np.ones((4, 3, len(ahead)))
    columns[0], columns[1] = points[:, ahead] / points[2, ahead], seen[:, ahead] / seen[2, ahead]
    columns[2:] = np.array([1.0, 0.0, 1.0])[:, None] / 500**2
    return Matches(columns), motion


def scene_matches(count: int, outliers: float, seed: int, noise: float = 0.3) -> tuple[Matches, Scene]:
    scene = Scene(noise=noise, outliers=outliers)
    points0, points1, _ = scene.matches(count, seed)
    return normalise_matches(points0, points1, CAMERA, CAMERA)[0], scene


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference of two essential matrices up to sign and scale."""
    found, expected = found / np.linalg.norm(found), expected / np.linalg.norm(expected)
    return float(min(np.abs(found - expected).max(), np.abs(found + expected).max()))


def test_the_true_essential_matrix_is_nearly_always_among_those_of_five_exact_matches() -> None:
    found = []
    for seed in range(300):
        matches, motion = exact(seed)
        if len(matches) < POINTS:
            continue
        candidates = essential_matrices(matches.rays0.T[None], matches.rays1.T[None])
        assert 0 < len(candidates) <= 10
        found.append(min(distance(each, essential_matrix(motion)) for each in candidates) < 1e-2)
    assert len(found) > 250 and np.mean(found) > 0.98


def test_each_candidate_is_an_essential_matrix_of_its_five_matches() -> None:
    for seed in range(100):
        matches, _ = exact(seed)
        if len(matches) < POINTS:
            continue
        for essential in essential_matrices(matches.rays0.T[None], matches.rays1.T[None]):
            first, second, third = np.linalg.svd(essential)[1]
            assert first == pytest.approx(second, abs=1e-4) and third < 1e-4
            assert np.linalg.norm(essential) == pytest.approx(1)
            for ray0, ray1 in zip(matches.rays0.T, matches.rays1.T):
                assert abs(ray0 @ essential @ ray1) < 1e-9 * np.linalg.norm(ray0) * np.linalg.norm(ray1)


@pytest.mark.parametrize("how", [lambda call, *given: call(*given), with_numpy], ids=["compiled", "numpy"])
def test_the_best_sample_has_the_lowest_cost_and_must_cost_less_than_asked(how: object) -> None:
    assert callable(how)
    matches, _ = scene_matches(60, 0.3, 0)
    samples = draw_samples(60, np.random.default_rng(0).random((40, POINTS)))
    each = [how(best_essential, matches, one[None], THRESHOLD) for one in samples]
    costs = [found[1] for found in each if found is not None]
    essential, cost = how(best_essential, matches, samples, THRESHOLD)
    assert cost == pytest.approx(min(costs), rel=1e-9)
    lines0, lines1 = essential @ matches.rays1, essential.T @ matches.rays0
    squares = (matches.rays0 * lines0).sum(axis=0) ** 2
    squares /= ((lines0[:2] ** 2).sum(axis=0) + (lines1[:2] ** 2).sum(axis=0)) / CAMERA.focal**2
    assert cost == pytest.approx(np.minimum(squares, THRESHOLD**2).sum(), rel=1e-6)
    assert how(best_essential, matches, samples, THRESHOLD, cost) is None
    assert how(best_essential, matches, samples[:0], THRESHOLD) is None


@needed
def test_nearly_every_sample_gives_the_result_of_numpy() -> None:
    """Rounding decides about pairs of roots that almost coincide."""
    same = []
    for seed in range(40):
        random = np.random.default_rng(seed)
        matches = matches_of(random, motion_of(random), int(random.choice([5, 8, 31, 33, 200])))
        for sample in draw_samples(len(matches), random.random((10, POINTS))):
            costs = []
            for found in (best_essential, lambda *given: with_numpy(best_essential, *given)):
                best = found(matches, sample[None], THRESHOLD)
                costs.append(np.inf if best is None else best[1])
            same.append(costs[0] == pytest.approx(costs[1], rel=1e-4, abs=1e-6))
    assert np.mean(same) > 0.9


@pytest.mark.parametrize("how", [lambda call, *given: call(*given), with_numpy], ids=["compiled", "numpy"])
@pytest.mark.parametrize("what", ["one place", "one line", "standing", "nan", "infinite", "huge", "tiny"])
def test_samples_that_determine_nothing_are_harmless(how: object, what: str) -> None:
    assert callable(how)
    columns = exact(0, 8)[0].columns.copy()
    if what == "one place":
        columns[:2] = columns[:2, :, :1]
    elif what == "one line":
        columns[:2, 1] = 0.0
    elif what == "standing":
        columns[1] = columns[0]
    else:
        columns[1, 0, 2:4] = {"nan": np.nan, "infinite": np.inf, "huge": 1e200, "tiny": 1e-300}[what]
    matches = Matches(columns)
    samples = draw_samples(len(matches), np.random.default_rng(0).random((20, POINTS)))
    with np.errstate(all="ignore"):
        found = how(best_essential, matches, samples, THRESHOLD)
        motions = how(search_motions, matches, THRESHOLD, THRESHOLD / CAMERA.focal)
    if found is not None:
        assert np.isfinite(found[0]).all() and np.isfinite(found[1])
    for motion in motions:
        assert np.isfinite(motion.rotation).all() and np.isfinite(motion.translation).all()


@needed
def test_a_sample_of_a_match_that_does_not_exist_is_refused() -> None:
    matches, _ = exact(0, 8)
    for index in (-1, 8):
        with pytest.raises(IndexError, match=f"samples of 8 matches have indices .*{index}"):
            compiled.best_essential(matches.columns, np.array([[0, 1, 2, 3, index]], np.int32), THRESHOLD, np.inf)


def test_a_sample_has_five_different_matches_and_each_is_as_likely() -> None:
    chances = np.random.default_rng(0).random((20_000, POINTS))
    for count in (5, 6, 40):
        samples = draw_samples(count, chances)
        assert (np.diff(np.sort(samples, axis=1), axis=1) > 0).all()
        shares = np.bincount(samples.ravel(), minlength=count) / len(samples)
        assert len(shares) == count
        np.testing.assert_allclose(shares, POINTS / count, rtol=0.1)


@pytest.mark.parametrize("outliers", [0.0, 0.3, 0.5, 0.7])
def test_the_search_finds_the_motion_among_wrong_matches(outliers: float) -> None:
    for seed in range(4):
        matches, scene = scene_matches(200, outliers, seed)
        found = search_motions(matches, THRESHOLD, THRESHOLD / CAMERA.focal)
        truth = np.array(scene.translation) / np.linalg.norm(scene.translation)
        assert max(float(truth @ motion.translation) for motion in found) > np.cos(np.radians(10))


def test_the_search_takes_few_samples_if_most_matches_are_correct(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def counting(matches: Matches, samples: np.ndarray, *given: float) -> object:
        taken.append(len(samples))
        return best_essential(matches, samples, *given)

    monkeypatch.setattr(two_view_search, "best_essential", counting)
    for outliers, most in ((0.0, 128), (0.5, 1000), (1.0, 6144)):
        taken.clear()
        search_motions(scene_matches(200, outliers, 0)[0], THRESHOLD, THRESHOLD / CAMERA.focal)
        assert sum(taken) <= most
    assert sum(taken) > 5000  # wrong matches only: all samples
    taken.clear()
    search_motions(scene_matches(200, 1.0, 0)[0], THRESHOLD, THRESHOLD / CAMERA.focal, fewest=80)
    assert sum(taken) <= 2 * 1024  # 672 samples of 200 matches, of which 80 are inliers, miss them once in 1,000 times


@pytest.mark.parametrize("correct", [0.4, 0.6])
def test_a_motion_of_as_many_matches_as_asked_is_found(correct: float) -> None:
    matches, scene = scene_matches(200, 1 - correct, 0)
    found = search_motions(matches, THRESHOLD, THRESHOLD / CAMERA.focal, fewest=200 * correct)
    truth = np.array(scene.translation) / np.linalg.norm(scene.translation)
    assert max(float(truth @ motion.translation) for motion in found) > np.cos(np.radians(10))


def test_the_search_gives_nothing_for_fewer_than_five_matches() -> None:
    for count in range(POINTS):
        assert search_motions(scene_matches(200, 0.0, 0)[0].select(np.arange(count)), THRESHOLD, 0.002) == []


def test_a_threshold_that_no_match_is_within_is_harmless() -> None:
    matches = scene_matches(60, 0.3, 0)[0]
    for motion in search_motions(matches, 1e-200, 1e-203):
        assert np.isfinite(motion.rotation).all()
