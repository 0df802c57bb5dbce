"""What the scripts share: where data is kept, lines for people, files that are there whole or not at all."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

DEFAULT_DATA = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kpmatch_training"


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """``--data FOLDER``."""
    parser.add_argument(
        "--data", type=Path, default=DEFAULT_DATA, help="teachers/, shards/, eval/ and more (default: %(default)s)"
    )


def log_line(text: str) -> None:
    """Print a line with the time."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def write_json(path: Path, content: Any) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
