"""Makes the scripts of training/ importable. Import this module first.

Without that folder, or with an old OpenCV, the tests are skipped.
"""

from __future__ import annotations

import itertools
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

TRAINING = Path(__file__).resolve().parents[1] / "training"
if not TRAINING.is_dir():
    pytest.skip("training/ is not installed with the package", allow_module_level=True)
if not hasattr(cv2, "IMWRITE_JPEG_SAMPLING_FACTOR"):
    pytest.skip(f"training/ needs OpenCV 4.8 or later, not {cv2.__version__}", allow_module_level=True)
sys.path.insert(0, str(TRAINING))


def photographs(folder: Path, texture: Callable[[int, int, int], np.ndarray], name: str, count: int = 3) -> None:
    """Write a shard with pictures that are large enough to take views from."""
    import shards

    folder.mkdir(exist_ok=True)
    encoded = [shards.encode_grey(texture(600, 800, i)) for i in range(count)]
    shards.write_photos(folder / name, encoded, [str(i) for i in range(count)])


def image_names(template: str, count: int, validation: bool = False) -> list[str]:
    """Return names of images for training, or for validation."""
    names = (template.format(i) for i in itertools.count())
    return list(itertools.islice((n for n in names if (zlib.crc32(n.encode()) % 20 == 0) == validation), count))
