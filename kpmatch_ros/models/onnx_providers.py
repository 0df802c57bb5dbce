"""ONNX Runtime's execution providers: selection of those that are available, and their options.

The options are documented at https://onnxruntime.ai/docs/execution-providers/. TensorRT and CUDA were never run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpmatch_ros.models.export import ExportError, Graph
from kpmatch_ros.weights import cache_folder

__all__ = ["ON_PROCESSOR", "PROVIDERS", "RequestedProviders", "in_range"]

PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
"""ONNX Runtime's names of the providers, by their names in the parameter ``providers``."""

# Minimum, optimum and maximum of each dynamic dimension: TensorRT builds an engine for them and accepts no others.
_RANGES = {"B": (1, 1, 2), "H": (64, 480, 1088), "W": (64, 640, 1920), "N0": (1, 1024, 4096), "N1": (1, 1024, 4096)}


@dataclass(frozen=True)
class RequestedProviders:
    """The requested providers.

    Attributes:
        names: keys of :data:`PROVIDERS`, in order of preference.
        half: let TensorRT compute in float16.
        threads: number of threads, for OpenVINO.
    """

    names: Sequence[str] = ("cpu",)
    half: bool = False
    threads: int = 1

    def start(self, make: Callable[[list[tuple[str, dict[str, Any]]]], Any], file: Path, graph: Graph) -> Any:
        """Create a session of a graph with the requested providers that are available.

        Args:
            make: creates an ONNX Runtime session, given for each provider ONNX Runtime's name and options.
            file: the graph's file.
            graph: the graph's inputs and outputs.

        Raises:
            ExportError: none of the requested providers is available.
        """
        import onnxruntime

        built_in = onnxruntime.get_available_providers()
        options = {name: self._options(name, file, graph) for name in self.names if PROVIDERS[name] in built_in}
        session = make([(PROVIDERS[name], values) for name, values in options.items()]) if options else None
        if session is None or not self.started(session):
            there = [name for name, theirs in PROVIDERS.items() if theirs in built_in and name not in options]
            why = f"could not start {' or '.join(options)}" if options else f"has no {' or '.join(self.names)}"
            raise ExportError(
                f"onnxruntime {onnxruntime.__version__} {why} (parameter providers); it has {', '.join(there)}"
            )
        return session

    def started(self, session: Any) -> list[str]:
        """The requested providers that a session of ONNX Runtime has, in order of preference."""
        running = session.get_providers()
        return [name for name in self.names if PROVIDERS[name] in running]

    def explain(self, started: Sequence[str]) -> str:
        """One sentence about the requested providers that are missing; empty if none is."""
        import onnxruntime

        missing = [name for name in self.names if name not in started]
        if not missing:
            return ""
        built_in = onnxruntime.get_available_providers()
        why = [f"{name} ({'did not start' if PROVIDERS[name] in built_in else 'not built in'})" for name in missing]
        instead = ", in float32, because only tensorrt supports float16" if self.half and "tensorrt" in missing else ""
        version = onnxruntime.__version__
        return f"onnxruntime {version} lacks the providers {', '.join(why)}; it runs on {started[0]}{instead}"

    def _options(self, name: str, file: Path, graph: Graph) -> dict[str, Any]:
        if name == "openvino":
            # Of the ways to select a device, this is the one that accepts only the graph's own number format.
            return {"device_type": "CPU", "precision": "FP32", "num_of_threads": str(self.threads)}
        if name != "tensorrt":
            return {}
        # TensorRT looks up a cached engine by the graph's names, not by its weights, so each graph needs a folder.
        folder = cache_folder() / "tensorrt" / hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        least, usual, largest = (_shapes(graph, i) for i in range(3))
        return {
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": str(folder),
            "trt_fp16_enable": self.half,
            "trt_profile_min_shapes": least,
            "trt_profile_opt_shapes": usual,
            "trt_profile_max_shapes": largest,
        }


ON_PROCESSOR = RequestedProviders()


def _shapes(graph: Graph, which: int) -> str:
    """The shapes of a graph's inputs in the format of TensorRT's optimisation profiles."""
    return ",".join(
        f"{port.name}:{'x'.join(str(_RANGES[size][which] if isinstance(size, str) else size) for size in port.shape)}"
        for port in graph.inputs
    )


def in_range(**numbers: int) -> bool:
    """Whether TensorRT's engines accept these sizes.

    Args:
        numbers: number of images B, their height H and width W, or number of pairs B, their keypoints N0 and N1.
    """
    return all(_RANGES[name][0] <= number <= _RANGES[name][2] for name, number in numbers.items())
