"""Teach the SuperPoint's detector to find the same places in every view: homographic adaptation.

    python training/adapt_superpoint.py --run runs/adapted            # start, or go on after a stop of any kind

What it finds in many views of a crop is laid over each other: where most views agree are the places to learn (DeTone
et al., SuperPoint, CVPR Workshops 2018, section 5). Its descriptors stay as they are, so that a matcher made for them
goes on matching. The first blocks are not trained: what they make of each view is worked out once.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import NamedTuple

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
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from train_superpoint import (
    CROP,
    NOTHING,
    UNKNOWN,
    VIEW,
    centre_of_mass,
    found_again,
    heads,
    label_cells,
    load_superpoint,
    recognisable,
)

from kpmatch_ros.models import SuperPoint
from kpmatch_ros.models.superpoint import CELL, clear_border, select_keypoints, suppress_non_maxima

VIEWS = 6  # of a crop
MOTION, DEGRADATION = 0.6, 0.3  # of 1
POINTS = 480  # of a crop: as dense as 1,000 in an image of 640 x 480
DEVIATION = 0.8  # pixels: a place is known no better
DESCRIPTORS = 5.0  # weight of leaving the descriptors as they are
LESSON, STEP = 10, 11  # what random numbers are for


# --- places that many views agree on ---------------------------------------------------------------------------------


class Lesson(NamedTuple):
    """Views (V, H, W) uint8 of a crop, (V, 3, 3) through which they see it, and the cells' labels (V, H/8, W/8)."""

    views: Array
    homographies: Array
    cells: Array


class Lessons:
    """Lessons by number, kept on disk once worked out.

    Args:
        files: the pictures; crop k is of picture k modulo their number.
        folder: where the lessons are kept, apart for each set of pictures, seed and network.
    """

    def __init__(self, model: SuperPoint, files: list[Path], folder: Path, seed: int, device: torch.device) -> None:
        names = " ".join([str(seed), *(file.name for file in files)]).encode()
        self.model, self.files, self.seed, self.device = model, files, seed, device
        self.folder = folder / hashlib.sha256(weights_of(model) + names).hexdigest()[:12]
        self.folder.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, number: int) -> Lesson:
        def make() -> dict[str, Array]:
            rng = generator(self.seed, LESSON, number)
            crop = random_crop(rng, read_rgb(self.files[number % len(self.files)]), *CROP)
            return self.make(rng, cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY))._asdict()

        return Lesson(**kept(self.folder / f"{number:06d}.npz", make))

    def make(self, rng: np.random.Generator, image: Array) -> Lesson:
        homographies = [random_homography(rng, CROP, VIEW, MOTION) for _ in range(VIEWS)]
        views = [degrade(rng, warp(image, homography, VIEW), DEGRADATION) for homography in homographies]
        scores = self.scores([image])[0]
        total, seen = scores.copy(), np.ones_like(scores)
        for found, homography in zip(self.scores(views), homographies):
            back = np.linalg.inv(homography)
            total += cv2.warpPerspective(found, back, CROP)
            seen += cv2.warpPerspective(np.ones_like(found), back, CROP)
        points = peaks(total / seen)
        cells = []
        for view, homography in zip(views, homographies):
            places = project(homography, points)
            places[~recognisable(view, places)] = np.nan
            cells.append(label_cells(places, homography))
        return Lesson(np.stack(views), np.stack(homographies), np.stack(cells))

    @torch.inference_mode()
    def scores(self, images: list[Array]) -> Array:
        """(V, H, W) of images of one size."""
        found: Array = self.model.keypoint_decoder(self.model.encoder(to_tensor(images, self.device))).cpu().numpy()
        return found


def peaks(scores: Array) -> Array:
    """(N, 2) x, y of the highest maxima of scores (H, W), to a fraction of a pixel, best first."""
    smooth = cv2.GaussianBlur(scores, (0, 0), DEVIATION)
    maxima = clear_border(suppress_non_maxima(torch.from_numpy(smooth)[None], 4), 4)
    points = select_keypoints(maxima, 0.0, POINTS)[0][0].numpy().astype(int)
    middle: Array = points + centre_of_mass(smooth, points, lambda near: near - near.min(axis=1, keepdims=True))
    return middle


# --- what is asked of a view -----------------------------------------------------------------------------------------


def likely_classes() -> Tensor:
    """(65, 65) for every label of a cell how likely each class is: the label's neighbours a little."""
    place = torch.arange(CELL * CELL)
    places = torch.stack([place % CELL, place // CELL], dim=1).float()
    likely = torch.zeros(NOTHING + 1, NOTHING + 1)
    likely[:NOTHING, :NOTHING] = (-(torch.cdist(places, places) ** 2) / (2 * DEVIATION**2)).softmax(dim=1)
    likely[NOTHING, NOTHING] = 1
    return likely


def losses(found: tuple[Tensor, Tensor], cells: Tensor, before: Tensor, likely: Tensor) -> dict[str, Tensor]:
    """``detector``: how far from the labels, nats a cell; ``descriptors``: 1 - cosine to those ``before``."""
    logits, descriptors = found
    known = cells != UNKNOWN
    wanted = likely[cells[known]]
    logs = logits.permute(0, 2, 3, 1)[known].log_softmax(dim=1)
    detector = F.kl_div(logs, wanted, reduction="batchmean")
    moved = 1 - (descriptors * before).sum(dim=1).mean()
    return {"total": detector + DESCRIPTORS * moved, "detector": detector, "descriptors": moved}


# --- how good it is ---------------------------------------------------------------------------------------------------


def examine(model: SuperPoint, lessons: list[Lesson], device: torch.device) -> dict[str, float]:
    """Which share of a view's points is found again in another one within 1 and 3 pixels."""
    distances = []
    for lesson in lessons:
        between = lesson.homographies[1] @ np.linalg.inv(lesson.homographies[0])
        distances += found_again(model, to_tensor(list(lesson.views[:2]), device), between[None])
    return {f"within {bound} px": float(np.mean([(each <= bound).mean() for each in distances])) for bound in (1, 3)}


# --- training ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser)
    add_run_options(parser, steps=3000, rate=5e-4, examine_every=100, what="crops")
    parser.add_argument("--start-from", default="superpoint-open", help="a training's checkpoint.pt, a folder, a name")
    parser.add_argument("--frozen", type=int, default=1, help="blocks that do not learn, 0 to 3")
    parser.add_argument("--views", type=int, default=8, help="in a step")
    parser.add_argument("--crops", type=int, default=250, help=f"different crops, of {VIEWS} views each, all in memory")
    train(parser.parse_args())


def train(arguments: argparse.Namespace) -> None:
    device = choose_device(arguments.device)
    settings = {
        name: getattr(arguments, name) for name in ("start_from", "frozen", "views", "crops", "learning_rate", "seed")
    }
    run = Run(arguments.run, settings)
    cv2.setNumThreads(1)

    model = load_superpoint(arguments.start_from).to(device)
    folder = arguments.data / "adaptation"
    lessons = Lessons(model, pictures(arguments.data, "train"), folder, arguments.seed, device)
    held_out = Lessons(model, pictures(arguments.data, "held-out"), folder, 0, device)
    exam = [held_out[number] for number in range(arguments.held_out)]

    # What the blocks that do not learn make of each view, and its descriptors as they are, before anything learns.
    blocks = list(model.encoder.conv_blocks)
    frozen, trained = nn.Sequential(*blocks[: arguments.frozen]), nn.Sequential(*blocks[arguments.frozen :])
    seen, before, cells = [], [], []
    for number in tqdm(range(arguments.crops), desc="crops", disable=None):
        lesson = lessons[number]
        features = frozen(to_tensor(list(lesson.views), device))
        seen.append(features.half())
        before.append(heads(model, trained(features))[1].half())
        cells.append(torch.from_numpy(lesson.cells).to(device))
    inputs, descriptors, labels = torch.cat(seen), torch.cat(before), torch.cat(cells)
    del seen, before, cells
    model.requires_grad_(True)
    frozen.requires_grad_(False)
    likely = likely_classes().to(device)
    shadow = SuperPoint(**model.config).to(device)

    def make(step: int) -> tuple[Tensor, Tensor, Tensor]:
        numbers = generator(arguments.seed, STEP, step).integers(0, len(inputs), arguments.views)
        chosen = torch.from_numpy(numbers).to(device)
        return inputs[chosen].float(), labels[chosen], descriptors[chosen].float()

    def examined(weights: dict[str, Tensor]) -> dict[str, float]:
        shadow.load_state_dict(weights)
        return examine(shadow, exam, device)

    def parts(batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        return losses(heads(model, trained(batch[0])), *batch[1:], likely)

    fit(model, model.config, run, run.load(device), arguments, make, parts, examined, 5.0)


if __name__ == "__main__":
    main()
