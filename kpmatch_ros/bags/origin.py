"""Records in a bag's metadata.yaml how the bag was made: from which data, and with which software and settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

import kpmatch_ros
from kpmatch_ros.bags.cameras import CameraTopics
from kpmatch_ros.encodable import encodable
from kpmatch_ros.feature_matcher import FeatureMatcher
from kpmatch_ros.parameters import Parameters
from kpmatch_ros.runtime.device import format_name
from kpmatch_ros.source_files import files_read, registered_weights
from kpmatch_ros.weights import file_hash, hash_in_use

__all__ = ["origin"]


def origin(
    bag: Path, cameras: tuple[CameraTopics, ...], parameters: Parameters, matcher: FeatureMatcher
) -> dict[str, str]:
    """Notes for a bag's custom_data, with which the bag can be reproduced years later.

    Args:
        bag: the bag that was read.
        cameras: the cameras whose images were read.
        parameters: all parameters of the replay.
        matcher: the networks, for their device and precision.
    """
    hashes = {item.name: hash_in_use(item) for item in registered_weights(parameters)}
    hashes |= {encodable(str(file)): file_hash(file) for file in files_read(parameters) if file.is_file()}
    return {
        "made by": f"kpmatch_ros {kpmatch_ros.__version__}",
        "made from": encodable(bag.resolve().name),
        "topics": json.dumps([dataclasses.asdict(camera) for camera in cameras]),
        "parameters": json.dumps(dataclasses.asdict(parameters)),
        "sha256": json.dumps(hashes),
        "ran on": f"{matcher.device} in {format_name(matcher.dtype)} with {torch.get_num_threads()} threads",
    }
