"""Weights known by name: their licences, sources and files. Nothing here imports PyTorch."""

from kpmatch_ros.weights.registry import (
    REGISTRY,
    Weights,
    WeightsError,
    cache_folder,
    expected_hash,
    fetch,
    file_hash,
    find,
    matchers_for,
    resolve,
    verify,
)
from kpmatch_ros.weights.sources import Hub, Packaged, Wheel

__all__ = [
    "REGISTRY",
    "Hub",
    "Packaged",
    "Weights",
    "WeightsError",
    "Wheel",
    "cache_folder",
    "expected_hash",
    "fetch",
    "file_hash",
    "find",
    "matchers_for",
    "resolve",
    "verify",
]
