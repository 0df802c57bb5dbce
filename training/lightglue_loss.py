"""The loss of a LightGlue, from the features of two views with known geometry.

It is the negative log-likelihood of the true assignment after every layer (LightGlue, section 3.4, eq. 11). The
confidences learn whether a point's match is already final. Their gradients do not reach the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from views import HIDDEN, VISIBLE, Geometry, are_mutual

from kpmatch_ros.models import ImageFeatures, LightGlue
from kpmatch_ros.models.assignment import mutual_matches
from kpmatch_ros.models.lightglue_layers import MatchAssignment, Points, TokenConfidence

NEAR = 2.5  # pixels: largest error of a match
STATES = 10.0  # weight of the distance between states, relative to the assignment
FAR = 3.0  # pixels: a point whose nearest point is farther has no match; points between NEAR and FAR are ignored


class Opinion(NamedTuple):
    """Outputs of another LightGlue for B pairs.

    Attributes:
        matches: (B, N, N) float16, the probability that each pair of points is a match.
        matchable: for both images, (B, N) float16, the probability that a point has a match.
        states: for both images, (L, B, N, C) float16, the target states after each layer; None without targets.
    """

    matches: Tensor
    matchable: tuple[Tensor, Tensor]
    states: tuple[Tensor, Tensor] | None = None


class Batch(NamedTuple):
    """B pairs with N points per image.

    Attributes:
        points, descriptors: for both images, (B, N, 2) and (B, N, D).
        partners: (B, N) int64, index of the point's match in image 1, -1 if it has none or it is unknown.
        unmatched: for both images, (B, N) bool, points that certainly have no match.
        size: width and height of the images.
        opinion: outputs of another LightGlue to learn in addition to the truth.
    """

    points: tuple[Tensor, Tensor]
    descriptors: tuple[Tensor, Tensor]
    partners: Tensor
    unmatched: tuple[Tensor, Tensor]
    size: tuple[int, int]
    opinion: Opinion | None = None


@torch.no_grad()
def truth(points: tuple[Tensor, Tensor], geometry: Geometry) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return partners (B, N) and unmatched points, see :class:`Batch`, for points (B, N, 2) of both views."""
    with torch.autocast(points[0].device.type, enabled=False):  # half precision would move the positions by pixels
        there, state0 = geometry.places(points[0], 0)
        back, state1 = geometry.places(points[1], 1)
    forth = torch.cdist(there, points[1])
    return_ = torch.cdist(points[0], back)
    # Beside an edge, a point may be visible in one direction and unknown in the other. Then the known direction counts.
    visible0, visible1 = (state0 == VISIBLE)[:, :, None], (state1 == VISIBLE)[:, None]
    far = torch.full((), torch.inf, device=forth.device)
    distance = torch.where(visible0 & visible1, torch.maximum(forth, return_), far)
    best0, best1 = distance.argmin(dim=2), distance.argmin(dim=1)
    mutual = are_mutual(best0, best1)
    matched = mutual & (distance.amin(dim=2) <= NEAR)
    partners = torch.where(matched, best0, -1)
    alone0 = (state0 == HIDDEN) | ((state0 == VISIBLE) & (forth.amin(dim=2) > FAR))
    alone1 = (state1 == HIDDEN) | ((state1 == VISIBLE) & (return_.amin(dim=1) > FAR))
    return partners, (alone0, alone1)


def encoded(model: LightGlue, batch: Batch) -> list[Points]:
    size = batch.partners.new_tensor(batch.size).expand(len(batch.partners), 2)
    with torch.autocast(size.device.type, enabled=False):  # positions need more than half precision
        return [model.encode(ImageFeatures(*values, size)) for values in zip(batch.points, batch.descriptors)]


@torch.no_grad()
def opinion(model: LightGlue, batch: Batch, narrow: Callable[[Tensor], Tensor] | None = None) -> Opinion:
    """Return the outputs of a LightGlue after its last layer; the layers run in the precision of autocast.

    Args:
        narrow: projects the states to those of a narrower LightGlue with as many layers; None to omit the states.
    """
    now = encoded(model, batch)
    states: tuple[list[Tensor], list[Tensor]] = ([], [])
    for layer in model.transformer_layers:
        now = [replace(p, x=x.float()) for x, p in zip(layer(*now), now)]
        if narrow is not None:
            for of_image, points in zip(states, now):
                with torch.autocast(points.x.device.type, enabled=False):
                    of_image.append(narrow(points.x).half())
    head = cast(MatchAssignment, model.match_assignment_layers[-1])
    with torch.autocast(now[0].x.device.type, enabled=False):
        matches, matchable = head(*now).exp().half(), [head.matchabilities(p.x).half() for p in now]
        kept = None if narrow is None else (torch.stack(states[0]), torch.stack(states[1]))
    return Opinion(matches, (matchable[0], matchable[1]), kept)


def within_reach(judge: Opinion, batch: Batch, least: float) -> Batch:
    """Remove true matches whose probability is below ``least`` according to another LightGlue.

    Their points become unmatched.

    Two points on a bare wall may be a true match that nothing in the images shows. A network that learns such matches
    learns to match everything. So does a network for which they are ignored, because then only the few easy points of
    the wall remain.
    """
    chosen = judge.matches.gather(2, batch.partners.clamp(min=0)[..., None])[..., 0]
    unlikely0 = (batch.partners >= 0) & (chosen < least)
    count1 = batch.unmatched[1].shape[1]
    unlikely1 = torch.zeros(len(unlikely0), count1 + 1, dtype=torch.bool, device=unlikely0.device)
    unlikely1 = unlikely1.scatter(1, torch.where(unlikely0, batch.partners, count1), True)[:, :count1]
    unmatched = (batch.unmatched[0] | unlikely0, batch.unmatched[1] | unlikely1)
    return batch._replace(partners=torch.where(unlikely0, -1, batch.partners), unmatched=unmatched)


def losses(model: LightGlue, batch: Batch, trained_layers: Collection[int] | None = None) -> dict[str, Tensor]:
    """Return the loss ``total``, its parts ``assignment``, ``agreement``, ``distance`` and ``confidence``, and figures.

    The assignments are those of the ``trained_layers`` (from 0) and of the last layer, or of all layers if it is None.
    ``last`` is the last layer's assignment. ``agreement`` is the cross entropy with the opinion, if there is one.
    ``distance`` is the squared distance between the states and the opinion's target states, relative to the square of
    the latter.
    """
    now = encoded(model, batch)
    heads = cast(list[MatchAssignment], list(model.match_assignment_layers))
    confidences = cast(list[TokenConfidence], list(model.token_confidence))
    assignments, agreements, distances, logits, found = [], [], [], [], []
    for i, layer in enumerate(model.transformer_layers):
        states = layer(*now)
        now = [replace(p, x=x.float()) for x, p in zip(states, now)]
        if trained_layers is not None and i not in trained_layers and i < len(confidences):
            continue
        with torch.autocast(now[0].x.device.type, enabled=False):
            scores = heads[i](*now)
            assignments.append(_assignment_loss(heads[i], (now[0], now[1]), scores, batch))
            if batch.opinion is not None:
                agreements.append(_disagreement(heads[i], (now[0], now[1]), scores, batch.opinion))
                if batch.opinion.states is not None:
                    wanted = [of_image[i].float() for of_image in batch.opinion.states]
                    distances += [(p.x - x).square().sum() / x.square().sum() for p, x in zip(now, wanted)]
            matches = mutual_matches(scores.detach(), torch.exp, 0.1)
            found.append((matches.matches0, matches.matches1))
            if i < len(confidences):
                logits.append([confidences[i].token(p.x.detach())[..., 0] for p in now])
    wrong = [
        F.binary_cross_entropy_with_logits(of_side, (before == final).float())
        for of_layer, befores in zip(logits, found)
        for of_side, before, final in zip(of_layer, befores, found[-1])
    ]
    assignment = torch.stack(assignments).mean()
    confidence = torch.stack(wrong).mean() if wrong else torch.zeros_like(assignment)
    agreement = torch.stack(agreements).mean() if agreements else torch.zeros_like(assignment)
    distance = torch.stack(distances).mean() if distances else torch.zeros_like(assignment)
    correct = (found[-1][0] == batch.partners) & (batch.partners >= 0)
    judged = (found[-1][0] >= 0) & ((batch.partners >= 0) | batch.unmatched[0])
    return {
        "total": assignment + agreement + confidence + STATES * distance,
        "assignment": assignment,
        "agreement": agreement,
        "distance": distance,
        "confidence": confidence,
        "last": assignments[-1],
        "recall": correct.sum() / (batch.partners >= 0).sum().clamp(min=1),
        "precision": (correct & judged).sum() / judged.sum().clamp(min=1),
    }


def _assignment_loss(head: MatchAssignment, points: tuple[Points, Points], scores: Tensor, batch: Batch) -> Tensor:
    matched = batch.partners >= 0
    chosen = scores.gather(2, batch.partners.clamp(min=0)[..., None])[..., 0]
    loss = -torch.where(matched, chosen, 0.0).sum(dim=1) / matched.sum(dim=1).clamp(min=1)
    for side, unmatched in zip(points, batch.unmatched):
        unmatchable = F.softplus(head.matchability(side.x)[..., 0])  # -log(1 - matchability)
        loss = loss + 0.5 * (unmatchable * unmatched).sum(dim=1) / unmatched.sum(dim=1).clamp(min=1)
    return loss.mean()


def _disagreement(head: MatchAssignment, points: tuple[Points, Points], scores: Tensor, opinion: Opinion) -> Tensor:
    """Cross entropy with another LightGlue's assignment and matchabilities."""
    matches = opinion.matches.float()
    loss = -(matches * scores).sum(dim=(1, 2)) / matches.sum(dim=(1, 2)).clamp(min=1)
    for side, matchable in zip(points, opinion.matchable):
        loss = loss + F.binary_cross_entropy_with_logits(
            head.matchability(side.x)[..., 0], matchable.float(), reduction="none"
        ).mean(dim=1)
    return loss.mean()
