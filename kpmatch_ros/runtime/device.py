"""Device, number format and number of threads of the networks, and release of their memory."""

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


_threads: tuple[int, int] | None = None  # PyTorch's number of threads before set_threads, and the number that it set


def set_threads(count: int) -> None:
    """Set PyTorch's number of processor threads; 0 restores the number from before the first call."""
    global _threads
    now = torch.get_num_threads()
    before = _threads[0] if _threads is not None and _threads[1] == now else now  # keep a number set by the program
    if count > 0:
        torch.set_num_threads(count)
    elif before != now:
        torch.set_num_threads(before)
    _threads = (before, count) if count > 0 else None


def choose_device(name: str) -> torch.device:
    """Return the device that a parameter names; ``auto`` is the GPU if there is one.

    Raises:
        ParameterError: the device does not exist.
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
    """Return the number format that a parameter names; ``auto`` is the fastest one that the device has in hardware.

    Raises:
        ParameterError: the device cannot compute in this format.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if processor_features() & BFLOAT16 else torch.float32
    if name == "float16" and device.type == "cpu":
        raise ParameterError("precision is 'float16', but the device is the CPU; use float32, bfloat16 or auto")
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def choose_runtime(parameters: Parameters) -> tuple[torch.device, torch.dtype]:
    """Return device and number format of PyTorch's networks. With another backend, PyTorch only prepares its inputs.

    Raises:
        ParameterError: the device does not exist, or cannot compute in the format.
    """
    if parameters.backend == "onnxruntime":
        return torch.device("cpu"), torch.float32
    device = choose_device(parameters.device)
    return device, choose_precision(parameters.precision, device)


def format_name(dtype: torch.dtype) -> str:
    """The name of a number format in the parameter ``precision``."""
    return str(dtype).removeprefix("torch.")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of a network means that the GPU or the machine is out of memory."""
    # If the machine is out of memory, PyTorch raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "can't allocate memory" in str(error)


def release_memory() -> None:
    """Return cached memory of PyTorch, of the C library and of this package to the GPU and the operating system."""
    working_memory.release()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Return the C library's free memory to the operating system, even between blocks in use. It takes about 10 ms."""
    with contextlib.suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def resident_memory() -> int:
    """Resident memory of this process, bytes."""
    return int(psutil.Process().memory_info().rss)
