"""Registered weights: their licences, sources and files. These modules do not import PyTorch."""

from kpmatch_ros.weights.files import (
    Presence,
    expected_hash,
    fetch,
    file_hash,
    hash_in_use,
    presence,
    resolve,
    verify,
)
from kpmatch_ros.weights.registry import (
    REGISTRY,
    Weights,
    WeightsError,
    cache_folder,
    check_pair,
    find,
    matchers_for,
)
from kpmatch_ros.weights.sources import Hub, Packaged, Wheel

__all__ = [
    "REGISTRY",
    "Hub",
    "Packaged",
    "Presence",
    "Weights",
    "WeightsError",
    "Wheel",
    "cache_folder",
    "check_pair",
    "expected_hash",
    "fetch",
    "file_hash",
    "find",
    "hash_in_use",
    "matchers_for",
    "presence",
    "resolve",
    "verify",
]
