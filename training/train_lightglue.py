"""Train the LightGlue on the features of a SuperPoint that is not trained any more.

    python training/train_lightglue.py --superpoint runs/superpoint/checkpoint.pt --run runs/lightglue

LightGlue's own loss: the log-likelihood of the true assignment after every layer. What is true is known from
homographies between views of the training pictures, and, for a share of the pairs, from the depth of rendered scenes:
parallax, occlusion and perspective as a moving camera has them. The features of a pair are worked out once and kept.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, cast

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
    weights_of,
)
from torch import Tensor
from torch.nn import functional as F
from train_superpoint import load_superpoint

from kpmatch_ros.geometry.pose import Pose
from kpmatch_ros.models import LightGlue, SuperPoint
from kpmatch_ros.models.assignment import ImageFeatures, mutual_matches
from kpmatch_ros.models.lightglue import MatchAssignment, Points, TokenConfidence, TransformerLayer
from simulation import Scene, View, camera_path, demo_camera, look

BASE = (960, 720)  # width, height of a crop, of which a view shows a part
SIZE = (640, 480)  # of a view
KEPT = 1024  # points of each image that are kept on disk
NEAR = 3.0  # pixels: a match; a point with none so near has none, or else matches just beside would never be unlearnt
SCENES = 4  # rendered scenes to choose from

HELD_OUT_SEED = 1000  # far from those of the training, so that the rendered scenes are others too
STEP, PAIR = range(10, 12)  # what random numbers are for


# --- pairs of images whose geometry is known -------------------------------------------------------------------------


class Features(NamedTuple):
    """An image's points (N, 2), best first, descriptors (N, D), and their places (N, 2) in the other image.

    A place is inf where the point is certainly not to be seen, and NaN where nothing is known.
    """

    points: Array
    descriptors: Array
    places: Array


class Pairs:
    """Pairs of images by number, as features and true places, kept on disk once worked out.

    Args:
        files: the pictures.
        rendered: share of the pairs that show a rendered scene from two places.
        radii: of the non-maximum suppression, pixels; each pair has one of them.
    """

    def __init__(
        self,
        files: list[Path],
        model: SuperPoint,
        folder: Path,
        seed: int,
        rendered: float,
        strength: float,
        radii: list[int],
    ) -> None:
        self.files, self.seed, self.rendered, self.strength = files, seed, rendered, strength
        self.detectors = [with_radius(model, radius) for radius in radii]
        digest = hashlib.sha256(f"{seed} {rendered} {strength} {radii} {[file.name for file in files]}".encode())
        digest.update(weights_of(model))
        self.folder = folder / digest.hexdigest()[:12]
        self.folder.mkdir(parents=True, exist_ok=True)

    def pair(self, number: int) -> tuple[Features, Features]:
        def make() -> dict[str, Array]:
            rng = generator(self.seed, PAIR, number)
            make_pair = self.rendered_pair if rng.random() < self.rendered else self.picture_pair
            both = make_pair(rng, number, self.detectors[rng.integers(len(self.detectors))])
            return {
                f"{name}{i}": value.astype(np.float16 if name == "descriptors" else np.float32)
                for i, features in enumerate(both)
                for name, value in features._asdict().items()
            }

        found = kept(self.folder / f"{number:06d}.npz", make)
        first, second = (
            Features(found[f"points{i}"], found[f"descriptors{i}"].astype(np.float32), found[f"places{i}"])
            for i in (0, 1)
        )
        return first, second

    def picture_pair(self, rng: np.random.Generator, number: int, detector: SuperPoint) -> tuple[Features, Features]:
        """Two views of a picture."""
        image = cv2.cvtColor(read_rgb(self.files[number % len(self.files)]), cv2.COLOR_RGB2GRAY)
        crop = random_crop(rng, image, *BASE)
        moves = [random_homography(rng, BASE, SIZE, strength) for strength in (0.3, 1.0)]
        points = [extract(detector, degrade(rng, warp(crop, move, SIZE), self.strength)) for move in moves]
        between = moves[1] @ np.linalg.inv(moves[0])
        return _with_places(
            points, [_planar_places(points[0][0], between), _planar_places(points[1][0], np.linalg.inv(between))]
        )

    def rendered_pair(self, rng: np.random.Generator, number: int, detector: SuperPoint) -> tuple[Features, Features]:
        """A scene from two places."""
        scene, poses = rendered_scene(int(rng.integers(SCENES)) + SCENES * self.seed)
        first = int(rng.integers(len(poses)))
        second = (first + int(rng.integers(1, 9))) % len(poses)
        camera = demo_camera(*SIZE, distorted=False)
        views = [scene.render(*shaken(rng, poses[i]), camera) for i in (first, second)]
        greys = [cv2.cvtColor(view.image, cv2.COLOR_RGB2GRAY) for view in views]
        points = [extract(detector, degrade(rng, grey, self.strength)) for grey in greys]
        return _with_places(points, [places_in(points[0][0], *views), places_in(points[1][0], *views[::-1])])


def with_radius(model: SuperPoint, radius: int) -> SuperPoint:
    """The same network, finding as many points as are kept, with non-maximum suppression of that radius."""
    same = copy.copy(model)  # with the same weights, not a copy of them
    same.keypoint_threshold, same.max_keypoints, same.nms_radius = 0.0, KEPT, radius
    return same


@torch.inference_mode()
def extract(detector: SuperPoint, image: Array) -> tuple[Array, Array]:
    """Points (N, 2) and descriptors (N, D) of a grey image."""
    found = detector(to_tensor([image], next(detector.parameters()).device))
    return found.keypoints[found.mask].cpu().numpy(), found.descriptors[found.mask].cpu().numpy()


def _with_places(points: list[tuple[Array, Array]], places: list[Array]) -> tuple[Features, Features]:
    return Features(*points[0], places[0]), Features(*points[1], places[1])


def _planar_places(points: Array, homography: Array) -> Array:
    places = project(homography, points)
    return np.where(inside(places, SIZE)[:, None], places, np.inf)


@lru_cache(maxsize=SCENES)
def rendered_scene(seed: int) -> tuple[Scene, list[Pose]]:
    return Scene(seed), camera_path(60)


def shaken(rng: np.random.Generator, pose: Pose) -> Pose:
    """A pose near another, turned by some degrees more."""
    turn = look((0, 0, 0), 0).rotation.T @ look((0, 0, 0), *(rng.normal(size=3) * (0.15, 0.08, 0.1))).rotation
    return Pose(pose.rotation @ turn, pose.position + rng.normal(size=3) * 0.15)


def places_in(points: Array, here: View, there: View) -> Array:
    """Where (N, 2) points of a rendered view lie in another."""
    x, y = np.round(points).astype(int).T
    depth = here.depth[y, x].astype(np.float64)
    matrix = here.camera.matrix
    rays = np.c_[(points - matrix[:2, 2]) / np.diag(matrix)[:2], np.ones(len(points))]
    sky = ~np.isfinite(depth)
    world = (rays * np.where(sky, 1.0, depth)[:, None]) @ here.rotation.T + here.position
    seen = (world - there.position) @ there.rotation
    z = np.maximum(seen[:, 2], 1e-6)
    places = seen[:, :2] / z[:, None] * np.diag(there.camera.matrix)[:2] + there.camera.matrix[:2, 2]
    visible = (seen[:, 2] > 1e-6) & inside(places, SIZE)
    column, row = np.round(np.where(visible[:, None], places, 0)).astype(int).T
    # Around an edge both depths are in the picture: within the nearest and farthest of nine pixels nothing is hidden.
    depths = there.depth[
        np.clip(row + np.arange(-1, 2)[:, None], 0, SIZE[1] - 1)[:, None],
        np.clip(column + np.arange(-1, 2)[:, None], 0, SIZE[0] - 1)[None],
    ].reshape(9, -1)
    hidden = z > depths.max(axis=0) * 1.02
    places[~visible | hidden] = np.inf
    # In front of what the other image shows there, or in the sky: the two images do not agree on what there is.
    places[sky | (visible & (z < depths.min(axis=0) * 0.98))] = np.nan
    return places


# --- the truth -------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """B pairs with at most N points an image.

    Attributes:
        points, descriptors, masks: of both images, (B, N, 2), (B, N, D), (B, N).
        partners: (B, N) int64, the index of the point's match in image 1, -1 where there is none or it is unknown.
        alone: of both images, (B, N) bool, points that certainly have no match.
    """

    points: tuple[Tensor, Tensor]
    descriptors: tuple[Tensor, Tensor]
    masks: tuple[Tensor, Tensor]
    partners: Tensor
    alone: tuple[Tensor, Tensor]


def make_batch(pairs: list[tuple[Features, Features]], count: int, device: torch.device) -> Batch:
    """The best ``count`` points of each image and what is true of them."""
    columns: list[list[Array]] = [[] for _ in range(9)]
    for pair in pairs:
        first, second = (Features(*(values[:count] for values in features)) for features in pair)
        partners, alone0, alone1 = truth(first, second)
        values = (
            first.points,
            second.points,
            first.descriptors,
            second.descriptors,
            np.ones(len(first.points), bool),
            np.ones(len(second.points), bool),
            partners,
            alone0,
            alone1,
        )
        for i, value in enumerate(values):
            column = np.full((count, *value.shape[1:]), -1 if value is partners else 0, value.dtype)
            column[: len(value)] = value
            columns[i].append(column)
    t = [torch.from_numpy(np.stack(column)).to(device) for column in columns]
    return Batch((t[0], t[1]), (t[2], t[3]), (t[4], t[5]), t[6], (t[7], t[8]))


def truth(first: Features, second: Features) -> tuple[Array, Array, Array]:
    """Partners (N0,) int64 in image 1 or -1, and which points of either image (N0,), (N1,) certainly have none."""
    with np.errstate(invalid="ignore"):
        there = np.linalg.norm(first.places[:, None] - second.points[None], axis=2)  # NaN where unknown
        back = np.linalg.norm(first.points[:, None] - second.places[None], axis=2)
    distance = np.fmax(there, back)
    distance[np.isnan(distance)] = np.inf
    alone0 = ~np.isnan(first.places).any(axis=1) & (np.nan_to_num(there, nan=np.inf).min(axis=1, initial=np.inf) > NEAR)
    alone1 = ~np.isnan(second.places).any(axis=1) & (np.nan_to_num(back, nan=np.inf).min(axis=0, initial=np.inf) > NEAR)
    partners = np.full(len(first.points), -1, np.int64)
    if distance.size:
        best0, best1 = distance.argmin(axis=1), distance.argmin(axis=0)
        rows = np.arange(len(best0))
        matched = (best1[best0] == rows) & (distance[rows, best0] <= NEAR)
        partners[matched] = best0[matched]
    return partners, alone0, alone1


# --- the loss --------------------------------------------------------------------------------------------------------


def layers(model: LightGlue, batch: Batch) -> list[tuple[Points, Points]]:
    """The states of both images' points after every layer."""
    size = torch.tensor([SIZE], device=batch.partners.device).expand(len(batch.partners), 2)
    # Masks only where there is padding: attention is much faster without.
    masks = batch.masks if not all(mask.all() for mask in batch.masks) else (None, None)
    image0, image1 = (
        ImageFeatures(points, descriptors, size, mask)
        for points, descriptors, mask in zip(batch.points, batch.descriptors, masks)
    )
    return list(model.states(image0, image1))


def losses(model: LightGlue, batch: Batch) -> dict[str, Tensor]:
    """``total``, and ``assignment`` and ``confidence`` of which it is made; ``last`` is the last layer's assignment.

    The confidences learn to say whether a point's match is the final one already; nothing of that reaches the layers.
    """
    states = layers(model, batch)
    heads = cast(list[MatchAssignment], list(model.match_assignment_layers))
    scores = [head(*points) for head, points in zip(heads, states)]
    assignments = [assignment_loss(*parts, batch) for parts in zip(heads, states, scores)]
    assignment = torch.stack(assignments).mean()
    confidence = torch.zeros((), device=batch.partners.device)
    final = best_partners(scores[-1].detach())
    for head, points, score in zip(cast(list[TokenConfidence], list(model.token_confidence)), states, scores):
        now = best_partners(score.detach())
        for side, mask, before, after in zip(points, batch.masks, now, final):
            logits = head.token(side.x.detach())[..., 0]
            wrong = F.binary_cross_entropy_with_logits(logits, (before == after).float(), reduction="none")
            confidence = confidence + (wrong * mask).sum() / mask.sum().clamp(min=1) / (2 * len(scores) - 2)
    return {
        "total": assignment + confidence,
        "assignment": assignment,
        "confidence": confidence,
        "last": assignments[-1],
    }


def assignment_loss(head: MatchAssignment, points: tuple[Points, Points], scores: Tensor, batch: Batch) -> Tensor:
    """Negative log-likelihood of the true matches and of the points known to have none (eq. 11 of the paper)."""
    matched = batch.partners >= 0
    chosen = scores.gather(2, batch.partners.clamp(min=0)[..., None])[..., 0]
    # Not multiplied with the mask: where there is padding scores are -inf, and 0 times that is NaN.
    loss = -torch.where(matched, chosen, 0.0).sum(dim=1) / matched.sum(dim=1).clamp(min=1)
    for side, alone in zip(points, batch.alone):
        unmatchable = F.softplus(head.matchability(side.x)[..., 0])  # -log(1 - matchability)
        loss = loss + 0.5 * (unmatchable * alone).sum(dim=1) / alone.sum(dim=1).clamp(min=1)
    return loss.mean()


def best_partners(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The match of every point of both images, -1 where it has none."""
    found = mutual_matches(scores, torch.exp, 0.1)
    return found.matches0, found.matches1


@torch.no_grad()
def examine(model: LightGlue, batches: list[Batch]) -> dict[str, float]:
    """Loss, precision and recall of the last layer's matches on pictures that are not trained on."""
    model.eval()
    head = cast(MatchAssignment, model.match_assignment_layers[-1])
    total, right, wrong, there = 0.0, 0, 0, 0
    for batch in batches:
        points = layers(model, batch)[-1]
        scores = head(*points)
        total += float(assignment_loss(head, points, scores, batch))
        found = best_partners(scores)[0]
        right += int(((found == batch.partners) & (found >= 0)).sum())
        # A match beside the best one, of which nothing is certain, is neither right nor wrong.
        wrong += int(((found >= 0) & (found != batch.partners) & (batch.alone[0] | (batch.partners >= 0))).sum())
        there += int((batch.partners >= 0).sum())
    return {"last": total / len(batches), "precision": right / max(right + wrong, 1), "recall": right / max(there, 1)}


# --- training ---------------------------------------------------------------------------------------------------------


def load_lightglue(source: str | Path) -> LightGlue:
    """From a training's checkpoint (its averaged weights), or whatever the package itself reads."""
    if Path(source).suffix != ".pt":
        return LightGlue.from_pretrained(source)
    state = torch.load(source, map_location="cpu", weights_only=True)
    model = LightGlue(**state["config"])
    model.load_state_dict(state["average"])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser)
    add_run_options(parser, steps=40000, rate=1e-4, examine_every=250, what="pairs")
    parser.add_argument("--superpoint", default="superpoint-open", help="a training's checkpoint.pt, a folder, a name")
    parser.add_argument("--start-from", default="lightglue-superpoint-open", help="likewise")
    parser.add_argument("--pairs", type=int, default=2, help="pairs of images in a step")
    parser.add_argument("--keypoints", type=int, default=512, help="of each image")
    parser.add_argument("--pool", type=int, default=3000, help="different pairs to learn from")
    parser.add_argument("--rendered", type=float, default=0.25, help="share of the pairs that are rendered scenes")
    parser.add_argument("--strength", type=float, default=0.6, help="of degradation, 0 to 1")
    parser.add_argument(
        "--nms-radii",
        type=int,
        nargs="+",
        default=[1, 2],
        metavar="PIXELS",
        help="of the non-maximum suppression, one of them for each pair",
    )
    train(parser.parse_args())


def train(arguments: argparse.Namespace) -> None:
    device = choose_device(arguments.device)
    detector = load_superpoint(arguments.superpoint).to(device)
    folder = arguments.data / "pairs"
    training = Pairs(
        pictures(arguments.data, "train"),
        detector,
        folder,
        arguments.seed,
        arguments.rendered,
        arguments.strength,
        arguments.nms_radii,
    )
    settings = {
        name: getattr(arguments, name)
        for name in ("start_from", "pairs", "keypoints", "pool", "rendered", "learning_rate", "strength", "seed")
    }
    settings["features"] = training.folder.name  # changes with the SuperPoint's weights and the radii
    run = Run(arguments.run, settings)
    cv2.setNumThreads(1)
    held_out = Pairs(
        pictures(arguments.data, "held-out"),
        detector,
        folder,
        HELD_OUT_SEED,
        arguments.rendered,
        0.5,
        arguments.nms_radii,
    )
    exam = [make_batch([held_out.pair(i)], arguments.keypoints, device) for i in range(arguments.held_out)]

    model = load_lightglue(arguments.start_from).to(device).requires_grad_(True)
    for layer in cast(list[TransformerLayer], list(model.transformer_layers)):
        layer.cross_attention.share_equal_projections()  # and train them as one, for the authors' code has only one
    shadow = LightGlue(**model.config).to(device)

    def make(step: int) -> Batch:
        numbers = generator(arguments.seed, STEP, step).integers(0, arguments.pool, arguments.pairs)
        return make_batch([training.pair(int(number)) for number in numbers], arguments.keypoints, device)

    def examined(weights: dict[str, Tensor]) -> dict[str, float]:
        shadow.load_state_dict(weights)
        return examine(shadow, exam)

    state = run.load(device)
    fit(model, model.config, run, state, arguments, make, lambda batch: losses(model, batch), examined, 1.0)


if __name__ == "__main__":
    main()
