"""Tests that the working memory of compiled networks is kept for the next image, but not longer than its owner."""

from __future__ import annotations

import gc
import threading
import weakref

import torch

from kpmatch_ros.runtime.working_memory import release, working_memory


def test_a_thread_reuses_its_memory_and_gets_more_on_request() -> None:
    first = working_memory(100)
    assert working_memory(50) is first
    more = working_memory(2 * len(first))
    assert len(more) >= 2 * len(first) and working_memory(100) is more


def test_threads_do_not_share_memory_and_free_it_when_they_end() -> None:
    found: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        own = working_memory(100)
        found.append(weakref.ref(own))
        assert working_memory(100) is own is not mine

    mine = working_memory(100)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    del thread
    gc.collect()
    assert len(found) == 1 and found[0]() is None


def test_released_memory_is_freed() -> None:
    kept = weakref.ref(working_memory(100))
    release()
    gc.collect()
    assert kept() is None
