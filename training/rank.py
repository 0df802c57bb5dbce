"""Train which points of a SuperPoint are the best ones: those that its descriptors match in another view.

    python training/rank.py --start superpoint-open --shards SHARDS --out RUN --minutes 40

Only the two convolutions of the detector's decoder learn, and with ``--blocks 1`` the encoder's last block. The
descriptors stay as they are, or nearly, so that the LightGlue of these weights stays valid, and a step needs a tenth of
the arithmetic. The output of the part that does not learn is computed once for each pair of views and kept. A processor
can therefore run this training.

The loss is the number of matches among the K best points of two views, made differentiable: every candidate is selected
with a probability, and the probabilities of a view sum to K (:func:`selected`).
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass

import torch
from layers import Layers
from loop import (
    Batches,
    Settings,
    Student,
    add_options,
    rate,
    run,
    settings_of,
    subnormals_are_zeros,
    validation_parts,
)
from superpoint_loss import probabilities, soft_maximum
from torch import Tensor
from torch.nn import functional as F
from train import SUPERPOINTS, best_maxima, build, degrade_pairs, lightly_degraded, packed
from views import VISIBLE, Geometry, Photos, Source, ViewPairs, are_mutual, load

from kpmatch_ros.models import SuperPoint
from kpmatch_ros.models.superpoint import sample_descriptors

CANDIDATES = 2200  # number of maxima of a view of 640x480 that can be selected
SOFTNESS = 0.3  # difference of two logarithms of scores at which the odds of their selection differ by the factor e
CLOSE = 2.5  # pixels: largest distance of points of both views that are the same point of the scene
SPREAD = 2.0  # pixels: distance at which a match counts 1/e
FAINTEST = 1e-6  # lowest score of a candidate
WEIGHTS = {"matches": -3.0, "distance": 0.05, "divergence": 0.3, "descriptors": 3.0}


@dataclass(frozen=True)
class Kept:
    """What is kept of B pairs of views: the inputs (B, C, H/8, W/8) of the part that learns, and unit descriptors.

    Both are float16. The descriptors are those of the network before the training.
    """

    features: tuple[Tensor, Tensor]
    descriptors: tuple[Tensor, Tensor]
    geometry: Geometry


@dataclass(frozen=True)
class Candidates:
    """Candidates of B views, by falling score.

    Attributes:
        points: (B, N, 2) subpixel positions, with gradients.
        scores: (B, N), with gradients.
        valid: (B, N), false where a view has fewer candidates.
    """

    points: Tensor
    scores: Tensor
    valid: Tensor

    def best(self, count: int) -> Candidates:
        return Candidates(self.points[:, :count], self.scores[:, :count], self.valid[:, :count])


@dataclass(frozen=True)
class Agreement:
    """Which candidates of two views are the same point of the scene.

    Attributes:
        partners: (B, N) for each candidate of the first view, the index of the nearest one in the second.
        near: (B, N) they are mutual nearest neighbours and at most CLOSE pixels apart.
        matched: (B, N) their descriptors are mutual nearest neighbours, too.
        distances: (B, N) pixels.
        visible: (B, N) candidates of the first view that the second view shows.
    """

    partners: Tensor
    near: Tensor
    matched: Tensor
    distances: Tensor
    visible: Tensor


@dataclass(frozen=True)
class Learner:
    """A SuperPoint of which the detector's decoder learns, and the last ``blocks`` of the encoder's blocks."""

    model: SuperPoint
    blocks: int = 0

    @property
    def fixed(self) -> int:
        """The number of the encoder's blocks that do not learn."""
        return len(self.model.encoder.conv_blocks) - self.blocks

    def freeze(self) -> None:
        self.model.encoder.conv_blocks[: self.fixed].requires_grad_(False)
        self.model.descriptor_decoder.requires_grad_(False)

    def of(self, model: SuperPoint) -> Learner:
        """The same parts of another network."""
        return Learner(model, self.blocks)

    @torch.no_grad()
    def keep(self, images: list[Tensor], geometry: Geometry, settings: Settings) -> Kept:
        """Run the part of the network that does not learn, and the descriptors."""
        features, descriptors = [], []
        with settings.autocast():
            for image in images:
                x = packed(image)
                for block in self.model.encoder.conv_blocks[: self.fixed]:
                    x = block(x)
                features.append(x.half())
                descriptors.append(self.model.descriptor_decoder(self.encode(x)).half())
        return Kept((features[0], features[1]), (descriptors[0], descriptors[1]), geometry)

    def encode(self, features: Tensor) -> Tensor:
        """Return the encoder's outputs, from the inputs of the part that learns."""
        for block in self.model.encoder.conv_blocks[self.fixed :]:
            features = block(features)
        return features

    @torch.no_grad()
    def classes(self, kept: Kept) -> list[Tensor]:
        """Return, for both views, the log probabilities (B, 65, H/8, W/8) of the classes of a cell."""
        return [self.logits(self.encode(each.float())).log_softmax(dim=1) for each in kept.features]

    def logits(self, encoded: Tensor) -> Tensor:
        """Return the logits (B, 65, H/8, W/8) of the cells."""
        decoder = self.model.keypoint_decoder
        return decoder.conv_score_b(F.relu(decoder.conv_score_a(encoded))).float()


def candidates(model: SuperPoint, logits: Tensor, count: int) -> Candidates:
    """Return up to ``count`` maxima of the score maps, with the network's radius of suppression."""
    maps = probabilities(logits)
    with torch.no_grad():
        best, index = best_maxima(maps, count, model.config["nms_radius"])
    return Candidates(soft_maximum(maps, index), maps.flatten(1).gather(1, index), best > FAINTEST)


@torch.no_grad()
def compare(views: tuple[Candidates, Candidates], descriptors: tuple[Tensor, Tensor], geometry: Geometry) -> Agreement:
    """Find the candidates that are the same point of the scene, and those of them that the descriptors match."""
    there, state = geometry.places(views[0].points, 0)
    back = geometry.places(views[1].points, 1)[1]
    visible = (state == VISIBLE) & views[0].valid
    possible = visible[:, :, None] & ((back == VISIBLE) & views[1].valid)[:, None]
    distances = torch.cdist(there, views[1].points).masked_fill(~possible, 1e4)
    shortest, partners = distances.min(dim=2)
    near = are_mutual(partners, distances.argmin(dim=1)) & (shortest < CLOSE)
    sampled = [sample_descriptors(each.float(), view.points) for each, view in zip(descriptors, views)]
    similarity = sampled[0] @ sampled[1].transpose(1, 2)
    similarity = similarity.masked_fill(~(views[0].valid[:, :, None] & views[1].valid[:, None]), -2.0)
    likest = similarity.argmax(dim=2)
    matched = near & (likest == partners) & are_mutual(likest, similarity.argmax(dim=1))
    return Agreement(partners, near, matched, shortest, visible)


def selected(scores: Tensor, valid: Tensor, count: int) -> Tensor:
    """The probability (B, N) that a candidate is selected: the logistic function of the logarithm of its score.

    Its threshold is the one at which the probabilities of a view sum to ``count``. The gradients include that of the
    threshold: a higher score of one candidate lowers the probabilities of the others. With fewer valid candidates than
    ``count``, nearly all are selected.
    """
    logs = (scores.clamp(min=1e-7).log() / SOFTNESS).masked_fill(~valid, -1e3)
    wanted = torch.minimum(valid.sum(dim=1, keepdim=True) - 0.5, logs.new_tensor(float(count)))
    with torch.no_grad():
        low, high = logs.new_full(wanted.shape, -100.0), logs.new_full(wanted.shape, 100.0)
        for _ in range(40):
            middle = (low + high) / 2
            many = (logs - middle).sigmoid().sum(dim=1, keepdim=True) > wanted
            low, high = torch.where(many, middle, low), torch.where(many, high, middle)
        slopes = (logs - low).sigmoid()
        slope = (slopes * (1 - slopes)).sum(dim=1, keepdim=True).clamp(min=1e-3)
    # One Newton step from the solution changes nothing, but has the gradient of the implicit function.
    threshold = low + ((logs - low).sigmoid().sum(dim=1, keepdim=True) - wanted) / slope
    return (logs - threshold).sigmoid()


def losses(student: Learner, kept: Kept, before: list[Tensor], count: int) -> dict[str, Tensor]:
    """Return the loss ``total`` and its parts.

    Args:
        before: for both views, the network's distributions before the training (:meth:`Learner.classes`), from which
            it should not diverge.
        count: number of points to select.

    Returns:
        ``matches``: the expected number of matches among the selected points, relative to ``count``; a match counts
        less if its points are not exactly the same point of the scene. ``distance``: the mean distance of the points of
        selected matches, pixels. ``divergence``: that of Kullback and Leibler from ``before``, mean over cells.
        ``descriptors``: 1 - cosine of the candidates' descriptors before and now; 0 if the encoder does not learn.
    """
    encoded = [student.encode(each.float()) for each in kept.features]
    logits = [student.logits(each) for each in encoded]
    most = CANDIDATES * logits[0].shape[2] * logits[0].shape[3] // (60 * 80)
    views = candidates(student.model, logits[0], most), candidates(student.model, logits[1], most)
    agreement = compare(views, kept.descriptors, kept.geometry)
    chosen = [selected(view.scores, view.valid, count) for view in views]
    both = chosen[0] * chosen[1].gather(1, agreement.partners)
    weights = agreement.matched * (-((agreement.distances / SPREAD) ** 2)).exp()
    there = kept.geometry.places(views[0].points, 0)[0]
    other = views[1].points.gather(1, agreement.partners[..., None].expand(-1, -1, 2))
    lengths = ((there - other).square().sum(dim=-1) + 1e-4).sqrt()
    seen = agreement.near * both.detach()
    divergence, change = logits[0].new_zeros(()), logits[0].new_zeros(())
    for i, each in enumerate(logits):
        divergence = divergence + (before[i].exp() * (before[i] - each.log_softmax(dim=1))).sum(dim=1).mean() / 2
        if student.blocks:
            maps = student.model.descriptor_decoder(encoded[i]), kept.descriptors[i].float()
            now, then = (sample_descriptors(each, views[i].points.detach()) for each in maps)
            change = change + (1 - (now * then).sum(dim=2)).mean() / 2
    parts = {
        "matches": (weights * both).sum() / (len(both) * count),
        "distance": torch.where(agreement.near, lengths * seen, 0.0).sum() / seen.sum().clamp(min=1),
        "divergence": divergence,
        "descriptors": change,
    }
    parts["total"] = torch.stack([WEIGHTS[name] * part for name, part in parts.items()]).sum()
    return parts


@torch.no_grad()
def found(learner: Learner, kept: Kept, area: float) -> dict[str, float]:
    """Return the number of matches among the best points of a pair, for 512 and 1,024 points of 640x480 pixels.

    ``repeated``: the share of the visible points that are found again.
    """
    figures = {}
    encoded = [learner.encode(each.float()) for each in kept.features]
    views = [candidates(learner.model, learner.logits(each), int(1024 * area)) for each in encoded]
    first, second = (learner.model.descriptor_decoder(each) for each in encoded)
    for count in (512, 1024):
        best = [view.best(int(count * area)) for view in views]
        agreement = compare((best[0], best[1]), (first, second), kept.geometry)
        pairs = len(agreement.near)
        figures[f"{count} matched"] = float(agreement.matched.sum()) / pairs
        figures[f"{count} repeated"] = float(agreement.near.sum() / agreement.visible.sum().clamp(min=1))
    return figures


@subnormals_are_zeros()
def train(arguments: argparse.Namespace) -> None:
    """Train according to the arguments; write checkpoints and a log to ``--out``."""
    settings = settings_of(arguments)
    device, area = settings.device, settings.size[0] * settings.size[1] / (640 * 480)
    trained, validation = (_with_layers(sources) for sources in load(arguments.shards, device))
    name = arguments.network
    model, _ = build("points", name, arguments.start, device)
    model.config["nms_radius"] = arguments.nms_radius
    learner = Learner(model, arguments.blocks)
    reference = learner.of(copy.deepcopy(model).requires_grad_(False).eval())
    if device.type == "cpu" and settings.precision is None:
        reference.model.use_compiled(torch.float32)  # a third of PyTorch's time, where the package has been built
    student = Student(name, model, arguments.rate)
    learner.freeze()

    def batch(number: int) -> tuple[Kept, list[Tensor]]:
        pairs = trained[number % len(trained)].pairs(settings.draw(1, number), settings.batch, settings.size)
        kept = reference.keep(degrade_pairs(pairs, settings.draw(2, number), settings), pairs.geometry, settings)
        return kept, reference.classes(kept)

    batches = Batches(batch, arguments.batches, settings, arguments.renewed)
    watched: list[tuple[str, Kept]] = []

    def learn(step: int, progress: float) -> dict[str, float]:
        counts = arguments.keypoints
        chosen = int(torch.randint(len(counts), (), generator=settings.draw(4, step), device=device))
        parts = losses(learner, *batches.of(step), max(1, int(counts[chosen] * area)))
        student.step(parts["total"], rate(progress), step)
        return {f"{name} {key}": float(value.detach()) for key, value in parts.items()}

    def validate() -> dict[str, float]:
        if not watched:
            watched.extend(_watched(reference, validation, settings, arguments.watch_views))
        figures: dict[str, list[float]] = {}
        for source, kept in watched:
            for key, value in found(learner.of(student.average), kept, area).items():
                figures.setdefault(f"{name} {source} {key}", []).append(value)
        return {key: sum(values) / len(values) for key, values in figures.items()}

    run(arguments, settings, [student], learn, validate)


def _with_layers(sources: list[Source]) -> list[Source]:
    """The sources, and layers of the photographs among them."""
    return [*sources, *(Layers(each) for each in sources if isinstance(each, Photos))]


def _watched(learner: Learner, validation: list[Source], settings: Settings, count: int) -> list[tuple[str, Kept]]:
    """The validation pairs of all sources, kept."""

    def kept(pairs: ViewPairs, draw: torch.Generator) -> Kept:
        return learner.keep(lightly_degraded(pairs, draw, settings), pairs.geometry, settings)

    return [(name, kept(pairs, draw)) for name, pairs, draw in validation_parts(validation, settings, count)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(kind="ranking")
    add_options(parser, batch=8, size=(640, 480))
    parser.add_argument("--start", required=True, help="a folder, a registered name, or points.weights.pt")
    parser.add_argument("--network", choices=tuple(SUPERPOINTS), default="full", help="architecture of --start")
    parser.add_argument("--nms-radius", type=int, default=3, help="pixels, as in use (default: %(default)s)")
    parser.add_argument(
        "--keypoints",
        type=int,
        nargs="+",
        default=[512, 768, 1024, 1024, 1024],
        help="numbers of points to select of a view of 640x480, one of them for each step (default: %(default)s)",
    )
    parser.add_argument(
        "--blocks", type=int, choices=(0, 1), default=0, help="number of the encoder's blocks that learn, from the last"
    )
    parser.add_argument("--batches", type=int, default=60, help="number of batches kept and reused; 0: none")
    parser.add_argument(
        "--renewed", type=int, default=0, help="steps after which a new batch replaces the oldest one; 0: none"
    )
    parser.add_argument("--rate", type=float, default=5e-5, help="largest learning rate (default: %(default)s)")
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
