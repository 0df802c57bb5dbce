"""Tests of SuperGlue's weights: also from its authors' files, and refused if they do not fit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kpmatch_ros.models import LightGlue, SuperGlue
from kpmatch_ros.weights import WeightsError


def authors_file(tensors: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Rename and rearrange a Hugging Face SuperGlue's tensors as in Magic Leap's code."""

    def spread(tensor: Tensor, dim: int) -> Tensor:
        """Move channel c of head h from index h * size + c to index c * heads + h."""
        size = tensor.shape[dim] // heads
        return tensor.index_select(dim, torch.tensor([h * size + c for c in range(size) for h in range(heads)]))

    result = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if name.startswith("keypoint_detector."):
            continue
        if parts[0] == "keypoint_encoder" or parts[3:4] == ["mlp"]:
            block = "kenc.encoder" if parts[0] == "keypoint_encoder" else f"gnn.layers.{parts[2]}.mlp"
            rest = parts[2:] if parts[0] == "keypoint_encoder" else parts[4:]
            index = 3 * int(rest[0]) + (rest[1] == "batch_norm")
            name = f"{block}.{index}.{rest[-1]}"
        elif parts[0] == "gnn":
            if parts[4] == "self":
                index = ["query", "key", "value"].index(parts[5])
                name, tensor = f"gnn.layers.{parts[2]}.attn.proj.{index}.{parts[-1]}", spread(tensor, 0)
            else:
                name = f"gnn.layers.{parts[2]}.attn.merge.{parts[-1]}"
                tensor = spread(tensor, 1) if parts[-1] == "weight" else tensor
        elif parts[0] == "final_projection":
            name = f"final_proj.{parts[-1]}"
        result[name] = tensor[..., None] if tensor.ndim == 2 else tensor  # convolutions of width 1
    return result


def test_the_authors_file_gives_the_same_network(superglue: Callable[..., SuperGlue], tmp_path: Path) -> None:
    ours = superglue(4)
    torch.save(authors_file(ours.state_dict(), heads=4), tmp_path / "superglue_indoor.pth")
    found = SuperGlue.from_pretrained(tmp_path / "superglue_indoor.pth")
    assert found.config == {**ours.config, "matching_threshold": 0.2}
    for name, tensor in ours.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor.float()), name
    options = SuperGlue.from_pretrained(tmp_path / "superglue_indoor.pth", sinkhorn_iterations=20)
    assert options.sinkhorn_iterations == 20 and options.filter_threshold == 0.2


def test_attention_gives_the_result_of_the_authors_channel_order(superglue: Callable[..., SuperGlue]) -> None:
    ours = superglue(4)
    tensors = authors_file(ours.state_dict(), heads=4)
    x, source = torch.randn(2, 64, 7), torch.randn(2, 64, 9)

    def layer(name: str, inputs: Tensor) -> Tensor:
        name = f"gnn.layers.0.attn.{name}"
        return nn.functional.conv1d(inputs, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    query, key, value = (
        layer(f"proj.{i}", inputs).unflatten(1, (-1, 4)) for i, inputs in enumerate((x, source, source))
    )
    weights = (torch.einsum("bchn,bchm->bhnm", query, key) / math.sqrt(16)).softmax(dim=-1)
    expected = layer("merge", torch.einsum("bhnm,bchm->bchn", weights, value).flatten(1, 2))
    found = ours.gnn.layers[0].attention(x.mT, source.mT, None).mT  # type: ignore[operator,union-attr]
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.fixture
def folder(random_folder: Callable[..., Path]) -> Path:
    """A Hugging Face folder with weights."""
    return random_folder(superglue={})


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rotary_value": True}, "rotary_value"),
        ({"gnn_layers_types": ["self", "both"]}, "both"),
        ({"num_attention_heads": 5}, "64 channels into 5 heads"),
        ({"hidden_size": 32}, "does not fit superglue"),
        ({"gnn_layers_types": ["self"] * 3}, "does not fit superglue"),
        ({"model_type": "lightglue"}, "holds a lightglue, not a superglue"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_refused(folder: Path, changes: dict[str, Any], complaint: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(WeightsError, match=complaint):
        SuperGlue.from_pretrained(folder)


def test_a_file_that_lacks_tensors_is_refused(
    folder: Path, superglue: Callable[..., SuperGlue], tmp_path: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["bin_score"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match="bin_score is missing"):
        SuperGlue.from_pretrained(folder)
    authors = authors_file(superglue(4).state_dict(), heads=4)
    del authors["kenc.encoder.0.weight"]
    torch.save(authors, tmp_path / "superglue.pth")
    with pytest.raises(WeightsError, match=r"superglue\.pth"):
        SuperGlue.from_pretrained(tmp_path / "superglue.pth")


def test_the_weights_of_another_network_are_refused(folder: Path, random_folder: Callable[..., Path]) -> None:
    with pytest.raises(WeightsError, match="lightglue"):
        SuperGlue.from_pretrained(random_folder())
    with pytest.raises(WeightsError, match="superglue"):
        LightGlue.from_pretrained(folder)
