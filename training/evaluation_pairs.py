"""The groups of image pairs for the comparison of matchers, with their ground truth.

The folder ``eval`` of the training's data holds the following, each only if it is needed: ``rooms_heldout.npz`` and
``photos_heldout.npz`` (see ``shards.py``), ``lund_door/`` (the photographs with COLMAP's ``cameras.txt`` and
``images.txt``), ``opencv/`` (graf1, graf3, H1to3p.xml, aloeL, aloeR, aloeGT) and ``scannet/`` (``pairs_with_gt.txt``
with its images).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import views
from degradation import degrade
from evaluation_truth import ByDepth, ByDisparity, ByHomography, Motion, Truth, project
from shards import Rooms, read_photos, read_rooms
from torch import Tensor

from kpmatch_ros.geometry.camera import Camera

__all__ = ["GROUPS", "VALIDATION", "Pair", "groups", "validation_pairs"]

MAX_ERROR = 3.0  # pixels: largest error of a correct match
MAX_ERROR_SCANNET = 6.5  # pixels, because its poses are inexact; equals a squared symmetric epipolar distance of 5e-4
SIZE = (640, 480)
SEED = 17
CLUSTERS = 24  # number of places used, the first ones of the held-out rooms; nothing has been chosen by the others yet
PAIRS_OF_CLUSTER = 10
OVERLAPS = (0.15, 0.2, 0.3, 0.4, 0.55, 0.8)  # bins of room pairs, used in turn in a cluster; pack.py keeps no less
PHOTO_PAIRS = 40
LARGE = (780, 580)  # pixels: smaller photographs would have to be enlarged
LIGHT, HEAVY = 0.3, 0.8  # strengths of degradation


@dataclass(frozen=True, eq=False)
class Pair:
    """Two images and their ground truth.

    Attributes:
        group: group of pairs for which figures are computed.
        name: identifies the pair within its group.
        images: uint8, grey (H, W) or RGB (H, W, 3).
        truth: gives the errors of matches.
        motion: relative pose of the cameras; None if a pose is not defined.
        max_error: largest error of a correct match, pixels.
        place: identifier of the scene, shared by pairs that show the same things; empty if no other pair does.
    """

    group: str
    name: str
    images: tuple[np.ndarray, np.ndarray]
    truth: Truth
    motion: Motion | None = None
    max_error: float = MAX_ERROR
    place: str = ""

    @cached_property
    def key(self) -> str:
        """Hash of the pair's group, images and ground truth."""
        digest = hashlib.sha256(self.group.encode())
        for image in self.images:
            digest.update(str(image.shape).encode() + np.ascontiguousarray(image).tobytes())
        _digest(digest, self.truth)
        _digest(digest, self.motion)
        return digest.hexdigest()[:20]


def _digest(digest: Any, value: Any) -> None:
    """Add the arrays and numbers of dataclasses and tuples to a hash."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _digest(digest, getattr(value, field.name))
    elif isinstance(value, tuple):
        for part in value:
            _digest(digest, part)
    elif isinstance(value, np.ndarray):
        digest.update(np.ascontiguousarray(value).tobytes())
    else:
        digest.update(repr(value).encode())


# --- rooms -----------------------------------------------------------------------------------------------------------


def room_pairs(data: Path) -> Iterator[Pair]:
    """Yield pairs of lit views of the held-out rooms, with large and small overlap."""
    rooms = read_rooms(data / "rooms_heldout.npz")
    if len(rooms.images) == 0:
        return
    step = rooms.images[0].shape[1] / rooms.depth.shape[2]
    for i, j in choose_pairs(rooms):
        motion = np.linalg.inv(rooms.T_world_camera[j]) @ rooms.T_world_camera[i]
        images = rooms.images[i], rooms.images[j]
        cameras = [Camera(image.shape[1], image.shape[0], rooms.K[k]) for image, k in zip(images, (i, j))]
        yield Pair(
            "rooms",
            f"{rooms.names[i]} {rooms.names[j]}",
            images,
            ByDepth((rooms.depth[i], rooms.depth[j]), (rooms.K[i], rooms.K[j]), motion, step),
            Motion(motion[:3, :3], motion[:3, 3], (cameras[0], cameras[1])),
            place=str(rooms.cluster[i]),
        )


def choose_pairs(rooms: Rooms) -> list[tuple[int, int]]:
    """Choose pairs of views of each cluster; a cluster's pairs follow each other.

    The choice in a cluster does not depend on the other clusters.
    """
    chosen = []
    overlap = rooms.overlaps.min(axis=1)
    number = np.digitize(overlap, OVERLAPS) - 1
    eligible = (number >= 0) & (number < len(OVERLAPS) - 1)
    for cluster in np.unique(rooms.cluster)[:CLUSTERS]:
        here = np.flatnonzero(eligible & (rooms.cluster[rooms.pairs[:, 0]] == cluster))
        rng = np.random.default_rng((SEED, int(cluster)))
        bins = [list(rng.permutation(here[number[here] == each])) for each in range(len(OVERLAPS) - 1)]
        turns = [each for turn in itertools.zip_longest(*bins) for each in turn if each is not None]
        chosen += sorted((int(i), int(j)) for i, j in rooms.pairs[np.array(turns[:PAIRS_OF_CLUSTER], int)])
    return chosen


# --- photographs -----------------------------------------------------------------------------------------------------


def photo_pairs(data: Path, group: str, strength: float) -> Iterator[Pair]:
    """Yield pairs of views of held-out photographs under homographies, degraded with this strength."""
    draw = torch.Generator().manual_seed(SEED)
    images = read_photos(data / "photos_heldout.npz")
    photographs = [image for image in images if image.shape[1] >= LARGE[0] and image.shape[0] >= LARGE[1]]
    order = torch.randperm(len(photographs), generator=draw).tolist()
    for number, index in enumerate(order[:PHOTO_PAIRS]):
        draw = torch.Generator().manual_seed(SEED * 1000 + number)  # the same views for every strength
        moves = _moves(draw, photographs[index].shape[1::-1])
        source = torch.from_numpy(photographs[index])[None, None].float() / 255
        size = torch.tensor([photographs[index].shape[1::-1]])
        seen = [views.resample(source, size, move, SIZE) for move in moves]
        seen = [degrade(draw, image, torch.tensor([strength])) for image in seen]
        homography = (moves[1].double() @ torch.linalg.inv(moves[0].double()))[0].numpy()
        yield Pair(group, f"photograph {index}", (_grey(seen[0]), _grey(seen[1])), ByHomography(homography))


def _moves(draw: torch.Generator, size: tuple[int, ...]) -> list[Tensor]:
    """Draw homographies (1, 3, 3) from a photograph to two views of it that share at least 40 %."""
    middle = (torch.tensor([size]) - 1) / 2
    while True:
        scale = 1.0 + 0.2 * torch.rand(1, generator=draw)
        strengths = [low + (high - low) * torch.rand(1, generator=draw) for low, high in ((0.1, 0.5), (0.4, 1.0))]
        moves = [views.random_homographies(draw, middle.float(), scale, each, SIZE) for each in strengths]
        forth = (moves[1] @ torch.linalg.inv(moves[0]))[0].double().numpy()
        if min(_shared(forth), _shared(np.linalg.inv(forth))) >= 0.4:
            return moves


def _shared(homography: np.ndarray) -> float:
    """The share of an image of SIZE that is also in a second one."""
    x, y = np.meshgrid(*(np.arange(0, side, 20.0) for side in SIZE))
    places = project(homography, np.stack([x.ravel(), y.ravel()], axis=1))
    with np.errstate(invalid="ignore"):
        return float(((places >= 0) & (places <= np.array(SIZE) - 1)).all(axis=1).mean())


def _grey(image: Tensor) -> np.ndarray:
    """Convert (1, 1, H, W) in [0, 1] to (H, W) uint8."""
    return (image[0, 0] * 255).round().to(torch.uint8).numpy(force=True)


# --- pictures of others ----------------------------------------------------------------------------------------------


def lund_pairs(data: Path) -> Iterator[Pair]:
    """Yield all pairs of twelve photographs of a church door, with poses from COLMAP (CAMERA SIMPLE_RADIAL)."""
    folder = data / "lund_door"
    words = _lines(folder / "cameras.txt")[0].split()
    full = np.array(words[2:4], dtype=float)
    focal, cx, cy, radial = map(float, words[4:8])
    size = (432, 640)
    scale = np.array(size) / full
    centre = np.array([cx, cy]) * scale - 0.5  # COLMAP's origin is the image's corner, not the first pixel's centre
    matrix = np.array([[focal * scale[0], 0, centre[0]], [0, focal * scale[1], centre[1]], [0, 0, 1]])
    camera = Camera(*size, matrix, "plumb_bob", np.array([radial, 0, 0, 0]))
    found = []
    for line in _lines(folder / "images.txt")[::2]:
        numbers, name = np.array(line.split()[1:8], dtype=float), line.split()[9]
        image = cv2.resize(_read(folder / name), size, interpolation=cv2.INTER_AREA)
        found.append((image, _rotation(numbers[:4]), numbers[4:], name))
    for i, (image0, rotation0, shift0, name0) in enumerate(found):
        for image1, rotation1, shift1, name1 in found[i + 1 :]:
            rotation = rotation1 @ rotation0.T
            motion = Motion(rotation, shift1 - rotation @ shift0, (camera, camera))
            yield Pair("Lund door", f"{name0} {name1}", (image0, image1), motion, motion)


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def _rotation(quaternion: np.ndarray) -> np.ndarray:
    """Rotation matrix (3, 3) of a quaternion w, x, y, z."""
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def graf_pairs(data: Path) -> Iterator[Pair]:
    """Yield the pair graf1 and graf3, a painted wall."""
    store = cv2.FileStorage(str(data / "opencv/H1to3p.xml"), cv2.FILE_STORAGE_READ)
    homography = store.getNode("H13").mat()
    store.release()
    images = _read(data / "opencv/graf1.png"), _read(data / "opencv/graf3.png")
    yield Pair("graf", "graf1 graf3", images, ByHomography(homography))


def aloe_pairs(data: Path) -> Iterator[Pair]:
    """Yield the aloe pair at half its size, closer to cameras' images; the file's disparity is in full-size pixels."""
    images = [
        cv2.resize(_read(data / "opencv" / name), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        for name in ("aloeL.jpg", "aloeR.jpg")
    ]
    disparity = cv2.imread(str(data / "opencv/aloeGT.png"), cv2.IMREAD_GRAYSCALE)[::2, ::2] / 2
    yield Pair("aloe", "aloeL aloeR", (images[0], images[1]), ByDisparity(disparity))


def scannet_pairs(data: Path) -> Iterator[Pair]:
    """Yield the pairs of ``pairs_with_gt.txt``: names, rotations, K0, K1 (9), T_0to1 (16). Never tune on it."""
    folder = data / "scannet"
    for line in (folder / "pairs_with_gt.txt").read_text().splitlines():
        names, numbers = line.split()[:2], np.array(line.split()[4:], dtype=float)
        originals = [_read(folder / name) for name in names]
        images = [cv2.resize(image, SIZE, interpolation=cv2.INTER_AREA) for image in originals]
        scale = np.diag([SIZE[0] / originals[0].shape[1], SIZE[1] / originals[0].shape[0], 1.0])
        cameras = [Camera(*SIZE, scale @ numbers[start : start + 9].reshape(3, 3)) for start in (0, 9)]
        motion = numbers[18:].reshape(4, 4)
        truth = Motion(motion[:3, :3], motion[:3, 3], (cameras[0], cameras[1]))
        yield Pair("ScanNet", " ".join(names), (images[0], images[1]), truth, truth, MAX_ERROR_SCANNET)


def _read(path: Path) -> np.ndarray:
    """Read an image file as RGB (H, W, 3) uint8.

    Raises:
        OSError: the file is missing or damaged.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise OSError(f"{path} is missing or is not an image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


GROUPS: dict[str, tuple[str, Callable[[Path], Iterator[Pair]]]] = {
    "rooms": ("rooms_heldout.npz", room_pairs),
    "photographs": ("photos_heldout.npz", lambda data: photo_pairs(data, "photographs", LIGHT)),
    "degraded": ("photos_heldout.npz", lambda data: photo_pairs(data, "degraded", HEAVY)),
    "lund": ("lund_door", lund_pairs),
    "graf": ("opencv", graf_pairs),
    "aloe": ("opencv", aloe_pairs),
    "scannet": ("scannet", scannet_pairs),
}
"""For each group, what the data folder must hold, and the function that yields its pairs."""


def groups(data: Path, names: list[str] | None) -> Iterator[Pair]:
    """Return the pairs of the named groups, or of all groups whose data exist.

    Raises:
        FileNotFoundError: the data of a named group, or of all groups, are missing.
    """
    missing = {name: data / GROUPS[name][0] for name in names or GROUPS if not (data / GROUPS[name][0]).exists()}
    chosen = [name for name in names or GROUPS if name not in missing]
    if missing and (names or not chosen):
        files = dict.fromkeys(map(str, missing.values()))
        raise FileNotFoundError(f"no data to evaluate on; missing: {', '.join(files)}")
    return itertools.chain.from_iterable(GROUPS[name][1](data) for name in chosen)


# --- validation ------------------------------------------------------------------------------------------------------

VALIDATION = {"Photos": "validation photographs", "RoomViews": "validation rooms"}


@dataclass(frozen=True)
class ByGeometry:
    """Ground truth from the training's geometry, for a single pair of views."""

    geometry: views.Geometry

    def errors(self, points0: np.ndarray, points1: np.ndarray) -> np.ndarray:
        """Distance (M,) of image 1's points from their true positions, or of image 0's points if that is unknown."""
        given = [torch.from_numpy(points).float()[None] for points in (points0, points1)]
        distances = []
        for side in (0, 1):
            places, state = self.geometry.places(given[side], side)
            distance = (places - given[1 - side]).norm(dim=-1)
            distance = torch.where(state == views.VISIBLE, distance, torch.inf)
            distances.append(torch.where(state == views.UNKNOWN, torch.nan, distance)[0].double().numpy())
        return np.where(np.isnan(distances[0]), distances[1], distances[0])


def validation_pairs(shards: Path, count: int) -> list[Pair]:
    """Return ``count`` pairs of photographs and of rooms each, from the training's validation views.

    All pairs are created at once, because the shards take gigabytes of memory and the pairs do not.
    """
    pairs = []
    sources = views.load(shards, torch.device("cpu"))[1]
    for i, (number, source) in itertools.product(range(count), enumerate(sources)):
        draw = torch.Generator().manual_seed(SEED * 1_000_000 + number * 10_000 + i)
        pair = source.pairs(draw, 1, SIZE)
        strength = 0.6 * torch.rand(1, generator=draw)
        seen = [degrade(draw, image, strength) for image in pair.images]
        images = _grey(seen[0]), _grey(seen[1])
        truth, motion = ByGeometry(pair.geometry), _motion(pair.geometry)
        pairs.append(Pair(VALIDATION[type(source).__name__], str(i), images, truth, motion))
    return pairs


def _motion(geometry: views.Geometry) -> Motion | None:
    """Relative pose of the cameras of a single pair of views; None for views of a photograph."""
    if not isinstance(geometry, views.Spatial):
        return None
    poses = [pose[0].double().numpy() for pose in geometry.poses]
    motion = np.linalg.inv(poses[1]) @ poses[0]
    cameras = [Camera(*geometry.camera_size, matrix[0].double().numpy()) for matrix in geometry.matrices]
    cuts = [np.linalg.inv(cut[0].double().numpy()) for cut in geometry.cuts]
    return Motion(motion[:3, :3], motion[:3, 3], (cameras[0], cameras[1]), (cuts[0], cuts[1]))
