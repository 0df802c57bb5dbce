"""Working memory of the compiled networks.

It is kept between images, because the operating system supplies newly allocated memory page by page.
"""

from __future__ import annotations

import threading
import weakref

import torch

__all__ = ["release", "working_memory"]

# A thread's memory is released when the thread ends.
_kept: weakref.WeakKeyDictionary[threading.Thread, torch.Tensor] = weakref.WeakKeyDictionary()


def working_memory(size: int) -> torch.Tensor:
    """Return at least ``size`` bytes, which are kept for the calling thread."""
    thread = threading.current_thread()
    work = _kept.get(thread)
    if work is None or len(work) < size:
        work = _kept[thread] = torch.empty(size, dtype=torch.uint8, device="cpu")
    return work


def release() -> None:
    """Release all memory that is kept. Memory in use is freed when its user releases it."""
    _kept.clear()
