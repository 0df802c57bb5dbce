"""The processor: its name, and which of its instructions the networks may use."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

__all__ = ["BFLOAT16", "has_amx", "hidden_features", "processor_features", "processor_name"]

BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""With any of these instruction sets a processor computes in bfloat16."""

# How the names of those begin that PyTorch does without where it goes no further than this.
_BEYOND = {"AVX2": ("avx512", "amx"), "DEFAULT": ("avx", "amx")}


def processor_features() -> frozenset[str]:
    """The instruction sets that may be used, by Linux's names, such as avx512_bf16; none on another system.

    They are those that PyTorch uses. The environment variable ``ATEN_CPU_CAPABILITY`` limits them.
    """
    return _all_features() - hidden_features()


def hidden_features() -> frozenset[str]:
    """The instruction sets that the processor has and PyTorch does without, named as in :func:`processor_features`."""
    beyond = _BEYOND.get(torch.backends.cpu.get_cpu_capability(), ())
    return frozenset(name for name in _all_features() if name.startswith(beyond))


def has_amx() -> bool:
    """Whether matrices may be multiplied in bfloat16 by tiles (AMX), several times as fast as by vectors."""
    return "amx_bf16" in processor_features()


def processor_name() -> str:
    """What the processor calls itself."""
    return _described("model name") or platform.processor() or platform.machine()


@cache
def _all_features() -> frozenset[str]:
    return frozenset(_described("flags", "Features").split())


def _described(*keys: str) -> str:
    """The first value of one of these keys in Linux's description of the processor; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    values = (value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() in keys)
    return next(values, "")
