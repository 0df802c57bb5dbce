"""Train the SuperPoint: its descriptors are taught by ALIKED, its points by a vote of ALIKED and classical corners.

    python training/train_superpoint.py --run runs/superpoint            # start, or go on after a stop of any kind

Each step takes crops of training pictures, of which the teachers' points and descriptors are kept on disk, shows two
views of each to the student (turned, tilted, blurred, darkened, noisy...), and asks of it the teachers' points at their
new place, the teacher's descriptors of the crop as it was, and descriptors that tell a point from all others across the
views.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from common import (
    Array,
    Run,
    add_data_option,
    add_run_options,
    choose_device,
    degrade,
    fit,
    generator,
    inside,
    kept,
    pictures,
    project,
    random_crop,
    random_homography,
    read_rgb,
    to_tensor,
    warp,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kpmatch_ros.models import SuperPoint
from kpmatch_ros.models.aliked import ALIKED, STRIDES, FeatureMap, pad_to_multiple
from kpmatch_ros.models.superpoint import CELL, clear_border, sample_descriptors, select_keypoints, suppress_non_maxima

CROP = (448, 336)  # width, height of a crop, of which a view shows a part
VIEW = (320, 240)
LABELS = 450  # points of a crop: as dense as 1,000 in an image of 640 x 480
POINTS = 200  # of a pair of views, whose descriptors are compared
NOTHING, UNKNOWN = CELL * CELL, -100  # labels of a cell: no point in it; not in the picture

STEP, CROP_NUMBER, HELD_OUT = range(3)  # what random numbers are for


# --- the teachers ----------------------------------------------------------------------------------------------------


class Lesson(NamedTuple):
    """What the teachers say about a crop: image (H, W) uint8; points (N, 2) x, y, best first; descriptors (N, D)."""

    image: Array
    points: Array
    descriptors: Array


class Teachers:
    """Lessons by number, kept on disk once worked out.

    Args:
        files: the pictures; crop k is of picture k modulo their number.
        folder: where the lessons are kept, apart for each set of pictures and seed.
    """

    def __init__(self, files: list[Path], weights: Path, folder: Path, seed: int, device: torch.device) -> None:
        which = hashlib.sha256(" ".join([str(seed), *(file.name for file in files)]).encode()).hexdigest()
        self.files, self.folder, self.seed, self.device = files, folder / which[:12], seed, device
        self.aliked = ALIKED.from_pretrained(weights).to(device)
        self.folder.mkdir(parents=True, exist_ok=True)

    def lesson(self, number: int) -> Lesson:
        def make() -> dict[str, Array]:
            rng = generator(self.seed, CROP_NUMBER, number)
            crop = random_crop(rng, read_rgb(self.files[number % len(self.files)]), *CROP)
            image = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
            points, descriptors = self.teach(crop, image)
            return {"image": image, "points": points, "descriptors": descriptors.astype(np.float16)}

        found = kept(self.folder / f"{number:06d}.npz", make)
        return Lesson(found["image"], found["points"], found["descriptors"].astype(np.float32))

    @torch.inference_mode()
    def teach(self, rgb: Array, grey: Array) -> tuple[Array, Array]:
        """Points (N, 2) float32, most agreed on first, and ALIKED's descriptors (N, D) at them."""
        pixels = torch.from_numpy(rgb).to(self.device).permute(2, 0, 1)[None].float() / 255
        padded, padding = pad_to_multiple(pixels, STRIDES[-1])
        levels = self.aliked.encoder(padded)
        left, top = padding
        height, width = grey.shape
        scores = self.aliked.score_head(levels)[0, top : top + height, left : left + width].cpu().numpy()
        points = vote(grey, scores)
        where = torch.from_numpy(points).to(self.device)[None]
        described = self.aliked.descriptor_head(FeatureMap(levels, padding, width, height), where)
        return points, described[0].cpu().numpy()


def vote(grey: Array, learned: Array) -> Array:
    """Points (N, 2) on which detectors agree: ALIKED's scores, and two classical corner measures.

    ALIKED sees little where there is little texture; corners, measured relative to the contrast around them, are found
    again indoors too. Points along edges are not, whatever their contrast: they could as well lie further along.
    """
    smooth = cv2.GaussianBlur(grey.astype(np.float32), (0, 0), 1.0)
    eigenvalues = np.sort(cv2.cornerEigenValsAndVecs(smooth, 5, 3)[..., :2], axis=2)
    across, along = eigenvalues[..., 1], eigenvalues[..., 0]
    corner = along > 0.08 * across
    contrast = cv2.GaussianBlur(across, (0, 0), 24)
    corners = corner * along / (contrast + np.float32(0.02 * contrast.max() + 1e-12))
    fast = np.zeros_like(smooth)
    for keypoint in cv2.FastFeatureDetector_create(8).detect(smooth.astype(np.uint8)):
        x, y = (int(v) for v in keypoint.pt)
        fast[y, x] = keypoint.response * corner[y, x]
    votes = 1.0 * splat(learned, 0.05) + 0.7 * splat(corners, 0.05) + 0.3 * splat(fast, 1e-9)
    peaks = suppress_non_maxima(torch.from_numpy(votes)[None], 3)
    points = select_keypoints(clear_border(peaks.clone(), 4), 0.25, LABELS)[0][0].numpy()
    return np.float32(points + centre_of_mass(votes, points.astype(int), lambda near: near**4))


def splat(measure: Array, floor: float) -> Array:
    """A bump at each maximum above ``floor``, the higher the better its rank, so that measures can be added up."""
    peaks = suppress_non_maxima(torch.from_numpy(np.ascontiguousarray(measure, np.float32))[None], 3)
    points, _, _ = select_keypoints(peaks, floor, 2 * LABELS)
    x, y = points[0].long().unbind(1)
    votes = torch.zeros(measure.shape)
    votes[y, x] = 1 - torch.arange(len(x)) / (2 * LABELS)
    return cv2.GaussianBlur(votes.numpy(), (0, 0), 1.2) * np.float32(2 * np.pi * 1.2**2)


def centre_of_mass(values: Array, points: Array, weigh: Callable[[Array], Array]) -> Array:
    """How far (N, 2) the middle of the bump around each point (N, 2) lies from it, fractions of a pixel.

    Args:
        weigh: values (N, 9) at a point and around it to their weights.
    """
    shifts = np.array([(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)])
    around = points[:, None] + shifts
    weights = weigh(values[around[..., 1], around[..., 0]])
    return (weights[..., None] * shifts).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-12)[:, None]


# --- a step's data ---------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """P pairs of views, the first views before the second ones, V = 2 P.

    Attributes:
        images: (V, 1, H, W).
        cells: (V, H/8, W/8) int64, which pixel of the cell is a point, NOTHING or UNKNOWN.
        points: (V, N, 2) where the same N points lie in both views.
        targets: (V, N, D) their descriptors by the teacher.
        mask: (V, N) bool, false for padding.
    """

    images: Tensor
    cells: Tensor
    points: Tensor
    targets: Tensor
    mask: Tensor


def make_batch(
    lessons: list[Lesson], rng: np.random.Generator, strength: float, device: torch.device
) -> tuple[Batch, Array]:
    """Two views of each lesson, the first hardly moved, the second much, both degraded; what (P, 3, 3) lies between."""
    images: list[list[Array]] = [[], []]
    cells: list[list[Array]] = [[], []]
    points: list[list[Array]] = [[], []]
    targets, masks, between = [], [], []
    for lesson in lessons:
        places, homographies = [], []
        for view, move in enumerate((0.25 * strength, strength)):
            homography = random_homography(rng, CROP, VIEW, move)
            image = degrade(rng, warp(lesson.image, homography, VIEW), strength)
            images[view].append(image)
            place = project(homography, lesson.points)
            place[~recognisable(image, place)] = np.nan
            cells[view].append(label_cells(place, homography))
            places.append(place)
            homographies.append(homography)
        between.append(homographies[1] @ np.linalg.inv(homographies[0]))
        both = np.flatnonzero(inside(places[0], VIEW, 4) & inside(places[1], VIEW, 4))[:POINTS]
        for view in (0, 1):
            # Whole pixels, as the detector gives them.
            points[view].append(_padded(np.round(places[view][both])))
        targets.append(_padded(lesson.descriptors[both]))
        masks.append(np.arange(POINTS) < len(both))
    both_views = np.stack(points[0] + points[1])
    batch = Batch(
        to_tensor(images[0] + images[1], device),
        torch.from_numpy(np.stack(cells[0] + cells[1])).to(device),
        torch.from_numpy(both_views.astype(np.float32)).to(device),
        torch.from_numpy(np.stack(targets * 2).astype(np.float32)).to(device),
        torch.from_numpy(np.stack(masks * 2)).to(device),
    )
    return batch, np.stack(between)


def recognisable(image: Array, points: Array) -> Array:
    """(N,) which points lie where a degraded image still shows anything: not in what is all white or all black."""
    x = image.astype(np.float32)
    mean, square = (cv2.blur(values, (11, 11)) for values in (x, x * x))
    there = inside(points, VIEW)
    column, row = np.round(np.where(there[:, None], points, 0)).astype(int).T
    return there & (square[row, column] - mean[row, column] ** 2 > 1.5**2)


def _padded(rows: Array) -> Array:
    return np.concatenate([rows, np.zeros((POINTS - len(rows), rows.shape[1]), rows.dtype)])


def label_cells(points: Array, homography: Array) -> Array:
    """(H/8, W/8) int64 labels of a view: the best point in each cell; ``points`` (N, 2) are best first."""
    columns, rows = VIEW[0] // CELL, VIEW[1] // CELL
    labels = np.full((rows, columns), NOTHING, np.int64)
    x, y = np.round(points[inside(points, VIEW, 0)]).astype(int)[::-1].T  # best last: it overwrites the others
    labels[y // CELL, x // CELL] = y % CELL * CELL + x % CELL
    corners = np.stack(np.meshgrid(np.arange(columns + 1), np.arange(rows + 1)), axis=-1).reshape(-1, 2) * CELL - 0.5
    seen = inside(project(np.linalg.inv(homography), corners), CROP, -0.5).reshape(rows + 1, columns + 1)
    labels[~(seen[1:, 1:] & seen[1:, :-1] & seen[:-1, 1:] & seen[:-1, :-1])] = UNKNOWN
    return labels


# --- the student -----------------------------------------------------------------------------------------------------


class NormedConv(nn.Sequential):
    """A convolution and a batch norm; folded into one convolution for shipping."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv, nn.BatchNorm2d(conv.out_channels))

    def folded(self) -> nn.Conv2d:
        return fuse_conv_bn_eval(self[0].eval(), self[1].eval())


HIDDEN = (
    *((f"encoder.conv_blocks.{block}", name) for block in range(4) for name in ("conv_a", "conv_b")),
    ("keypoint_decoder", "conv_score_a"),
    ("descriptor_decoder", "conv_descriptor_a"),
)


def add_norms(model: SuperPoint) -> SuperPoint:
    """Put a batch norm behind every hidden convolution, for training."""
    for parent, name in HIDDEN:
        module = model.get_submodule(parent)
        setattr(module, name, NormedConv(getattr(module, name)))
    return model.requires_grad_(True)


@torch.no_grad()
def adopt_statistics(model: SuperPoint, images: Tensor) -> None:
    """Set the norms to the statistics of the convolutions before them, so that they change nothing to begin with.

    Trained weights go on being what they were, and can be trained further as those of a network with batch norm.
    """
    for parent, name in HIDDEN:  # in the order in which they run
        layer = getattr(model.get_submodule(parent), name)
        seen: list[Tensor] = []
        hook = layer[0].register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        model.eval()
        student(model, images)
        hook.remove()
        variance, mean = torch.var_mean(seen[0], dim=(0, 2, 3))
        norm = layer[1]
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.bias.copy_(mean)
        norm.weight.copy_((variance + norm.eps).sqrt())


def fold(state: dict[str, Tensor], config: dict[str, Any]) -> SuperPoint:
    """The network to ship, from the state of the one in training."""
    model = SuperPoint(**config)
    if set(state) == set(model.state_dict()):  # trained without norms
        model.load_state_dict(state)
        return model
    model = add_norms(model)
    model.load_state_dict(state)
    for parent, name in HIDDEN:
        module = model.get_submodule(parent)
        setattr(module, name, getattr(module, name).folded())
    return model.requires_grad_(False).eval()


def load_superpoint(source: str | Path) -> SuperPoint:
    """From a training's checkpoint (its averaged weights), or whatever the package itself reads."""
    if Path(source).suffix != ".pt":
        return SuperPoint.from_pretrained(source)
    state = torch.load(source, map_location="cpu", weights_only=True)
    return fold(state["average"], state["config"])


def student(model: SuperPoint, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the cells (V, 65, H/8, W/8) and descriptors (V, D, H/8, W/8)."""
    return heads(model, model.encoder(images))


def heads(model: SuperPoint, features: Tensor) -> tuple[Tensor, Tensor]:
    """The same, from the encoder's features (V, C, H/8, W/8)."""
    decoder = model.keypoint_decoder
    return decoder.conv_score_b(F.relu(decoder.conv_score_a(features))), model.descriptor_decoder(features)


def losses(model: SuperPoint, batch: Batch) -> dict[str, Tensor]:
    """The parts of the loss, their ``total``, and a figure that is easier to read, ``rank1``.

    Returns:
        detector: cross entropy over the 65 classes of a cell.
        cosine: 1 - cosine to the teacher's descriptor.
        teacher: cross entropy of the teacher's own descriptor among those of the view's points.
        views: cross entropy of the same point's descriptor among those of the other view's.
        rank1: share of points whose nearest descriptor in the other view is their own.
    """
    logits, maps = student(model, batch.images)
    detector = F.cross_entropy(logits.float(), batch.cells, ignore_index=UNKNOWN)
    described = sample_descriptors(maps, batch.points)
    cosine = (described * batch.targets).sum(dim=-1)
    first, second = described.chunk(2)
    mask = batch.mask.chunk(2)[0]
    same = torch.einsum("bnd,bmd->bnm", first, second) / 0.07
    best = same.masked_fill(~mask[:, None], -torch.inf).argmax(dim=2)
    right = best == torch.arange(POINTS, device=best.device)
    parts = {
        "detector": detector,
        "cosine": 1 - _mean(cosine, batch.mask),
        "teacher": _identify(torch.einsum("bnd,bmd->bnm", described, batch.targets) / 0.05, batch.mask),
        "views": (_identify(same, mask) + _identify(same.transpose(1, 2), mask)) / 2,
    }
    return {"total": torch.stack(list(parts.values())).sum(), **parts, "rank1": _mean(right.float(), mask)}


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


def _identify(similarity: Tensor, mask: Tensor) -> Tensor:
    """Cross entropy of row n (B, N, N) belonging to column n, over real rows and columns."""
    logs = similarity.masked_fill(~mask[:, None], torch.finfo(similarity.dtype).min).log_softmax(dim=2)
    return -_mean(logs.diagonal(dim1=1, dim2=2), mask)


# --- how good it is ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def examine(model: SuperPoint, batches: list[Batch], homographies: list[Array]) -> dict[str, float]:
    """Losses on pictures that are not trained on, and how many points are found again within 3 pixels."""
    model.eval()
    figures = [{name: float(value) for name, value in losses(model, batch).items()} for batch in batches]
    result = {name: float(np.mean([figure[name] for figure in figures])) for name in figures[0]}
    distances = [each for batch, two in zip(batches, homographies) for each in found_again(model, batch.images, two)]
    return {**result, "repeatability": float(np.mean([(each <= 3).mean() for each in distances]))}


@torch.no_grad()
def found_again(model: SuperPoint, images: Tensor, between: Array) -> list[Array]:
    """How far from a point's place in the second view the nearest point found there is, pixels.

    Args:
        images: (2 P, 1, H, W) of size VIEW, the first views before the second ones.
        between: (P, 3, 3) homographies from first to second views.

    Returns:
        a distance for each point of the first view that lies in the second, for each pair where there are such.
    """
    scores = suppress_non_maxima(model.keypoint_decoder(model.encoder(images)), 4)
    points, _, real = select_keypoints(clear_border(scores, 4), 0.0, 256)
    distances = []
    for i, homography in enumerate(between):
        first, second = (points[j][real[j]].cpu().numpy() for j in (i, i + len(between)))
        expected = project(homography, first)
        expected = expected[inside(expected, VIEW, 4)]
        if len(expected) and len(second):
            distances.append(np.linalg.norm(expected[:, None] - second[None], axis=2).min(axis=1))
    return distances


def held_out_batches(teachers: Teachers, pairs: int, device: torch.device) -> tuple[list[Batch], list[Array]]:
    """Always the same views of held-out pictures, by fours, and the homographies (P, 3, 3) between them."""
    batches, homographies = [], []
    for number, first in enumerate(range(0, pairs, 4)):
        lessons = [teachers.lesson(i) for i in range(first, min(first + 4, pairs))]
        batch, between = make_batch(lessons, generator(0, HELD_OUT, number), 0.8, device)
        batches.append(batch)
        homographies.append(between)
    return batches, homographies


# --- training ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser)
    add_run_options(parser, steps=60000, rate=1e-3, examine_every=250, what="pairs of views")
    parser.add_argument("--start-from", default="superpoint-open", help="weights to start from, or 'nothing'")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of views in a step")
    parser.add_argument("--crops", type=int, default=6000, help="different crops to learn from")
    parser.add_argument("--strength", type=float, default=0.8, help="of motion and degradation, 0 to 1")
    train(parser.parse_args())


def train(arguments: argparse.Namespace) -> None:
    device = choose_device(arguments.device)
    settings = {
        name: getattr(arguments, name) for name in ("start_from", "pairs", "crops", "learning_rate", "strength", "seed")
    }
    run = Run(arguments.run, settings)
    cv2.setNumThreads(1)

    teacher = arguments.data / "teachers" / "aliked-n16.pth"
    lessons = arguments.data / "lessons"
    training = Teachers(pictures(arguments.data, "train"), teacher, lessons, arguments.seed, device)
    held_out = Teachers(pictures(arguments.data, "held-out"), teacher, lessons, 0, device)
    exam = held_out_batches(held_out, arguments.held_out, device)

    torch.manual_seed(arguments.seed)
    if arguments.start_from == "nothing":
        model = add_norms(SuperPoint(descriptor_decoder_dim=128, keypoint_threshold=0.0005, max_keypoints=1024))
    else:
        model = add_norms(SuperPoint.from_pretrained(arguments.start_from))
    state = run.load(device)
    model.to(device)
    if state is None and arguments.start_from != "nothing":
        adopt_statistics(model, torch.cat([batch.images for batch in exam[0]]))
    model.to(memory_format=torch.channels_last)
    shadow = add_norms(SuperPoint(**model.config)).to(device)

    def make(step: int) -> Batch:
        rng = generator(arguments.seed, STEP, step)
        numbers = rng.integers(0, arguments.crops, arguments.pairs)
        return make_batch([training.lesson(int(number)) for number in numbers], rng, arguments.strength, device)[0]

    def examined(weights: dict[str, Tensor]) -> dict[str, float]:
        shadow.load_state_dict(weights)
        return examine(shadow, *exam)

    fit(model, model.config, run, state, arguments, make, lambda batch: losses(model, batch), examined, 5.0)


if __name__ == "__main__":
    main()
