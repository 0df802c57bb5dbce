"""Converts weights from one format to another, and describes a file of weights."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kpmatch_ros import weights
from kpmatch_ros.models import ALIKED, DISK, LightGlue, SuperGlue, SuperPoint, XFeat
from kpmatch_ros.models.checkpoint import (
    CONFIG_KEY,
    MATCHERS,
    Checkpoint,
    build_from,
    check_made_for,
    network_types,
    no_network,
    prepared,
    read_source,
)
from kpmatch_ros.weights import WeightsError

__all__ = ["Network", "convert", "describe"]

_KINDS: dict[str, Any] = {kind.MODEL_TYPE: kind for kind in (LightGlue, SuperGlue, SuperPoint, ALIKED, DISK, XFeat)}
# `transformers`' names of the networks that it supports.
_ARCHITECTURES = {
    "lightglue": "LightGlueForKeypointMatching",
    "superglue": "SuperGlueForKeypointMatching",
    "superpoint": "SuperPointForKeypointDetection",
}
_DETECTOR = "keypoint_detector."


@dataclass(frozen=True)
class Network:
    """One network found in a file or folder of weights.

    Attributes:
        model: one of :data:`kpmatch_ros.models.checkpoint.NETWORKS`.
        config: the complete configuration of the network.
        tensors: the tensors by the names of this package and of `transformers`, in the precision of the file.
    """

    model: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def parameters(self) -> int:
        """Number of learned parameters."""
        return sum(tensor.numel() for tensor in self.tensors.values() if tensor.is_floating_point())

    @property
    def precision(self) -> str:
        """The number formats of the tensors, such as ``float16``."""
        formats = {tensor.dtype for tensor in self.tensors.values() if tensor.is_floating_point()}
        return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in formats))

    @property
    def descriptor_size(self) -> int:
        """Size of the descriptors that a matcher takes or an extractor computes."""
        names = {"lightglue": "input_dim", "superglue": "hidden_size", "superpoint": "descriptor_decoder_dim"}
        return self.config[names.get(self.model, "descriptor_dim")]


def describe(source: str | Path) -> list[Network]:
    """Return the networks in a folder or file, or under a registered name; a matcher comes before its detector.

    Raises:
        WeightsError: the weights hold no network that this package knows, or they are damaged.
    """
    read = read_source(source)
    registered = weights.REGISTRY.get(str(source))
    if registered is not None:
        return [_network(model, read) for model in registered.networks]
    found = [_network(model, read) for model in network_types(read.tensors)]
    if not found:
        raise no_network(read.source, read.tensors)
    return found


def _network(model: str, read: Checkpoint) -> Network:
    # Building the network checks everything: names, shapes, finite values, and the configuration.
    built = build_from(_KINDS[model], read, {})
    stored = prepared(_KINDS[model], read).tensors
    return Network(model, built.config, {name: stored[name] for name in built.state_dict()})


def convert(source: str | Path, target: Path, extractor: str | Path | None = None) -> list[Network]:
    """Write weights in another format, in the same precision.

    Args:
        source: a registered name, a Hugging Face folder, a ``.safetensors`` or an authors' ``.pth`` file.
        target: ``*.safetensors`` for a single network, with its configuration in the header. Any other name becomes a
            Hugging Face folder, which `transformers` can also load if it has the network.
        extractor: the extractor that a matcher was made for, if the source does not hold it: a matcher's Hugging Face
            folder holds both. The default for a registered matcher is its registered extractor.

    Returns:
        the networks written.

    Raises:
        WeightsError: the source cannot be read, the target exists, or the target's format cannot hold the source.
    """
    if os.path.lexists(target):  # also a broken link
        raise WeightsError(f"{target} already exists; remove it or choose another name")
    if target.suffix in (".pth", ".pt", ".bin", ".onnx"):
        raise WeightsError(f"{target}: weights are written to a folder, or to a file whose name ends in .safetensors")
    single_file = target.suffix == ".safetensors"
    networks = describe(source)
    registered = weights.REGISTRY.get(str(source))
    if extractor is None and registered is not None and not single_file and len(networks) == 1:
        extractor = registered.extractor or None
    if extractor is not None:
        if networks[0].model not in MATCHERS:
            raise WeightsError(f"{source} is a {networks[0].model}; only a matcher can be combined with an extractor")
        check_made_for(source, extractor)
        networks = [networks[0], *(network for network in describe(extractor) if network.model not in MATCHERS)]
        if len(networks) == 1:
            raise WeightsError(f"{extractor} holds no extractor to combine with {source}")
    metadata = {"format": "pt"}
    if single_file:
        if len(networks) > 1:
            names = " and ".join(network.model for network in networks)
            raise WeightsError(f"{source} holds {names}, but a .safetensors file only one network: convert to a folder")
        config, tensors = _config(networks[0]), networks[0].tensors
        metadata[CONFIG_KEY] = json.dumps(config, sort_keys=True)
    else:
        config, tensors = _folder_content(source, networks)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Everything is written and read back in a folder beside the target, so that it appears complete or not at all.
    workplace = Path(tempfile.mkdtemp(dir=target.parent, prefix=".kpmatch."))
    try:
        content = workplace / target.name
        folder = workplace if single_file else content
        folder.mkdir(exist_ok=True)
        # Two projections of an authors' file can share memory, which safetensors rejects.
        copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        file = content if single_file else folder / "model.safetensors"
        save_file(copies, file, metadata=metadata)
        file.chmod(0o644)  # safetensors makes it readable only for this user
        if not single_file:
            (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        written = describe(content)
        for before, after in zip(networks, written, strict=True):
            same = all(torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())
            if not same or after.config != before.config:
                raise WeightsError(f"{target} does not read back as it was written: check the disk")
        os.rename(content, target)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return written


def _config(network: Network) -> dict[str, Any]:
    return {**{key: value for key, value in network.config.items() if value is not None}, "model_type": network.model}


def _folder_content(source: str | Path, networks: list[Network]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config.json and the tensors of a Hugging Face folder."""
    configs = [_config(network) for network in networks]
    precisions = {network.precision for network in networks}
    head = {**configs[0], "dtype": precisions.pop() if precisions in ({"float16"}, {"bfloat16"}) else "float32"}
    if networks[0].model in _ARCHITECTURES:
        head["architectures"] = [_ARCHITECTURES[networks[0].model]]
    if networks[0].model not in MATCHERS:
        return head, networks[0].tensors
    if len(networks) == 1:
        raise WeightsError(
            f"{source} holds a matcher without the extractor that it was made for, and a Hugging Face folder holds "
            "both: name the extractor with --extractor"
        )
    matcher, detector = networks
    if matcher.descriptor_size != detector.descriptor_size:
        raise WeightsError(
            f"the {matcher.model} takes descriptors of size {matcher.descriptor_size}, but the {detector.model} "
            f"computes descriptors of size {detector.descriptor_size}: they do not belong together"
        )
    if detector.model == "superpoint":
        head.pop("input_dim", None)  # it follows from SuperPoint's configuration, and `transformers` does not know it
    tensors = {**matcher.tensors, **{_DETECTOR + name: tensor for name, tensor in detector.tensors.items()}}
    return {**head, "keypoint_detector_config": configs[1]}, tensors
