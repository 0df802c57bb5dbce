"""Pack rendered views into shards for training, and create pictures from the views for evaluation.

    python training/pack.py --views FOLDER --data FOLDER

Views that are added later go to new shards. Full shards do not change.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import shards

Array = np.ndarray

STEP = 2  # pixels between two samples of a shard's depth and normals
LEAST, MOST = 0.15, 0.9  # limits of the overlap of a pair that is useful for training
SHARD_BYTES = 25_000_000


def clusters(folder: Path, held_out: bool) -> list[dict[str, Any]]:
    """Read ``render.py``'s notes about its clusters, in the order of their numbers: the first few are from every scene.

    The files' modification times are not used, because those of copies may differ.
    """
    notes = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    notes.sort(key=lambda note: (note["cluster"], note["scene"]))
    return [note for note in notes if note["held_out"] == held_out and note["views"]]


def load(folder: Path, name: str) -> dict[str, Array]:
    with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


class Shard:
    """The content of one file of views, collected cluster by cluster."""

    def __init__(self) -> None:
        self.views: list[shards.EncodedView] = []
        self.names: list[str] = []
        self.bytes = 0
        self._K: list[Array] = []
        self._T: list[Array] = []
        self._scenes: list[str] = []
        self._clusters: list[int] = []
        self._pairs: list[tuple[int, int]] = []
        self._overlaps: list[tuple[float, float]] = []

    def add(
        self, note: dict[str, Any], number: int, views: list[dict[str, Array]], encoded: list[shards.EncodedView]
    ) -> None:
        first = len(self.views)
        for (i, j), shares in zip(note["pairs"], note["overlaps"]):
            if min(shares) >= LEAST and max(shares) <= MOST:
                self._pairs.append((first + i, first + j))
                self._overlaps.append(tuple(shares))
        for name, view, content in zip(note["views"], views, encoded):
            self.views.append(content)
            self.names.append(name)
            self.bytes += sum(len(part) for part in content[:4])
            self._K.append(view["K"])
            self._T.append(view["T_world_camera"])
            self._scenes.append(note["scene"])
            self._clusters.append(number)

    @property
    def pairs(self) -> int:
        return len(self._pairs)

    def write(self, path: Path) -> None:
        scenes = sorted(set(self._scenes))
        shards.write_rooms(
            path,
            self.views,
            np.array(self._K),
            np.array(self._T),
            np.array([scenes.index(scene) for scene in self._scenes]),
            scenes,
            np.array(self._clusters),
            self.names,
            np.array(self._pairs),
            np.array(self._overlaps),
        )


def pack_training(folder: Path, out: Path) -> None:
    """Write the training views to ``rooms_0.npz``, ``rooms_1.npz``, ..."""
    out.mkdir(parents=True, exist_ok=True)
    waiting = clusters(folder, held_out=False)
    number = shard_number = pairs = views = 0
    while waiting:
        path = out / f"rooms_{shard_number}.npz"
        names = _names(path)
        before = [note for note in waiting if set(note["views"]) <= names]
        full = path.stat().st_size > 0.9 * SHARD_BYTES if path.exists() else False
        if full and sum(len(note["views"]) for note in before) == len(names):
            waiting = [note for note in waiting if note not in before]
            number += len(before)
        else:
            shard = Shard()
            while waiting:
                note = waiting[0]
                read = [load(folder, name) for name in note["views"]]
                encoded = [
                    shards.encode_view(
                        view["grey"], view.get("light"), view["normals"][::STEP, ::STEP], view["depth"][::STEP, ::STEP]
                    )
                    for view in read
                ]
                if shard.bytes + sum(len(part) for view in encoded for part in view[:4]) > SHARD_BYTES:
                    break
                shard.add(note, number, read, encoded)
                number += 1
                waiting.pop(0)
            shard.write(path)
        with np.load(path, allow_pickle=False) as arrays:
            pairs, views = pairs + len(arrays["pairs"]), views + len(arrays["names"])
        shard_number += 1
    print(f"{out}: {views} views, {pairs} pairs in {shard_number} shards")


def _names(path: Path) -> set[str]:
    if not path.exists():
        return set()
    with np.load(path, allow_pickle=False) as arrays:
        return {str(name) for name in arrays["names"]}


def pack_evaluation(folder: Path, path: Path) -> None:
    """Write the evaluation views, as pictures of a camera, with the depth of every pixel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shard = Shard()
    for number, note in enumerate(clusters(folder, held_out=True)):
        read = [load(folder, name) for name in note["views"]]
        encoded = []
        for name, view in zip(note["views"], read):
            picture = photograph(np.random.default_rng([*name.encode()]), view)
            encoded.append(shards.encode_view(picture, view.get("light"), view["normals"], view["depth"]))
        shard.add(note, number, read, encoded)
    shard.write(path)
    print(f"{path}: {len(shard.names)} views, {shard.pairs} pairs")


def photograph(rng: np.random.Generator, view: dict[str, Array]) -> Array:
    """Simulate a camera's picture (H, W) uint8 of a view, with lighting and image defects; some lamps are in no other.

    Args:
        view: a view as written by ``render.py``.
    """
    height, width = view["grey"].shape
    albedo, normals = shards.linear(view["grey"]), shards.decode_normals(view["normals"])
    seen = view["depth"] > 0
    lamps = shards.linear(view["light"]) if "light" in view else np.ones_like(albedo)
    own = np.zeros_like(albedo)  # lamps of this view only, as if time had passed or a lamp had been switched on
    for _ in range(int(rng.integers(1, 4))):
        direction = rng.normal(size=3) + [0, 0.8, 0]
        direction /= np.linalg.norm(direction)
        own += np.float32(rng.uniform(0.3, 1)) * np.maximum(normals @ direction.astype(np.float32), 0)
    share = rng.uniform(0.4, 1.0)
    # Ambient light, stronger from the ceiling than from the floor.
    around = rng.uniform(0.05, 0.25) * (0.75 + 0.25 * normals[..., 1])
    light = albedo * (share * lamps + (1 - share) * own + around)
    light = np.where(seen, light, rng.uniform(0.3, 1.2))  # the outside, seen through a window
    y, x = np.mgrid[:height, :width]
    radius = np.hypot(x - (width - 1) / 2, y - (height - 1) / 2) / (width / 2)
    light = light * (1 - rng.uniform(0, 0.3) * radius**2)
    light = light * (rng.uniform(0.12, 0.35) / max(float(np.median(light)), 1e-4))  # exposure
    light = cv2.GaussianBlur(light.astype(np.float32), (0, 0), float(rng.uniform(0.3, 1.0)))
    noise = np.sqrt(rng.uniform(0.001, 0.008) ** 2 + rng.uniform(0.003, 0.02) ** 2 * np.clip(light, 0, 1))
    light = np.clip(light, 0, 1) + noise * rng.standard_normal(light.shape)
    return shards.srgb(light)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=Path, required=True, help="folder that render.py wrote")
    parser.add_argument("--data", type=Path, required=True, help="shards/ and eval/ are written below it")
    arguments = parser.parse_args()
    pack_training(arguments.views, arguments.data / "shards")
    pack_evaluation(arguments.views, arguments.data / "eval" / "rooms_heldout.npz")


if __name__ == "__main__":
    main()
