"""Where the networks run and in which number format, and the memory that they leave behind."""

from __future__ import annotations

import contextlib
import ctypes

import psutil
import torch

from kpmatch_ros.parameters import ParameterError, Parameters
from kpmatch_ros.runtime import working_memory
from kpmatch_ros.runtime.processor import BFLOAT16, processor_features
from kpmatch_ros.shell import in_shell

__all__ = [
    "choose_device",
    "choose_precision",
    "choose_runtime",
    "format_name",
    "is_out_of_memory",
    "release_memory",
    "resident_memory",
    "set_threads",
    "trim_heap",
]


_threads: tuple[int, int] | None = None  # as many as PyTorch computed with before set_threads, and as many as it set


def set_threads(count: int) -> None:
    """Have PyTorch compute with so many threads of the processor; 0 is as many as it did before they were set here."""
    global _threads
    now = torch.get_num_threads()
    before = _threads[0] if _threads is not None and _threads[1] == now else now  # or else the program chose others
    if count > 0:
        torch.set_num_threads(count)
    elif before != now:
        torch.set_num_threads(before)
    _threads = (before, count) if count > 0 else None


def choose_device(name: str) -> torch.device:
    """The device a parameter names; ``auto`` is the GPU where there is one.

    Raises:
        ParameterError: when it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ParameterError(
            f"device is {name!r}, but PyTorch {torch.__version__} sees {torch.cuda.device_count()} GPUs; use cpu or "
            f"auto, or install a PyTorch built for this machine's CUDA ({in_shell('kpmatch doctor')})"
        )
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The number format a parameter names; ``auto`` is the fastest one that the device computes in hardware.

    Raises:
        ParameterError: when the device cannot compute in it.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if processor_features() & BFLOAT16 else torch.float32
    if name == "float16" and device.type == "cpu":
        raise ParameterError("precision is 'float16', but the device is the CPU; use float32, bfloat16 or auto")
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def choose_runtime(parameters: Parameters) -> tuple[torch.device, torch.dtype]:
    """Where PyTorch's networks run, and in which number format. With another backend they only feed it.

    Raises:
        ParameterError: when the device is not there, or cannot compute in the format.
    """
    if parameters.backend == "onnxruntime":
        return torch.device("cpu"), torch.float32
    device = choose_device(parameters.device)
    return device, choose_precision(parameters.precision, device)


def format_name(dtype: torch.dtype) -> str:
    """A number format as the parameter ``precision`` has it."""
    return str(dtype).removeprefix("torch.")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of a network says that the GPU's memory, or the machine's, was not enough."""
    # For the machine's, PyTorch raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "can't allocate memory" in str(error)


def release_memory() -> None:
    """Give what PyTorch, the C library and this package keep for later back to the GPU and to the system."""
    working_memory.release()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Give the C library's free memory back to the system, what lies between memory in use too; some 10 ms."""
    with contextlib.suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def resident_memory() -> int:
    """Bytes of this process that are in the machine's memory."""
    return int(psutil.Process().memory_info().rss)
