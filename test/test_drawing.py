"""Tests of pictures of matches."""

from __future__ import annotations

import numpy as np
import pytest

from kpmatch_ros.drawing import draw_matches

GREY = np.full((240, 320), 90, np.uint8)
FIGURES = "matches 12  inliers 9 (75 %)  layers 7  extract 310.2 ms  match 88.1 ms"


def draw(points0=(), points1=(), scores=(), inliers=None, text="", image0=GREY, image1=GREY):
    return draw_matches(image0, image1, points0, points1, scores, inliers, text)


def changed(picture, blank):
    """Return where two pictures differ."""
    return (picture.astype(int) != blank).any(axis=2)


def offset_of_image1(picture, image1=GREY):
    return picture.shape[1] - image1.shape[1]


def test_both_images_are_side_by_side_in_rgb():
    picture = draw(image0=GREY, image1=np.full((240, 320), 200, np.uint8))
    assert picture.dtype == np.uint8 and picture.shape[0] == 240 and picture.shape[1] >= 640 and picture.shape[2] == 3
    assert picture[:, -320:].mean() > picture[:, :320].mean() > 0


def test_images_of_different_sizes_are_aligned_at_the_top():
    picture = draw(image0=np.full((100, 320), 90, np.uint8), image1=np.full((240, 64), 200, np.uint8))
    assert picture.shape[0] == 240
    assert picture[50, 10].min() > picture[150, 10].max()  # below the lower one there is only background
    assert (picture[:, -64:] == picture[0, -1]).all()


def test_colours_stay_in_rgb_order_even_for_a_view_of_bgr():
    bgr = np.zeros((240, 320, 3), np.uint8)
    bgr[..., 2] = 255
    picture = draw(image0=bgr[..., ::-1], image1=np.ascontiguousarray(bgr[..., ::-1]))
    for red in (picture[100, 100], picture[100, -100]):
        assert red[0] > red[1] + 50 and red[0] > red[2] + 50
    assert (picture[100, 100] == picture[100, -100]).all()


@pytest.mark.parametrize("view", [np.s_[::-1], np.s_[:, ::-1], np.s_[::2, ::2]])
def test_an_array_view_is_drawn_like_its_copy(view):
    image = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    for whole in (image, image[..., 0], image[..., ::-1]):
        seen = whole[view]
        assert (draw(image0=seen, image1=seen) == draw(image0=seen.copy(), image1=seen.copy())).all()


def test_read_only_images_are_drawn_and_not_changed():
    frozen = GREY.copy()
    frozen.setflags(write=False)
    draw([(10, 10)], [(20, 20)], [0.5], [True], FIGURES, frozen, frozen)
    assert (frozen == GREY).all()


def test_without_matches_and_text_only_the_images_are_drawn():
    picture = draw()
    assert np.unique(picture[:, :320]).size == 1


def test_a_match_joins_its_two_points():
    blank = draw()
    picture = draw([(40, 60)], [(280, 60)], [1.0])
    offset = offset_of_image1(picture)
    columns = np.flatnonzero(changed(picture, blank)[60])
    assert abs(columns.min() - 40) <= 3 and abs(columns.max() - (offset + 280)) <= 3
    assert len(columns) == columns.max() - columns.min() + 1  # without a gap
    assert not changed(picture, blank)[:50].any() and not changed(picture, blank)[70:].any()


def test_a_point_is_drawn_at_its_subpixel_position():
    blank = draw()
    upper, lower = (draw([(40, y)], [(280, y)], [1.0]) for y in (100.0, 100.5))

    def height(picture):
        weight = np.abs(picture[:, 160].astype(int) - blank[:, 160]).sum(axis=1)
        return (weight * np.arange(len(weight))).sum() / weight.sum()

    assert height(upper) == pytest.approx(100.0, abs=0.1) and height(lower) == pytest.approx(100.5, abs=0.1)


def test_the_colour_of_a_match_brightens_with_its_score():
    def luma(score):
        dot = draw([(100, 100)], [(100, 100)], [score])[100, 100]
        return dot @ [0.299, 0.587, 0.114]

    assert luma(0.0) < luma(0.3) < luma(0.6) < luma(1.0)


def test_outliers_are_red_and_inliers_are_not():
    good, bad = (draw([(100, 100)], [(100, 100)], [1.0], [flag])[100, 100].astype(int) for flag in (True, False))
    assert bad[0] > bad[1] + 80 and bad[0] > bad[2] + 80
    assert good[1] > good[0] - 40


def test_an_outlier_is_a_cross_with_a_fainter_line():
    blank = draw()
    good, bad = (changed(draw([(100, 100)], [(100, 200)], [1.0], [flag]), blank) for flag in (True, False))
    assert good[100, 98] and good[98, 100]  # a dot
    assert not bad[100, 98] and not bad[98, 100] and bad[98, 98] and bad[102, 98]  # a cross
    line = np.s_[120:180, 150:300]
    strength = [
        np.abs(draw([(100, 100)], [(100, 200)], [1.0], [flag])[line].astype(int) - blank[line]).sum()
        for flag in (True, False)
    ]
    assert strength[0] > strength[1] > 0


def test_without_an_estimate_no_match_is_marked_as_an_outlier():
    everything = draw([(100, 100)], [(100, 200)], [0.4], [True])
    assert (draw([(100, 100)], [(100, 200)], [0.4], None) == everything).all()


def test_inliers_may_be_bytes_as_in_the_message():
    points, scores = [(100, 100), (50, 50)], [0.4, 0.9]
    expected = draw(points, points, scores, np.array([True, False]))
    assert (draw(points, points, scores, np.array([1, 0], np.uint8)) == expected).all()


@pytest.mark.parametrize("inliers", [np.ones(500, bool), np.zeros(500, bool)], ids=["inliers", "outliers"])
def test_with_many_matches_all_points_but_only_some_lines_are_drawn(inliers):
    y, x = np.divmod(np.arange(500), 25)
    points = np.stack([12 * x + 10, 11 * y + 10], axis=1).astype(float)
    marked = changed(draw(points, points, np.ones(500), inliers), draw())
    assert marked[points[:, 1].astype(int), points[:, 0].astype(int)].all()
    between = marked[np.arange(10, 220)[:, None], np.arange(12, 320, 12) + 4]
    assert 0.01 < between.mean() < 0.4  # the images remain visible


def test_points_outside_the_images_do_not_enlarge_the_picture():
    picture = draw([(-50, -20), (5000, 10)], [(10, 10), (10, 400)], [0.5, 0.5], [True, False])
    assert picture.shape[:2] == draw().shape[:2]


def test_a_nan_score_is_drawn_as_the_lowest():
    assert (draw([(9, 9)], [(9, 9)], [np.nan]) == draw([(9, 9)], [(9, 9)], [0.0])).all()


def test_the_text_is_on_a_dark_band_at_the_bottom():
    picture, blank = draw(text=FIGURES), draw()
    rows = np.flatnonzero(changed(picture, blank).any(axis=1))
    assert rows.max() == 239 and 12 <= len(rows) <= 30
    band = picture[rows.min() :]
    assert np.median(band) < blank[0, 0, 0] / 2 and band.max() > 200  # bright letters on a dark band


@pytest.mark.parametrize("width", [8, 40, 120, 320, 1400])
def test_a_text_of_any_length_fits(width):
    image = np.full((240, width), 90, np.uint8)
    picture = draw(text=FIGURES * 3, image0=image, image1=image)
    assert (picture[-60:, -3:].max(axis=(0, 1)) < 150).all()  # no letter is cut off at the right


def test_larger_images_have_larger_letters_and_dots():
    small, large = (np.full((h, w), 90, np.uint8) for h, w in ((240, 320), (1440, 1920)))

    def ink(image):
        picture = draw([(100, 100)], [(100, 100)], [1.0], text=FIGURES, image0=image, image1=image)
        blank = draw(image0=image, image1=image)
        return changed(picture, blank)[-200:, 5].sum(), changed(picture, blank)[80:120, 80:100].sum()

    assert all(few < many for few, many in zip(ink(small), ink(large)))


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (3, 640), (640, 3)])
def test_tiny_images_can_be_drawn(shape):
    image = np.zeros(shape, np.uint8)
    assert draw([(0, 0)], [(0, 0)], [1.0], [False], FIGURES, image, image).shape[0] == shape[0]


@pytest.mark.parametrize(
    "image",
    [GREY.astype(np.float32), np.zeros((4, 4, 4), np.uint8), np.zeros(16, np.uint8), np.zeros((0, 5), np.uint8)],
    ids=["float", "four channels", "one dimension", "empty"],
)
def test_an_image_that_is_not_8_bit_is_refused(image):
    with pytest.raises(ValueError, match=r"image1 is .* must be uint8"):
        draw(image1=image)


def test_arrays_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="2 points0, 1 points1, 2 scores and 2 inliers"):
        draw([(1, 1), (2, 2)], [(1, 1)], [0.5, 0.5])
