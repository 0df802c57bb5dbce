"""Memory that the compiled networks work in: asked of the system anew for each image, it would come page by page."""

from __future__ import annotations

import threading

import torch

__all__ = ["release", "working_memory"]

_kept: dict[int, torch.Tensor] = {}  # by thread


def working_memory(size: int) -> torch.Tensor:
    """So many bytes at least, kept for the thread that asks."""
    work = _kept.get(threading.get_ident())
    if work is None or len(work) < size:
        work = _kept[threading.get_ident()] = torch.empty(size, dtype=torch.uint8)
    return work


def release() -> None:
    """Keep nothing any longer. What is in use goes with its user."""
    _kept.clear()
