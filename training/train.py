"""Train the open weights on shards of photographs and rooms, on a GPU or on a processor.

    python training/train.py points --shards SHARDS --out RUN --minutes 10
    python training/train.py matching --shards SHARDS --out RUN --minutes 10

``points`` trains SuperPoint, ``matching`` its LightGlue. Each trains the full and the fast network together on the same
views, because creating the views costs as much as training a small network. A run continues from the checkpoint in its
folder, or starts with the weights of ``--start``.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

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
from torch import Tensor, nn
from views import Source, ViewPairs, load

from kpmatch_ros.models import LightGlue, SuperPoint
from kpmatch_ros.models.detections import clear_border, suppress_non_maxima
from kpmatch_ros.models.superpoint import sample_descriptors
from kpmatch_ros.runtime.processor import has_amx

SUPERPOINTS: dict[str, dict[str, Any]] = {
    "full": {"descriptor_decoder_dim": 128, "keypoint_threshold": 0.0005, "max_keypoints": 1024},
    "fast": {
        "encoder_hidden_sizes": [16, 32, 64, 112],
        "decoder_hidden_size": 128,
        "descriptor_decoder_dim": 128,
        "keypoint_threshold": 0.0005,
        "max_keypoints": 1024,
    },
}
LIGHTGLUES: dict[str, dict[str, Any]] = {
    "full": {"input_dim": 128},
    "fast": {"input_dim": 128, "descriptor_dim": 128, "num_hidden_layers": 6},
}
RATES = {("points", "full"): 4e-4, ("points", "fast"): 1e-3, ("matching", "full"): 3e-5, ("matching", "fast"): 6e-4}
CORNERS = 0.3  # initial weight of cornerness in the choice of points; it falls to 0 at 60 % of the training
FAINT = 5e-3  # score of a point below which its match is ignored
REACH = 0.02  # probability of a match by the initial network below which its points count as unmatched


# --- networks --------------------------------------------------------------------------------------------------------


def build(kind: str, name: str, start: str | None, device: torch.device, or_random: bool = False) -> tuple[Any, bool]:
    """Build a network with the weights of ``start`` or with random ones; also return whether ``start`` was used.

    Args:
        or_random: use random weights if ``start`` has another architecture.

    Raises:
        ValueError: ``start`` has another architecture.
        KeyError: the file ``start`` holds no network of this name.
    """
    if kind == "points":
        make: Any = SuperPoint
        config = SUPERPOINTS[name]
    else:
        make, config = LightGlue, LIGHTGLUES[name]
    model = make(**config)
    fits = False
    if start is not None:
        loaded = read_trained(make, start, name)
        fits = _shapes(loaded) == _shapes(model)
        if fits:
            model.load_state_dict(loaded.state_dict())
        elif not or_random:
            raise ValueError(f"{start} has another architecture than the {name} network")
    if kind == "points" and not fits:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    if kind == "matching":
        for layer in model.transformer_layers:
            # Cross-attention has one projection for queries and keys, as in the paper (section 3.1, eq. 5).
            layer.cross_attention.k_proj = layer.cross_attention.q_proj
        if device.type != "cpu":
            model.match_as_one_batch()
        if has_amx():
            model.leave_attention_to_pytorch()
    model = model.to(device)
    return (model.to(memory_format=torch.channels_last) if kind == "points" else model), fits


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


# --- steps -----------------------------------------------------------------------------------------------------------


def source_of(sources: list[Source], number: int) -> Source:
    """Photographs for three of five batches, rooms for the others."""
    return sources[1] if len(sources) > 1 and number % 5 in (1, 3) else sources[0]


def points_step(
    teacher: SuperPoint, students: list[Student], pairs: ViewPairs, settings: Settings, step: int, progress: float
) -> dict[str, float]:
    """Train the SuperPoints for one step. Labels come from the teacher, on views without degradation."""
    draw = settings.draw(2, step)
    with torch.no_grad(), settings.autocast():
        maps = [
            superpoint_loss.probabilities(superpoint_loss.run(teacher, packed(image)).logits) for image in pairs.images
        ]
    corners = CORNERS * max(0.0, 1 - progress / 0.6)
    labels = superpoint_loss.consensus((maps[0], maps[1]), pairs.images, pairs.geometry, corners)
    degraded = degrade_pairs(pairs, draw, settings)
    figures: dict[str, float] = {}
    for student in students:
        with settings.autocast():
            outputs = [superpoint_loss.run(student.model, packed(image)) for image in degraded]
        parts = superpoint_loss.losses(draw, (outputs[0], outputs[1]), labels, pairs.geometry)
        student.step(parts["total"], rate(progress), step)
        figures |= {f"{student.name} {key}": value.detach() for key, value in parts.items()}  # type: ignore[misc]
    figures["labels"] = labels.valid.sum(dim=1).float().mean()  # type: ignore[assignment]
    return figures


def packed(images: Tensor) -> Tensor:
    """Convert the images to channels-last format."""
    return images.contiguous(memory_format=torch.channels_last)


def degrade_pairs(pairs: ViewPairs, draw: torch.Generator, settings: Settings) -> list[Tensor]:
    """Degrade each pair with a random strength, from hardly changed to hard to recognise."""
    count = len(pairs.images[0])
    strength = torch.rand(count, generator=draw, device=settings.device)
    return [degrade(draw, image, strength) for image in pairs.images]


def lightly_degraded(pairs: ViewPairs, draw: torch.Generator, settings: Settings) -> list[Tensor]:
    """Degrade all pairs with the same strength, which is used to monitor points."""
    strength = torch.full((len(pairs.images[0]),), 0.3, device=settings.device)
    return [degrade(draw, image, strength) for image in pairs.images]


def best_maxima(maps: Tensor, count: int, radius: int) -> tuple[Tensor, Tensor]:
    """Return the scores (B, N) of the ``count`` best maxima of maps (B, H, W), and their flat index (B, N)."""
    return clear_border(suppress_non_maxima(maps, radius), 4).flatten(1).topk(count, dim=1)


def extract(
    model: SuperPoint, images: Tensor, count: int, radius: int, fractions: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``count`` best points (B, N, 2) of images, their descriptors (B, N, D) and scores (B, N).

    The detection is the same as in the package.
    """
    out = superpoint_loss.run(model, packed(images))
    maps = superpoint_loss.probabilities(out.logits)
    best, index = best_maxima(maps, count, radius)
    width = maps.shape[2]
    whole = torch.stack([index % width, index // width], dim=-1).float()
    points = superpoint_loss.soft_maximum(maps, index) if fractions else whole
    return points, sample_descriptors(out.descriptors, points), best


@torch.no_grad()
def matching_batches(
    extractors: dict[str, SuperPoint],
    judges: dict[str, LightGlue],
    pairs: ViewPairs,
    settings: Settings,
    number: int,
) -> dict[str, lightglue_loss.Batch]:
    """Return the batch of each LightGlue, by its name, with features of a SuperPoint that is not trained any more."""
    degraded = degrade_pairs(pairs, settings.draw(2, number), settings)
    count, radius, fractions = _kind_of_points(number, settings)
    batches = {}
    for name, extractor in extractors.items():
        with settings.autocast():
            found = [extract(extractor, image, count, radius, fractions) for image in degraded]
            batches[name] = features(found, pairs, settings)
            if name in judges:
                opinion = lightglue_loss.opinion(judges[name], batches[name])
                batches[name] = lightglue_loss.within_reach(opinion, batches[name], REACH)
    return batches


def matching_step(
    students: list[Student],
    batches: dict[str, lightglue_loss.Batch],
    settings: Settings,
    step: int,
    progress: float,
    heads: int | None,
) -> dict[str, float]:
    """Train the LightGlues for one step. ``heads`` of the layers before the last learn, or all if it is None."""
    figures: dict[str, float] = {}
    for student in students:
        layers = None
        if heads is not None:
            before = len(student.model.transformer_layers) - 1
            layers = torch.randperm(before, generator=settings.draw(4, step), device=settings.device)[:heads].tolist()
        with settings.autocast():
            parts = lightglue_loss.losses(student.model, batches[student.name], layers)
        student.step(parts["total"], rate(progress), step)
        figures |= {f"{student.name} {key}": value.detach() for key, value in parts.items()}  # type: ignore[misc]
    return figures


def _kind_of_points(step: int, settings: Settings) -> tuple[int, int, bool]:
    """Number of points, radius of their suppression, and whether they are refined to a fraction of a pixel."""
    area = settings.size[0] * settings.size[1] / (640 * 480)
    count = (512, 768, 1024)[step % 3]
    return int(count * area), (2, 1, 3, 2)[(step // 3) % 4], step % 4 != 3


def features(found: list[tuple[Tensor, Tensor, Tensor]], pairs: ViewPairs, settings: Settings) -> lightglue_loss.Batch:
    """Create a batch for LightGlue. Points with a low detection score are ignored.

    On a bare wall such points are at arbitrary positions. Two of them near each other's true position are not a match
    that can be learnt.
    """
    partners, unmatched = lightglue_loss.truth((found[0][0], found[1][0]), pairs.geometry)
    other = found[1][2].gather(1, partners.clamp(min=0))
    partners = torch.where((found[0][2] < FAINT) | (other < FAINT), -1, partners)
    unmatched = tuple(each & (scores >= FAINT) for each, (_, _, scores) in zip(unmatched, found))
    return lightglue_loss.Batch(
        (found[0][0], found[1][0]), (found[0][1], found[1][1]), partners, (unmatched[0], unmatched[1]), settings.size
    )


# --- watching --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate_points(
    students: list[Student], validation: list[Source], settings: Settings, count: int
) -> dict[str, float]:
    """Return the repeatability of points, on lightly degraded views that are not trained on."""

    def found(name: str, pairs: ViewPairs, draw: torch.Generator) -> dict[str, float]:
        images, figures = lightly_degraded(pairs, draw, settings), {}
        for student in students:
            with settings.autocast():
                maps = [
                    superpoint_loss.probabilities(superpoint_loss.run(student.average, packed(i)).logits)
                    for i in images
                ]
            again = superpoint_loss.found_again((maps[0], maps[1]), pairs.geometry)
            figures |= {f"{student.name} {name} {key}": value for key, value in again.items()}
        return figures

    return validation_means(validation, settings, count, found)


@torch.no_grad()
def validate_matching(
    extractors: dict[str, SuperPoint], students: list[Student], validation: list[Source], settings: Settings, count: int
) -> dict[str, float]:
    """Return loss, recall and precision of the last layer, on views that are not trained on."""

    def found(name: str, pairs: ViewPairs, draw: torch.Generator) -> dict[str, float]:
        images, points = degrade_pairs(pairs, draw, settings), _kind_of_points(2, settings)[0]
        figures = {}
        for student in students:
            with settings.autocast():
                seen = [extract(extractors[student.name], image, points, 2, True) for image in images]
                parts = lightglue_loss.losses(student.average, features(seen, pairs, settings))
            figures |= {f"{student.name} {name} {key}": float(parts[key]) for key in ("last", "recall", "precision")}
        return figures

    return validation_means(validation, settings, count, found)


# --- the run ---------------------------------------------------------------------------------------------------------


@subnormals_are_zeros()
def train(arguments: argparse.Namespace) -> None:
    """Train according to the arguments; write checkpoints and a log to ``--out``."""
    settings = settings_of(arguments)
    device = settings.device
    trained, validation = load(arguments.shards, device)
    torch.manual_seed(arguments.seed)  # for the initial weights
    built = {name: build(arguments.kind, name, arguments.start, device, True) for name in arguments.networks}
    for name, (_, fits) in built.items():
        if arguments.start is not None and not fits:
            log_line(f"{name} starts from random weights: --start {arguments.start} has another architecture")
    students = [
        Student(name, model, arguments.rate or RATES[arguments.kind, name]) for name, (model, _) in built.items()
    ]
    extractors = load_extractors(arguments, device) if arguments.kind == "matching" else {}
    judges = {}  # a network that starts from random weights has none
    if arguments.kind == "matching":
        judges = {student.name: copy.deepcopy(student.average) for student in students if built[student.name][1]}
    # Without --teacher, the average of the first network teaches this network and the others.
    teacher = students[0].average
    if arguments.teacher is not None:
        found = read_trained(SuperPoint, arguments.teacher, "full").eval()
        teacher = found.to(device, memory_format=torch.channels_last)

    def views(number: int) -> ViewPairs:
        return source_of(trained, number).pairs(settings.draw(1, number), settings.batch, settings.size)

    batches = Batches(
        lambda number: matching_batches(extractors, judges, views(number), settings, number),
        arguments.batches,
        settings,
    )

    def learn(step: int, progress: float) -> dict[str, float]:
        if arguments.kind == "points":
            return points_step(teacher, students, views(step), settings, step, progress)
        return matching_step(students, batches.of(step), settings, step, progress, arguments.heads)

    def validate() -> dict[str, float]:
        if arguments.kind == "points":
            return validate_points(students, validation, settings, arguments.watch_views)
        return validate_matching(extractors, students, validation, settings, arguments.watch_views)

    run(arguments, settings, students, learn, validate)


def load_extractors(arguments: argparse.Namespace, device: torch.device) -> dict[str, SuperPoint]:
    """Load the averaged SuperPoints of ``--points``, or of this run's folder."""
    file = arguments.points or arguments.out / "points.weights.pt"
    models = {name: read_trained(SuperPoint, file, name) for name in arguments.networks}
    return {name: model.to(device, memory_format=torch.channels_last) for name, model in models.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("points", "matching"))
    add_options(parser, batch=32, size=(640, 480))
    parser.add_argument("--start", help="weights to start from: a folder, a registered name, or KIND.weights.pt")
    parser.add_argument(
        "--points", type=Path, help="points.weights.pt whose features the matchers learn from (default: that in --out)"
    )
    parser.add_argument(
        "--teacher",
        type=Path,
        help="points.weights.pt whose full network creates the labels (default: the average of "
        "the first network in training)",
    )
    parser.add_argument("--batches", type=int, default=0, help="number of feature batches kept and reused; 0: none")
    parser.add_argument(
        "--heads",
        type=int,
        help="number of layers before the last whose assignment is trained in a step (default: all)",
    )
    parser.add_argument(
        "--rate",
        type=float,
        help="largest learning rate (default: the network's own); use a lower one for trained weights",
    )
    parser.add_argument("--networks", nargs="+", choices=("full", "fast"), default=["full", "fast"])
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
