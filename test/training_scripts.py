"""Makes the scripts of training/ importable: to be imported before them. Without the folder, tests are skipped."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TRAINING = Path(__file__).resolve().parents[1] / "training"
if not TRAINING.is_dir():
    pytest.skip("training/ is not installed with the package", allow_module_level=True)
sys.path.insert(0, str(TRAINING))
