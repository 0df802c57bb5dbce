"""Train a small pair of networks with a large, trained pair as teacher, on a processor or a GPU.

    python training/distil.py points --shards SHARDS --out RUN --minutes 30
    python training/distil.py matching --shards SHARDS --out RUN --minutes 30

``points`` trains a small SuperPoint with the outputs of a large one for every cell of a view: the position of its
point, and its descriptor (Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015). The large one
sees the original view, the small one a degraded view. Descriptors keep the large network's embedding space: its
LightGlue fits both.

``matching`` trains a small LightGlue with the assignment of a large one and with the true one, on the small
SuperPoint's features. It starts with the large one's first layers; with ``--width 128``, with all of them, made narrow
(narrow.py); with ``--start FILE``, with the weights of that file.

Batches are computed once and used several times, because the teacher's outputs cost as much as a training step.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightglue_loss
import superpoint_loss
import torch
from common import log_line
from degradation import degrade
from export import read_trained
from loop import (
    Batches,
    Settings,
    Student,
    add_options,
    rate,
    run,
    settings_of,
    subnormals_are_zeros,
    validation_means,
)
from narrow import load_narrow, narrow, save_narrow
from torch import Tensor
from torch.nn import functional as F
from train import REACH, build, extract, features, lightly_degraded, load_extractors, packed, source_of
from views import Source, ViewPairs, load

from kpmatch_ros.models import LightGlue, SuperPoint
from kpmatch_ros.models.superpoint import sample_descriptors
from kpmatch_ros.weights import resolve

RATES = {"points": 1e-3, "matching": 1e-4}
NARROW_RATE = 5e-4  # learning rate of a matcher with narrow layers
AGAIN_RATE = 2.5e-5  # learning rate of a matcher that has been trained: with four times as much it loses performance
NARROWED = 10  # number of batches that a matcher is narrowed with
DESCRIBED = 256  # number of a view's best points whose descriptors are contrasted with each other
FLOOR = 0.05  # weight of the descriptor of a cell without a point, relative to one with a point
SHARES = {"points": 5.0, "descriptors": 2.0, "contrast": 0.3}  # weights of the losses, for gradients of similar size
RADIUS = 2  # pixels, of non-maximum suppression


# --- SuperPoint ------------------------------------------------------------------------------------------------------


class TeacherOutputs(NamedTuple):
    """Views and a SuperPoint's outputs for them.

    Attributes:
        images: (B, 1, H, W) uint8.
        cells: (B, 65, H/8, W/8) float16, the log probability of each class.
        descriptors: (B, D, H/8, W/8) float16.
        points: (B, N, 2) the views' best points.
    """

    images: Tensor
    cells: Tensor
    descriptors: Tensor
    points: Tensor


@torch.no_grad()
def teacher_outputs(teacher: SuperPoint, sources: list[Source], settings: Settings, number: int) -> TeacherOutputs:
    """Create views without degradation, and the teacher's outputs for them."""
    pairs = source_of(sources, number).pairs(settings.draw(1, number), settings.batch, settings.size)
    images = (torch.cat(pairs.images) * 255).round().to(torch.uint8)
    with settings.autocast():
        out = superpoint_loss.run(teacher, packed(images.float() / 255))
    points = superpoint_loss.own_points(superpoint_loss.probabilities(out.logits), DESCRIBED, RADIUS)
    return TeacherOutputs(images, out.logits.log_softmax(dim=1).half(), out.descriptors.half(), points)


def points_losses(outputs: superpoint_loss.Outputs, targets: TeacherOutputs) -> dict[str, Tensor]:
    """Return the loss ``total`` and its parts.

    - ``points``: the Kullback-Leibler divergence of the distributions over a cell's 65 classes.
    - ``descriptors``: one minus the cosine between the cells' descriptors, mostly of cells with a point.
    - ``contrast``: cross entropy over a view's points: the student's descriptor of a point has to identify the
      teacher's.
    """
    cells = targets.cells.float()
    points = F.kl_div(outputs.logits.log_softmax(dim=1), cells, reduction="none", log_target=True).sum(dim=1).mean()
    weights = (1 - cells[:, -1].exp()) + FLOOR
    cosine = (outputs.descriptors * targets.descriptors).sum(dim=1)
    descriptors = ((1 - cosine) * weights).sum() / weights.sum()
    ours = sample_descriptors(outputs.descriptors, targets.points)
    theirs = sample_descriptors(targets.descriptors.float(), targets.points)
    similarity = ours @ theirs.transpose(1, 2) / superpoint_loss.TEMPERATURE
    # Points within a few pixels share most of their patch, so they are not used as negatives of each other.
    neighbours = torch.cdist(targets.points, targets.points) < 6
    neighbours.diagonal(dim1=1, dim2=2).fill_(False)
    similarity = similarity.masked_fill(neighbours, -1e4)
    positive = similarity.diagonal(dim1=1, dim2=2)
    contrast = ((similarity.logsumexp(dim=2) + similarity.logsumexp(dim=1)) / 2 - positive).mean()
    parts = {"points": points, "descriptors": descriptors, "contrast": contrast}
    return {**parts, "total": torch.stack([SHARES[name] * part for name, part in parts.items()]).sum()}


def points_step(
    student: Student, targets: TeacherOutputs, settings: Settings, step: int, progress: float
) -> dict[str, Tensor]:
    """Train a small SuperPoint for one step, on views with new degradations."""
    draw = settings.draw(2, step)
    images = targets.images.float() / 255
    images = degrade(draw, images, torch.rand(len(images), generator=draw, device=settings.device))
    with settings.autocast():
        outputs = superpoint_loss.run(student.model, packed(images))
    parts = points_losses(outputs, targets)
    student.step(parts["total"], rate(progress), step)
    return {key: value.detach() for key, value in parts.items()}


@torch.no_grad()
def validate_points(
    teacher: SuperPoint, student: Student, validation: list[Source], settings: Settings, views: int
) -> dict[str, float]:
    """Return losses and repeatability of the averaged student, on lightly degraded views that are not trained on."""

    def found(name: str, pairs: ViewPairs, draw: torch.Generator) -> dict[str, float]:
        images = lightly_degraded(pairs, draw, settings)
        with settings.autocast():
            outputs = [superpoint_loss.run(student.average, packed(image)) for image in images]
            clean = superpoint_loss.run(teacher, packed(pairs.images[0]))
        maps = [superpoint_loss.probabilities(out.logits) for out in outputs]
        points = superpoint_loss.own_points(superpoint_loss.probabilities(clean.logits), DESCRIBED, RADIUS)
        targets = TeacherOutputs(pairs.images[0], clean.logits.log_softmax(dim=1), clean.descriptors, points)
        again = superpoint_loss.found_again((maps[0], maps[1]), pairs.geometry, 256)
        return {f"{name} {key}": float(value) for key, value in (points_losses(outputs[0], targets) | again).items()}

    return validation_means(validation, settings, views, found)


# --- LightGlue -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def matching_batch(
    teacher: LightGlue,
    extractor: SuperPoint,
    sources: list[Source],
    settings: Settings,
    points: int,
    number: int,
    narrow: Callable[[Tensor], Tensor] | None = None,
) -> lightglue_loss.Batch:
    """Create pairs of views: a SuperPoint's features, the true assignment, and the teacher's opinion.

    True matches whose probability is low according to the teacher are treated as unmatched, as in train.py.

    Args:
        points: number of points of an image.
        number: number of the batch.
        narrow: projects the teacher's states to the student's width; None to omit the states.
    """
    draw = settings.draw(1, number)
    pairs = source_of(sources, number).pairs(draw, settings.batch, settings.size)
    strength = torch.rand(settings.batch, generator=draw, device=settings.device)
    images = [degrade(draw, image, strength) for image in pairs.images]
    with settings.autocast():
        found = [extract(extractor, image, points, RADIUS, True) for image in images]
        batch = features(found, pairs, settings)
        opinion = lightglue_loss.opinion(teacher, batch, narrow)
        return lightglue_loss.within_reach(opinion, batch, REACH)._replace(opinion=opinion)


def matching_step(
    student: Student, batch: lightglue_loss.Batch, settings: Settings, step: int, progress: float
) -> dict[str, Tensor]:
    """Train a small LightGlue for one step."""
    with settings.autocast():
        parts = lightglue_loss.losses(student.model, batch)
    student.step(parts["total"], rate(progress), step)
    return {key: value.detach() for key, value in parts.items()}


@torch.no_grad()
def validate_matching(
    student: Student, batches: dict[str, lightglue_loss.Batch], settings: Settings
) -> dict[str, float]:
    """Return losses, recall and precision of the averaged student, on views that are not trained on."""
    figures = {}
    for name, batch in batches.items():
        with settings.autocast():
            parts = lightglue_loss.losses(student.average, batch)
        figures |= {
            f"{name} {key}": float(parts[key]) for key in ("last", "agreement", "distance", "recall", "precision")
        }
    return figures


def first_layers(model: LightGlue, count: int) -> LightGlue:
    """Return a LightGlue of the first ``count`` layers of another, with copies of its weights."""
    first = LightGlue(**{**model.config, "num_hidden_layers": count})
    kept = first.state_dict()
    first.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in kept})
    return first


# --- the run ---------------------------------------------------------------------------------------------------------


@subnormals_are_zeros()
def distil(arguments: argparse.Namespace) -> None:
    """Train according to the arguments; write checkpoints and a log to ``--out``."""
    settings = settings_of(arguments)
    device = settings.device
    trained, validation = load(arguments.shards, device)
    torch.manual_seed(arguments.seed)  # for the initial weights
    if arguments.kind == "points":
        teacher = packed_model(SuperPoint.from_pretrained(resolve(arguments.teacher)).float(), device)
        student = Student("fast", build("points", "fast", arguments.start, device)[0], RATES["points"])
        targets = Batches(
            lambda number: teacher_outputs(teacher, trained, settings, number), arguments.batches, settings
        )
        run(
            arguments,
            settings,
            [student],
            lambda step, progress: points_step(student, targets.of(step), settings, step, progress),
            lambda: validate_points(teacher, student, validation, settings, arguments.watch_views),
        )
        return
    matcher = LightGlue.from_pretrained(resolve(arguments.teacher)).float().to(device)
    arguments.networks = ["fast"]
    extractor = load_extractors(arguments, device)["fast"]

    def make(sources: list[Source], number: int, narrow: Callable[[Tensor], Tensor] | None) -> lightglue_loss.Batch:
        return matching_batch(matcher, extractor, sources, settings, arguments.keypoints, number, narrow)

    model, narrow, full_rate = small_matcher(arguments, matcher, lambda number: make(trained, number, None), device)
    student = Student("fast", model, full_rate)
    kept = Batches(lambda number: make(trained, number, narrow), arguments.batches, settings)
    validation_batches = {type(source).__name__: make([source], -1 - i, narrow) for i, source in enumerate(validation)}
    run(
        arguments,
        settings,
        [student],
        lambda step, progress: matching_step(student, kept.of(step), settings, step, progress),
        lambda: validate_matching(student, validation_batches, settings),
    )


def packed_model(model: SuperPoint, device: torch.device) -> SuperPoint:
    """Move a network to its device, in channels-last format."""
    return model.to(device, memory_format=torch.channels_last)


def small_matcher(
    arguments: argparse.Namespace,
    teacher: LightGlue,
    batch: Callable[[int], lightglue_loss.Batch],
    device: torch.device,
) -> tuple[Any, Callable[[Tensor], Tensor] | None, float]:
    """Return the initial LightGlue, the projection of the teacher's states to its width, and the full learning rate.

    Its weights are those of ``--start``, the teacher's first layers, or all of its layers in ``--width`` channels. The
    last are saved in the run's folder, because a resumed run needs the same states.

    Raises:
        ValueError: the saved ones have another width, or were made from another teacher.
    """
    narrowing = None
    if arguments.start is not None:
        model, full_rate = read_trained(LightGlue, Path(arguments.start), "fast").to(device), AGAIN_RATE
    elif arguments.width:
        file = arguments.out / "narrow.pt"
        if not file.exists():
            log_line(f"narrowing the teacher from {teacher.config['descriptor_dim']} to {arguments.width} channels")
            made = narrow(teacher, (batch(number) for number in range(NARROWED)), arguments.width)
            arguments.out.mkdir(parents=True, exist_ok=True)
            save_narrow(file, made, teacher)
        made = load_narrow(file, teacher, arguments.width, device)
        model, narrowing, full_rate = made.model, made.coordinates.of, NARROW_RATE
    else:
        model, full_rate = copy.deepcopy(first_layers(teacher, arguments.layers)).to(device), RATES["matching"]
    for layer in model.transformer_layers:
        layer.cross_attention.k_proj = layer.cross_attention.q_proj  # as in train.py
    return model, narrowing, full_rate


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("points", "matching"))
    parser.add_argument(
        "--teacher",
        default="superpoint-open",
        help="folder or registered name of the teacher's SuperPoint and LightGlue",
    )
    parser.add_argument("--start", help="KIND.weights.pt whose network `fast` the training starts from")
    parser.add_argument(
        "--points", type=Path, help="points.weights.pt whose features the matcher learns from (default: that in --out)"
    )
    parser.add_argument(
        "--layers", type=int, default=3, help="number of the teacher's layers that the matcher starts with"
    )
    parser.add_argument(
        "--width",
        type=int,
        default=0,
        help="number of channels of a narrow matcher with all of the teacher's layers; 0: use --layers",
    )
    parser.add_argument("--keypoints", type=int, default=512, help="keypoints per image in training")
    parser.add_argument("--batches", type=int, default=250, help="number of different batches, kept in memory")
    add_options(parser, batch=4, size=(320, 240))
    distil(parser.parse_args(argv))


if __name__ == "__main__":
    main()
