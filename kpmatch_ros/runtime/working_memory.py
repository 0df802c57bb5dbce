"""Memory that the compiled networks work in: asked of the system anew for each image, it would come page by page."""

from __future__ import annotations

import threading
import weakref

import torch

__all__ = ["release", "working_memory"]

_kept: weakref.WeakKeyDictionary[threading.Thread, torch.Tensor] = weakref.WeakKeyDictionary()  # it ends with a thread


def working_memory(size: int) -> torch.Tensor:
    """So many bytes at least, kept for the thread that asks."""
    thread = threading.current_thread()
    work = _kept.get(thread)
    if work is None or len(work) < size:
        work = _kept[thread] = torch.empty(size, dtype=torch.uint8, device="cpu")
    return work


def release() -> None:
    """Keep nothing any longer. What is in use goes with its user."""
    _kept.clear()
