"""Training goes on where it was stopped, shows the student the truth, and ships what it trained."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from kpmatch_ros import FeatureMatcher
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.models import LightGlue, SuperPoint
from kpmatch_ros.models.aliked import ALIKED
from simulation import View

TRAINING = Path(__file__).resolve().parents[1] / "training"
if not TRAINING.is_dir():
    pytest.skip("training/ is not installed with the package", allow_module_level=True)
sys.path.insert(0, str(TRAINING))

import adapt_superpoint  # noqa: E402
import common  # noqa: E402
import evaluate  # noqa: E402
import export  # noqa: E402
import prepare  # noqa: E402
import train_lightglue  # noqa: E402
import train_superpoint  # noqa: E402

Texture = Callable[[int, int, int], np.ndarray]
SaveFolder = Callable[..., Path]
Randomise = Callable[[nn.Module, int], None]
CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------------------- views of a picture


def test_a_point_of_a_picture_lies_where_the_view_shows_it() -> None:
    rng = common.generator(1)
    for _ in range(20):
        homography = common.random_homography(rng, (300, 200), (160, 120), 1.0)
        picture = np.zeros((200, 300), np.uint8)
        spot = common.project(np.linalg.inv(homography), np.array([[80.0, 60.0]]))[0]
        if not common.inside(spot[None], (300, 200), 10)[0]:
            continue
        cv2.circle(picture, tuple(int(v) for v in np.round(spot)), 3, 255, -1)
        view = common.warp(picture, homography, (160, 120)).astype(float)
        y, x = np.mgrid[:120, :160]
        expected = common.project(homography, np.round(spot)[None])[0]
        view[np.hypot(x - expected[0], y - expected[1]) > 20] = 0  # what is mirrored beyond the picture's border
        assert (view * x).sum() / view.sum() == pytest.approx(expected[0], abs=0.5)
        assert (view * y).sum() / view.sum() == pytest.approx(expected[1], abs=0.5)


def test_degrading_changes_an_image_as_strongly_as_told_and_always_alike(texture: Texture) -> None:
    image = texture(120, 160, 0)

    def change(strength: float) -> float:
        degraded = [common.degrade(common.generator(i), image, strength) for i in range(20)]
        assert all(d.shape == image.shape and d.dtype == np.uint8 for d in degraded)
        return float(np.mean([np.abs(d.astype(float) - image).mean() for d in degraded]))

    assert change(0.0) == 0
    assert 0 < change(0.3) < change(1.0)
    again = [common.degrade(common.generator(5), image, 0.8) for _ in range(2)]
    np.testing.assert_array_equal(*again)


def test_the_same_picture_in_another_size_is_recognised(texture: Texture) -> None:
    picture = cv2.GaussianBlur(cv2.cvtColor(texture(600, 900, 0), cv2.COLOR_GRAY2BGR), (0, 0), 5)
    smaller = cv2.resize(picture, (480, 320), interpolation=cv2.INTER_AREA)
    other = cv2.GaussianBlur(cv2.cvtColor(texture(600, 900, 1), cv2.COLOR_GRAY2BGR), (0, 0), 5)
    fingerprint = prepare.difference_hash(picture)
    assert np.count_nonzero(fingerprint != prepare.difference_hash(smaller)) <= 5
    assert np.count_nonzero(fingerprint != prepare.difference_hash(other)) > 5


# ----------------------------------------------------------------------------------------------------------- SuperPoint


def test_labels_mean_the_pixels_at_which_the_detector_finds_points() -> None:
    points = np.array([[100.0, 50.0], [31.4, 16.6], [32.0, 17.0]])  # the last two in neighbouring cells
    labels = train_superpoint.label_cells(points, np.eye(3))
    logits = torch.nn.functional.one_hot(torch.from_numpy(labels), 65).permute(2, 0, 1)[None].float()
    scores = torch.nn.functional.pixel_shuffle(logits[:, :64], 8)[0, 0]
    found = {(int(x), int(y)) for y, x in scores.nonzero()}
    assert found == {(100, 50), (31, 17), (32, 17)}


def test_of_two_points_in_a_cell_the_better_is_the_label() -> None:
    labels = train_superpoint.label_cells(np.array([[10.0, 9.0], [14.0, 15.0]]), np.eye(3))
    assert labels[1, 1] == 1 * 8 + 2


def test_nothing_is_said_about_cells_outside_the_picture() -> None:
    shifted = np.array([[1.0, 0, 20], [0, 1, 0], [0, 0, 1]])
    labels = train_superpoint.label_cells(np.zeros((0, 2)), shifted)
    assert (labels[:, :3] == train_superpoint.UNKNOWN).all()
    assert (labels[:, 3:] == train_superpoint.NOTHING).all()


def test_corners_are_voted_for_where_the_learned_detector_is_blind() -> None:
    image = np.full((120, 160), 100, np.uint8)
    image[40:80, 50:110] = 130
    points = train_superpoint.vote(image, np.zeros((120, 160), np.float32))
    for corner in ((50, 40), (109, 40), (50, 79), (109, 79)):
        assert np.linalg.norm(points - corner, axis=1).min() < 2
    assert not (np.abs(points - (80, 60)) < (20, 40)).all(axis=1).any()  # along the edges between them


def test_points_in_what_has_become_all_white_are_dropped(texture: Texture) -> None:
    image = texture(240, 320, 0)
    image[:, :150] = 255
    points = np.array([[50.0, 50], [250, 50], [-5, 50], [np.nan, np.nan]])
    assert train_superpoint.recognisable(image, points).tolist() == [False, True, False, False]


def test_batch_norms_change_nothing_when_put_in_nor_when_folded(
    texture: Texture, small_superpoint: dict[str, Any], randomise_superpoint: Randomise
) -> None:
    plain = SuperPoint(**small_superpoint)
    randomise_superpoint(plain, 0)
    image = common.to_tensor([texture(96, 128, 1)], CPU)
    before = train_superpoint.student(plain, image)
    model = SuperPoint(**small_superpoint)
    model.load_state_dict(plain.state_dict())
    model = train_superpoint.add_norms(model)
    train_superpoint.adopt_statistics(model, image)
    model.eval()
    for expected, found in zip(before, train_superpoint.student(model, image)):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)

    model.train()
    train_superpoint.student(model, common.to_tensor([texture(96, 128, 2)], CPU))  # moves the statistics
    model.eval()
    moved = train_superpoint.student(model, image)
    folded = train_superpoint.fold(model.state_dict(), model.config)
    assert folded.state_dict().keys() == plain.state_dict().keys()
    for expected, found in zip(moved, train_superpoint.student(folded, image)):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, texture: Texture) -> Path:
    """What prepare.py would fetch, but small, and a teacher who knows nothing."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "teachers").mkdir()
    torch.manual_seed(0)
    torch.save(ALIKED().state_dict(), folder / "teachers" / "aliked-n16.pth")
    listed = []
    for number, split in enumerate(("train", "train", "held-out")):
        cv2.imwrite(str(folder / f"{number}.png"), cv2.cvtColor(texture(400, 520, number), cv2.COLOR_GRAY2BGR))
        listed.append({"file": f"{number}.png", "split": split})
    (folder / "manifest.json").write_text(json.dumps({"pictures": listed}))
    return folder


def superpoint_training(data: Path, run: Path, weights: Path, **changes: Any) -> Namespace:
    return Namespace(
        **{
            "data": data,
            "run": run,
            "start_from": str(weights),
            "steps": 100,
            "pairs": 1,
            "crops": 2,
            "seed": 0,
            "learning_rate": 1e-3,
            "strength": 0.5,
            "device": "cpu",
            "workers": 1,
            "save_every": 1e9,
            "examine_every": 1000,
            "held_out": 1,
            "stop_after": None,
            **changes,
        }
    )


def read_log(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_a_superpoint_training_that_was_stopped_goes_on_as_if_it_had_not_been(
    data: Path, tmp_path: Path, random_folder: SaveFolder
) -> None:
    weights = random_folder(superpoint={"descriptor_decoder_dim": 128})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_superpoint.train(superpoint_training(data, whole, weights, stop_after=4))
    train_superpoint.train(superpoint_training(data, parts, weights, stop_after=2))
    # As after a kill between checkpoints: a step that was logged and not saved, and half a line.
    with (parts / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "total": 99.0}\n{"step": 4, "to')
    train_superpoint.train(superpoint_training(data, parts, weights, stop_after=2))
    assert read_log(parts) == read_log(whole)
    assert [line["step"] for line in read_log(whole)] == [0, 1, 2, 3, 4]
    ends = [torch.load(run / "checkpoint.pt", weights_only=True) for run in (whole, parts)]
    for name, tensor in ends[0]["average"].items():
        torch.testing.assert_close(ends[1]["average"][name], tensor, rtol=0, atol=0)


def test_going_on_with_other_settings_is_refused(data: Path, tmp_path: Path, random_folder: SaveFolder) -> None:
    weights = random_folder(superpoint={"descriptor_decoder_dim": 128})
    common.Run(tmp_path, {"pairs": 4, "seed": 0})
    with pytest.raises(SystemExit, match="pairs: 4 then, 1 now"):
        train_superpoint.train(superpoint_training(data, tmp_path, weights))


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(tmp_path: Path) -> None:
    run = common.Run(tmp_path, {})
    run.save({"step": 1, "model": {"weight": torch.ones(3)}})
    run.save({"step": 2, "model": {"weight": torch.full((3,), 2.0)}})
    assert run.load(CPU)["step"] == 2  # type: ignore[index]
    run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:100])
    assert run.load(CPU)["step"] == 1  # type: ignore[index]
    run.checkpoint.unlink()  # killed between the two renames
    assert run.load(CPU)["step"] == 1  # type: ignore[index]


# --------------------------------------------------------------------------------------------- SuperPoint's detector


def adaptation(data: Path, run: Path, weights: str, **changes: Any) -> Namespace:
    return Namespace(
        **{
            "data": data,
            "run": run,
            "start_from": weights,
            "frozen": 1,
            "steps": 1000,
            "views": 2,
            "crops": 1,
            "seed": 0,
            "learning_rate": 5e-4,
            "device": "cpu",
            "workers": 1,
            "save_every": 1e9,
            "examine_every": 1000,
            "held_out": 1,
            "stop_after": None,
            **changes,
        }
    )


def test_the_middle_of_what_views_agree_on_is_found_to_a_fraction_of_a_pixel() -> None:
    rng, (y, x) = common.generator(2), np.mgrid[:120, :160]
    places = np.array([[40.3, 30.6], [100.0, 80.4], [120.7, 20.0]])
    scores = np.float32(sum(np.exp(-((x - u) ** 2 + (y - v) ** 2) / 2) / k for k, (u, v) in enumerate(places, start=1)))
    found = adapt_superpoint.peaks(scores + np.float32(0.01) * rng.random(scores.shape, np.float32))
    np.testing.assert_allclose(found[:3], places, atol=0.3)


def test_views_of_a_crop_are_taught_the_same_places_of_it_and_those_that_are_seen(data: Path) -> None:
    model = SuperPoint.from_pretrained("superpoint-open")
    lessons = adapt_superpoint.Lessons(model, common.pictures(data, "train"), data / "adaptation", 3, CPU)
    lesson = lessons[0]
    labelled = []
    for cells in lesson.cells:
        row, column = np.nonzero((cells >= 0) & (cells < adapt_superpoint.NOTHING))
        pixel = cells[row, column]
        labelled.append(np.c_[8 * column + pixel % 8, 8 * row + pixel // 8])
    shared = 0
    for homography, points in zip(lesson.homographies[1:], labelled[1:]):
        expected = common.project(homography @ np.linalg.inv(lesson.homographies[0]), labelled[0].astype(float))
        expected = expected[common.inside(expected, adapt_superpoint.VIEW, 8)]
        nearest = np.linalg.norm(expected[:, None] - points[None], axis=2).min(axis=1)
        shared += len(expected)
        # Of two in one cell only the better is a label there.
        assert (nearest < 1.5).mean() > 0.8
    assert shared > 100
    scores = torch.from_numpy(lessons.scores(list(lesson.views)))
    likelier = [scores[i][tuple(points.T[::-1])].mean() / scores[i].mean() for i, points in enumerate(labelled)]
    assert min(likelier) > 3


def test_adapting_teaches_the_detector_and_leaves_descriptors_and_frozen_blocks(data: Path, tmp_path: Path) -> None:
    # At a rate of which these first steps of the warm-up are a few hundredths.
    adapt_superpoint.train(adaptation(data, tmp_path, "superpoint-open", views=4, stop_after=16, learning_rate=1e-2))
    before, after = SuperPoint.from_pretrained("superpoint-open"), SuperPoint.from_pretrained("superpoint-open")
    after.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"])
    lesson = adapt_superpoint.Lessons(before, common.pictures(data, "train"), data / "adaptation", 0, CPU)[0]
    images, cells = common.to_tensor(list(lesson.views), CPU), torch.from_numpy(lesson.cells)
    descriptors = train_superpoint.student(before, images)[1]
    likely = adapt_superpoint.likely_classes()
    parts = [
        adapt_superpoint.losses(train_superpoint.student(model, images), cells, descriptors, likely)
        for model in (before, after)
    ]
    assert parts[1]["detector"] < 0.95 * parts[0]["detector"]
    assert parts[1]["descriptors"] < 0.05
    for name, tensor in after.state_dict().items():
        same = torch.equal(tensor, before.state_dict()[name])
        assert same == name.startswith("encoder.conv_blocks.0."), name


def test_an_adaptation_that_was_stopped_goes_on_as_if_it_had_not_been(
    data: Path, tmp_path: Path, random_folder: SaveFolder
) -> None:
    weights, whole, parts = str(random_folder()), tmp_path / "whole", tmp_path / "parts"
    adapt_superpoint.train(adaptation(data, whole, weights, stop_after=3))
    adapt_superpoint.train(adaptation(data, parts, weights, stop_after=2))
    adapt_superpoint.train(adaptation(data, parts, weights, stop_after=1))
    assert read_log(parts) == read_log(whole)


# ------------------------------------------------------------------------------------------------------------ LightGlue


def features(points: np.ndarray, places: np.ndarray, size: int = 64) -> train_lightglue.Features:
    descriptors = np.random.default_rng(len(points)).normal(size=(len(points), size)).astype(np.float32)
    return train_lightglue.Features(points.astype(np.float32), descriptors, places.astype(np.float32))


def test_true_partners_are_mutual_and_near_and_what_is_unknown_or_beside_one_is_neither_match_nor_alone() -> None:
    first = features(
        np.array([[10.0, 10], [50, 50], [90, 90], [200, 100], [300, 300], [13, 10]]),
        np.array([[20.0, 10], [60, 50], [np.inf, np.inf], [np.nan, np.nan], [304, 300], [23, 10]]),
    )
    second = features(
        np.array([[21.0, 10], [61, 52], [400, 400], [300, 300]]),
        np.array([[11.0, 10], [51, 52], [np.inf, np.inf], [296, 300]]),
    )
    partners, alone0, alone1 = train_lightglue.truth(first, second)
    assert partners.tolist() == [0, 1, -1, -1, -1, -1]
    # Four pixels off is no match, and the matcher is to know; the last lies beside another one's match.
    assert alone0.tolist() == [False, False, True, False, True, False]
    assert alone1.tolist() == [False, False, True, True]


def plane(distance: float, position: tuple[float, float, float]) -> View:
    matrix = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
    depth = np.full((480, 640), distance, np.float32)
    return View(np.zeros((480, 640, 3), np.uint8), depth, np.eye(3), np.array(position), Camera(640, 480, matrix))


def test_places_in_a_rendered_view_follow_depth_and_know_what_is_hidden() -> None:
    here, there = plane(2.0, (0, 0, 0)), plane(2.0, (0.2, 0, 0))
    there.depth[:, :200] = 1.0  # something stands in front
    here.depth[:, 600:] = np.inf  # sky
    points = np.array([[400.0, 100], [200, 100], [30, 100], [620, 100]])
    places = train_lightglue.places_in(points, here, there)
    np.testing.assert_allclose(places[0], [350, 100], atol=1e-6)  # 500 px * 0.2 m / 2 m
    assert np.isinf(places[1]).all()  # hidden
    assert np.isinf(places[2]).all()  # outside
    assert np.isnan(places[3]).all()


@pytest.fixture(scope="module")
def lightglue(small_lightglue: dict[str, Any], randomise_lightglue: Randomise) -> LightGlue:
    model = LightGlue(input_dim=64, **small_lightglue)
    randomise_lightglue(model, 0)
    return model


def moved_pair(count: int, seed: int) -> tuple[train_lightglue.Features, train_lightglue.Features]:
    """Points of which two thirds reappear, 7 pixels further right."""
    rng = np.random.default_rng(seed)
    points = rng.permutation(np.stack(np.meshgrid(np.arange(20, 600, 25), np.arange(20, 460, 25)), -1).reshape(-1, 2))
    points = points[:count].astype(float)
    order = rng.permutation(count)[: 2 * count // 3]
    shift = np.array([7.0, 0])
    seen = points[order]
    first = features(points, points + shift)
    second = features(seen + shift, seen)
    return first, second._replace(descriptors=first.descriptors[order])


def test_padding_does_not_change_the_loss(lightglue: LightGlue) -> None:
    pairs = [moved_pair(40, 0), moved_pair(25, 1)]
    alone = [train_lightglue.losses(lightglue, train_lightglue.make_batch([pair], 60, CPU)) for pair in pairs]
    both = train_lightglue.losses(lightglue, train_lightglue.make_batch(pairs, 60, CPU))
    expected = (float(alone[0]["assignment"]) + float(alone[1]["assignment"])) / 2
    assert float(both["assignment"]) == pytest.approx(expected, rel=1e-4)


def test_the_loss_is_smaller_for_the_true_assignment_and_reaches_every_layer(lightglue: LightGlue) -> None:
    batch = train_lightglue.make_batch([moved_pair(40, 0)], 40, CPU)
    shuffled = batch._replace(partners=torch.where(batch.partners >= 0, batch.partners.roll(1, 1), -1))
    lightglue.requires_grad_(True)
    parts = train_lightglue.losses(lightglue, batch)
    parts["total"].backward()
    lightglue.requires_grad_(False)
    assert float(parts["assignment"].detach()) < float(train_lightglue.losses(lightglue, shuffled)["assignment"])
    without = [name for name, parameter in lightglue.named_parameters() if parameter.grad is None]
    assert without == []


def test_confidences_learn_without_changing_the_layers(lightglue: LightGlue) -> None:
    lightglue.requires_grad_(True)
    lightglue.zero_grad(set_to_none=True)
    train_lightglue.losses(lightglue, train_lightglue.make_batch([moved_pair(40, 0)], 40, CPU))["confidence"].backward()
    lightglue.requires_grad_(False)
    touched = {name for name, parameter in lightglue.named_parameters() if parameter.grad is not None}
    assert touched
    assert all(name.startswith("token_confidence.") for name in touched)


def train_for(steps: int, data: Path, run: Path, weights: Path) -> None:
    train_lightglue.train(
        Namespace(
            data=data,
            run=run,
            superpoint=str(weights),
            start_from=str(weights),
            steps=100,
            pairs=1,
            keypoints=64,
            pool=2,
            rendered=0.0,
            learning_rate=1e-4,
            strength=0.3,
            seed=0,
            device="cpu",
            workers=1,
            save_every=1e9,
            examine_every=1000,
            held_out=1,
            stop_after=steps,
            nms_radii=[1, 3],
        )
    )


def test_points_are_as_close_as_one_of_the_radii_allows_and_both_images_of_a_pair_have_the_same(
    data: Path, tmp_path: Path, random_folder: SaveFolder
) -> None:
    detector = SuperPoint.from_pretrained(random_folder())
    pairs = train_lightglue.Pairs(common.pictures(data, "train"), detector, tmp_path, 0, 0.0, 0.3, [1, 3])
    closest = []
    for number in range(8):
        points = [features.points for features in pairs.pair(number)]
        assert all(len(each) > 50 for each in points)
        apart = [np.abs(each[:, None] - each[None]).max(axis=2) + 1e9 * np.eye(len(each)) for each in points]
        closest.append([int(each.min()) for each in apart])
    assert {tuple(each) for each in closest} == {(2, 2), (4, 4)}
    assert detector.nms_radius == 4


def test_a_lightglue_training_that_was_stopped_goes_on_as_if_it_had_not_been(
    data: Path, tmp_path: Path, random_folder: SaveFolder
) -> None:
    weights = random_folder()
    train_for(3, data, tmp_path / "whole", weights)
    train_for(1, data, tmp_path / "parts", weights)
    train_for(2, data, tmp_path / "parts", weights)
    assert read_log(tmp_path / "parts") == read_log(tmp_path / "whole")
    assert [line["step"] for line in read_log(tmp_path / "whole")] == [0, 1, 2, 3]


def test_queries_and_keys_that_share_a_projection_go_on_sharing_it(
    data: Path, tmp_path: Path, random_folder: SaveFolder
) -> None:
    source = random_folder()
    lightglue = LightGlue.from_pretrained(source)
    for layer in lightglue.transformer_layers:
        layer.cross_attention.k_proj.load_state_dict(layer.cross_attention.q_proj.state_dict())
    export.export(SuperPoint.from_pretrained(source), lightglue, tmp_path / "shared")
    train_for(2, data, tmp_path / "run", tmp_path / "shared")
    trained = export.load_lightglue(tmp_path / "run" / "checkpoint.pt").state_dict()
    queries = [name for name in trained if "cross_attention.q_proj" in name]
    assert queries
    for name in queries:
        assert torch.equal(trained[name], trained[name.replace("q_proj", "k_proj")])
        assert not torch.equal(trained[name], lightglue.state_dict()[name])


# ------------------------------------------------------------------------------------------------ shipping and judging


def test_what_is_exported_is_what_the_package_and_transformers_load(
    tmp_path: Path, random_folder: SaveFolder, texture: Texture
) -> None:
    transformers = pytest.importorskip("transformers")
    source = random_folder(lightglue={"depth_confidence": -1.0, "width_confidence": -1.0})
    superpoint = SuperPoint.from_pretrained(source)
    export.export(superpoint, LightGlue.from_pretrained(source), tmp_path)
    image0 = texture(120, 160, 0)
    image1 = np.roll(image0, 5, axis=1)
    ours = FeatureMatcher.from_pretrained(
        tmp_path,
        device="cpu",
        precision="float32",
        depth_confidence=-1.0,
        width_confidence=-1.0,
        border=superpoint.border,
    )
    features0, features1 = ours.extract(image0), ours.extract(image1)
    matches = ours.match(features0, features1)
    assert len(matches) > 20

    theirs = transformers.LightGlueForKeypointMatching.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert theirs.config.keypoint_detector_config.keypoint_threshold == 0.0005
    images = torch.stack([common.to_tensor([image], CPU)[0].expand(3, -1, -1) for image in (image0, image1)])[None]
    with torch.no_grad():
        found = theirs(images)
    matches0, count = found.matches.reshape(2, -1)[0], found.keypoints.shape[-2]
    assert count >= max(len(features0), len(features1))
    size = torch.tensor([160, 120])
    pixels = found.keypoints.reshape(2, count, 2) * size
    expected = {
        tuple(pixels[0, i].round().int().tolist() + pixels[1, j].round().int().tolist())
        for i, j in enumerate(matches0.tolist())
        if j >= 0
    }
    pairs = torch.cat([features0.keypoints[matches.indices[:, 0]], features1.keypoints[matches.indices[:, 1]]], dim=1)
    assert {tuple(pair) for pair in pairs.round().int().tolist()} == expected


def test_what_does_not_belong_together_is_not_exported(tmp_path: Path, small_superpoint: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="descriptors have 64 numbers, and the LightGlue takes 128"):
        export.export(SuperPoint(**small_superpoint), LightGlue(input_dim=128), tmp_path)


def test_matches_of_a_known_motion_are_correct_and_give_its_pose() -> None:
    rng = np.random.default_rng(0)
    matrix = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
    rotation = cv2.Rodrigues(np.array([0.05, -0.1, 0.02]))[0]
    translation = np.array([0.3, 0.05, 0.1])
    world = rng.uniform((-2, -1.5, 3), (2, 1.5, 8), (200, 3))
    seen = world @ rotation.T + translation
    points0, points1 = ((p[:, :2] / p[:, 2:]) * 500 + (320, 240) for p in (world, seen))
    truth = evaluate.Pose(rotation, translation, matrix, matrix)
    correct = evaluate.by_epipolar_lines(truth)
    assert correct(points0, points1).all()
    assert correct(points0, points1[::-1]).mean() < 0.3
    assert evaluate.pose_error(truth, points0, points1) < 0.1
    wrong = evaluate.Pose(rotation, np.array([0.1, 0.05, -0.3]), matrix, matrix)
    assert evaluate.pose_error(wrong, points0, points1) > 30


def test_the_area_under_the_curve_counts_an_error_from_its_own_size_on() -> None:
    assert evaluate.area_under_curve([0.0, 0.0], 10) == 1
    assert evaluate.area_under_curve([5.0, float("inf")], 10) == pytest.approx(0.25)
    assert evaluate.area_under_curve([20.0], 10) == 0
