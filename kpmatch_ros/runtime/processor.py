"""The processor: its name, and the instruction sets that the networks may use."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

__all__ = ["BFLOAT16", "disabled_features", "has_amx", "processor_features", "processor_name"]

BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""A processor with any of these instruction sets computes in bfloat16."""

# Prefixes of the instruction sets that PyTorch does not use, by its processor capability.
_BEYOND = {"AVX2": ("avx512", "amx"), "DEFAULT": ("avx", "amx")}


def processor_features() -> frozenset[str]:
    """The instruction sets that may be used, by Linux's names, for example avx512_bf16; none on another system.

    They are those that PyTorch uses. The environment variable ``ATEN_CPU_CAPABILITY`` limits them.
    """
    return _all_features() - disabled_features()


def disabled_features() -> frozenset[str]:
    """The instruction sets that the processor has but PyTorch does not use, named as in :func:`processor_features`."""
    beyond = _BEYOND.get(torch.backends.cpu.get_cpu_capability(), ())
    return frozenset(name for name in _all_features() if name.startswith(beyond))


def has_amx() -> bool:
    """Whether bfloat16 matrices may be multiplied with tiles (AMX), several times as fast as with vectors."""
    return "amx_bf16" in processor_features()


def processor_name() -> str:
    """The processor's model name."""
    return _described("model name") or platform.processor() or platform.machine()


@cache
def _all_features() -> frozenset[str]:
    return frozenset(_described("flags", "Features").split())


def _described(*keys: str) -> str:
    """The first value of one of these keys in /proc/cpuinfo; empty if there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    values = (value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() in keys)
    return next(values, "")
