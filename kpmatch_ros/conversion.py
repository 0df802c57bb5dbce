"""Weights from one format to another, and what a file of weights holds."""
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
from kpmatch_ros.models import LightGlue, SuperPoint
from kpmatch_ros.models.checkpoint import Checkpoint, build, network_types, no_network, read_checkpoint
from kpmatch_ros.weights import WeightsError

__all__ = ["Network", "convert", "describe"]

_ARCHITECTURES = {"superpoint": "SuperPointForKeypointDetection", "lightglue": "LightGlueForKeypointMatching"}
_DETECTOR = "keypoint_detector."


@dataclass(frozen=True)
class Network:
    """One network found in a file or folder of weights.

    Attributes:
        model: ``superpoint`` or ``lightglue``.
        config: everything it was built with.
        tensors: by the names of this package and of `transformers`, as stored: in the precision of the file.
    """

    model: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def parameters(self) -> int:
        """How many numbers were learned."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def precision(self) -> str:
        """The number formats of the tensors, such as ``float16``."""
        return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values()}))


def describe(source: str | Path) -> list[Network]:
    """The networks in a folder, file, or under a registered name; a matcher comes before its detector.

    Raises:
        WeightsError: when there are none that this package knows, or they are damaged.
    """
    read = read_checkpoint(weights.resolve(source))
    registered = weights.REGISTRY.get(str(source))
    if registered is not None:
        return [_network(registered.model, source, read)]
    found = [_network(model, source, read) for model in network_types(read.tensors)]
    if not found:
        raise no_network(read.source, read.tensors)
    return found


def _network(model: str, source: str | Path, read: Checkpoint) -> Network:
    kind: type[LightGlue | SuperPoint] = LightGlue if model == "lightglue" else SuperPoint
    # Building it checks everything: names, shapes, finite values, and that the configuration is understood.
    built: LightGlue | SuperPoint = build(kind, weights.resolve(source), {})
    stored = kind.prepare(read).tensors
    return Network(model, built.config, {name: stored[name] for name in built.state_dict()})


def convert(source: str | Path, target: Path, extractor: str | Path | None = None) -> list[Network]:
    """Write weights in another format; the precision stays.

    Args:
        source: a registered name, a Hugging Face folder, a ``.safetensors`` or an authors' ``.pth`` file.
        target: ``*.safetensors`` for the tensors of one network alone; anything else becomes a Hugging Face folder,
            which `transformers` loads too.
        extractor: for a LightGlue, the SuperPoint that it was made for, where the source does not hold it: a Hugging
            Face folder holds both. A registered LightGlue brings its own.

    Returns:
        the networks written.

    Raises:
        WeightsError: when the source is no good, the target exists, or it cannot hold the source.
    """
    if target.exists():
        raise WeightsError(f"{target} is there already; remove it or choose another name")
    single_file = target.suffix == ".safetensors"
    networks = describe(source)
    registered = weights.REGISTRY.get(str(source))
    if extractor is None and registered is not None and not single_file:
        extractor = registered.extractor or None
    if extractor is not None:
        if networks[0].model != "lightglue":
            raise WeightsError(f"{source} is a {networks[0].model}; only a lightglue has an extractor beside it")
        networks = [networks[0], *(network for network in describe(extractor) if network.model == "superpoint")]
        if len(networks) == 1:
            raise WeightsError(f"{extractor} holds no superpoint, so it is no extractor for {source}")
    if single_file:
        _check_fits_file(source, networks)
        config: dict[str, Any] = {}
        tensors = networks[0].tensors
    else:
        config, tensors = _folder_content(source, networks)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Everything is written and read back beside the target, so that it appears whole or not at all.
    workplace = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        content = workplace / target.name
        folder = workplace if single_file else content
        folder.mkdir(exist_ok=True)
        # Two projections of an authors' file can share memory, which the format refuses.
        copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        file = content if single_file else folder / "model.safetensors"
        save_file(copies, file, metadata={"format": "pt"})
        file.chmod(0o644)  # it is written for this user alone
        if not single_file:
            (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        written = describe(content)
        for before, after in zip(networks, written, strict=True):
            if any(not torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items()):
                raise WeightsError(f"{target} does not read back as it was written: check the disk")
        os.rename(content, target)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return written


def _check_fits_file(source: str | Path, networks: list[Network]) -> None:
    if len(networks) > 1:
        names = " and ".join(network.model for network in networks)
        raise WeightsError(f"{source} holds {names}, a .safetensors file only one network: convert to a folder")
    defaults = (LightGlue if networks[0].model == "lightglue" else SuperPoint).DEFAULTS
    lost = [f"{key} {value}" for key, value in networks[0].config.items() if value not in (defaults[key], None)]
    if lost:
        raise WeightsError(
            f"a .safetensors file holds no configuration, and that of {source} is not the usual one "
            f"({', '.join(lost)}): convert to a folder"
        )


def _folder_content(source: str | Path, networks: list[Network]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors of a Hugging Face folder."""
    configs = [
        {
            **{key: value for key, value in network.config.items() if value is not None and key != "input_dim"},
            "model_type": network.model,
        }
        for network in networks
    ]
    precisions = {network.precision for network in networks}
    head = {
        **configs[0],
        "architectures": [_ARCHITECTURES[networks[0].model]],
        "dtype": precisions.pop() if precisions in ({"float16"}, {"bfloat16"}) else "float32",
    }
    if networks[0].model == "superpoint":
        return head, networks[0].tensors
    if len(networks) == 1:
        raise WeightsError(
            f"{source} holds a LightGlue without the SuperPoint that it was made for, and a Hugging Face folder holds "
            "both: name it with --extractor"
        )
    takes, makes = networks[0].config["input_dim"], networks[1].config["descriptor_decoder_dim"]
    if takes != makes:
        raise WeightsError(
            f"the LightGlue takes descriptors of size {takes}, the SuperPoint makes descriptors of size {makes}: they "
            "do not belong together"
        )
    tensors = {**networks[0].tensors, **{_DETECTOR + name: tensor for name, tensor in networks[1].tensors.items()}}
    return {**head, "keypoint_detector_config": configs[1]}, tensors
