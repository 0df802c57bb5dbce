"""Calibrate a LightGlue's scores: 80 % of the matches with a score of 0.8 are correct.

    python training/calibrate.py --weights runs/export --validation SHARDS --nms-radius 2 OUT

Two numbers are fitted for each layer's assignment: a scale of the similarities, and a shift of the logit of every
point's matchability. Both are folded into the weights (``final_projection``, the bias of ``matchability``), so that
programs that read the weights need not know of them. They are fitted to the training's validation views, photographs
and rooms. The held-out groups are not used.

Layers before the last are fitted only to points that are confident there, because LightGlue stops early only with
those.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from evaluation_matchers import Ours, Weights
from evaluation_pairs import Pair, validation_pairs
from export import add_detection_options, detection_of, export
from torch import Tensor
from torch.nn import functional as F

from kpmatch_ros.models import LightGlue, SuperPoint
from kpmatch_ros.models.assignment import mutual_matches
from kpmatch_ros.models.lightglue_layers import MatchAssignment, Points, TokenConfidence
from kpmatch_ros.weights import resolve

__all__ = ["Evidence", "Map", "collect", "fit", "fold", "main"]

LEAST = 0.02  # lowest score of a match that is used
SURE = 0.8  # confidence of a point above which LightGlue may stop
BINS = 10


@dataclass
class Evidence:
    """M matches of a layer, and which of them are correct.

    Attributes:
        rows: (M, N1) float16, similarities of the match's point of image 0 with all points of image 1.
        columns: (M, N0) float16, similarities of its point of image 1 with all points of image 0.
        chosen: (M, 2) int64, indices of the match in ``rows`` and in ``columns``.
        logits: (M, 2) logits of both points' matchability.
        correct: (M,) bool, correct matches.
        weight: (M,) weight of each match.
    """

    rows: Tensor
    columns: Tensor
    chosen: Tensor
    logits: Tensor
    correct: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Map:
    """Calibration of a layer: ``scale`` of the similarities and ``shift`` of the logits of matchability."""

    scale: float = 1.0
    shift: float = 0.0


def log_scores(evidence: list[Evidence], scale: Tensor, shift: Tensor) -> Tensor:
    """Return the log scores (M,) of the matches with scaled similarities and shifted logits."""
    parts = []
    for each in evidence:
        rows = (scale * each.rows.float()).log_softmax(dim=1).gather(1, each.chosen[:, :1])[:, 0]
        columns = (scale * each.columns.float()).log_softmax(dim=1).gather(1, each.chosen[:, 1:])[:, 0]
        parts.append(rows + columns + F.logsigmoid(each.logits + shift).sum(dim=1))
    return torch.cat(parts)


def fit(evidence: list[Evidence]) -> Map:
    """Fit the map that makes the scores the most likely probabilities of being correct."""
    if not any(len(each.correct) for each in evidence):
        return Map()
    correct = torch.cat([each.correct for each in evidence]).float()
    weight = torch.cat([each.weight for each in evidence])
    parameters = torch.zeros(2, requires_grad=True)
    optimiser = torch.optim.LBFGS([parameters], max_iter=40, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        logs = log_scores(evidence, parameters[0].exp(), parameters[1]).clamp(max=-1e-5)
        likelihood = correct * logs + (1 - correct) * torch.log(-torch.expm1(logs))
        value = -(weight * likelihood).sum() / weight.sum() + 1e-3 * parameters.square().sum()
        value.backward()
        return value

    optimiser.step(loss)  # type: ignore[arg-type]
    return Map(math.exp(parameters[0].item()), parameters[1].item())


@torch.no_grad()
def fold(head: MatchAssignment, change: Map) -> None:
    """Fold a map into a layer's weights."""
    # A similarity is a product of two projections, so each of them gets the square root of the scale.
    head.final_projection.weight.mul_(math.sqrt(change.scale))
    head.final_projection.bias.mul_(math.sqrt(change.scale))
    head.matchability.bias.add_(change.shift)


@torch.no_grad()
def collect(extractor: Ours, matcher: LightGlue, pairs: Iterable[Pair]) -> list[list[Evidence]]:
    """Collect the evidence of each layer. All groups of pairs get the same total weight."""
    found: list[list[Evidence]] = [[] for _ in matcher.match_assignment_layers]
    groups: list[list[str]] = [[] for _ in found]
    for pair in pairs:
        features = extractor.features(pair.images[0]), extractor.features(pair.images[1])
        keypoints = [each.keypoints[0].double().numpy(force=True) for each in features]
        for layer, points in enumerate(matcher.states(*features)):
            evidence = _evidence(matcher, layer, points, keypoints, pair)
            found[layer].append(evidence)
            groups[layer].append(pair.group)
    for of_layer, names in zip(found, groups):
        for name in set(names):
            total = sum(len(each.correct) for each, group in zip(of_layer, names) if group == name)
            for each, group in zip(of_layer, names):
                if group == name:
                    each.weight /= max(total, 1)
    return found


def _evidence(
    matcher: LightGlue, layer: int, points: tuple[Points, Points], keypoints: list[np.ndarray], pair: Pair
) -> Evidence:
    head = cast(MatchAssignment, matcher.match_assignment_layers[layer])
    projected0, projected1 = (head.final_projection(each.x)[0] for each in points)
    similarity = projected0 @ projected1.T / math.sqrt(projected0.shape[1])
    logits = [head.matchability(each.x)[0, :, 0] for each in points]
    matches = mutual_matches(head(*points), torch.exp, LEAST).matches0[0]
    index0 = torch.nonzero(matches >= 0)[:, 0]
    index1 = matches[index0]
    errors = torch.from_numpy(pair.truth.errors(keypoints[0][index0], keypoints[1][index1]))
    usable = ~errors.isnan()
    if layer < len(matcher.token_confidence):
        sure = [cast(TokenConfidence, matcher.token_confidence[layer])(each.x)[0] > SURE for each in points]
        usable &= sure[0][index0] & sure[1][index1]
    index0, index1 = index0[usable], index1[usable]
    return Evidence(
        similarity[index0].half(),
        similarity[:, index1].T.half(),
        torch.stack([index1, index0], dim=1),
        torch.stack([logits[0][index0], logits[1][index1]], dim=1),
        errors[usable] <= pair.max_error,
        torch.ones(len(index0)),
    )


@torch.no_grad()
def expected_error(evidence: list[Evidence], change: Map) -> float:
    """Return the expected calibration error: the mean difference between score and precision, over bins of scores."""
    scores = log_scores(evidence, torch.tensor(change.scale), torch.tensor(change.shift)).exp()
    correct = torch.cat([each.correct for each in evidence]).float()
    weight = torch.cat([each.weight for each in evidence])
    number = (scores * BINS).long().clamp(max=BINS - 1)
    off = torch.zeros(BINS).index_add(0, number, weight * (scores - correct))
    return float(off.abs().sum() / weight.sum().clamp(min=1e-9))


def main(words: list[str] | None = None) -> None:
    """Calibrate according to the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="a Hugging Face folder, or a registered name")
    parser.add_argument(
        "--validation",
        type=Path,
        required=True,
        metavar="SHARDS",
        help="the training's shards; only their validation views are used",
    )
    parser.add_argument("--pairs", type=int, default=40, help="number of pairs of photographs, and of rooms")
    parser.add_argument("--keypoints", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    add_detection_options(parser, "those stored with the weights; scores are calibrated for these settings")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    folder = resolve(arguments.weights)
    superpoint = SuperPoint.from_pretrained(folder, **detection_of(arguments)).float()
    matcher = LightGlue.from_pretrained(folder).float()
    weights = Weights("ours", superpoint, matcher, torch.device("cpu"), "")
    threshold = superpoint.keypoint_threshold
    extractor = Ours(weights, arguments.keypoints, superpoint.nms_radius, superpoint.subpixel, threshold, 0.1)
    found = collect(extractor, matcher, validation_pairs(arguments.validation, arguments.pairs))
    for layer, evidence in enumerate(found):
        change = fit(evidence)
        fold(cast(MatchAssignment, matcher.match_assignment_layers[layer]), change)
        print(
            f"layer {layer + 1}: {sum(len(each.correct) for each in evidence)} matches, "
            f"similarities x {change.scale:.2f}, matchability {change.shift:+.2f}, calibration error "
            f"{expected_error(evidence, Map()):.3f} before, {expected_error(evidence, change):.3f} after",
            flush=True,
        )
    export(superpoint, matcher, arguments.folder)


if __name__ == "__main__":
    main()
