"""Helpers of the training scripts: data folder, timestamped output, atomic writing of files."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

DEFAULT_DATA = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kpmatch_training"


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--data FOLDER``."""
    parser.add_argument(
        "--data", type=Path, default=DEFAULT_DATA, help="teachers/, shards/, eval/ and more (default: %(default)s)"
    )


def log_line(text: str) -> None:
    """Print a line with the current time."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically: the file is complete or does not exist."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
