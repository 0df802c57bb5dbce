"""Tests that the content of a weights file is recognised by its tensors' names, in every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kpmatch_ros.models.checkpoint import NETWORKS, network_type, network_types
from kpmatch_ros.weights import WeightsError

DETECTORS = ("superpoint", "aliked", "disk", "xfeat")
MATCHERS = ("lightglue", "superglue")


@pytest.mark.parametrize(
    ("names", "held"),
    [
        (["convPa.weight"], ["superpoint"]),
        (["keypoint_decoder.conv_score_a.weight"], ["superpoint"]),
        (["log_assignment.0.final_proj.weight"], ["lightglue"]),
        (["match_assignment_layers.0.final_projection.weight"], ["lightglue"]),
        (["bin_score", "final_proj.weight"], ["superglue"]),
        (["desc_head.agg_weights"], ["aliked"]),
        (["descriptor_head.aggregation.weight"], ["aliked"]),
        (["unet.path_down.0.1.3.weight"], ["disk"]),
        (["unet.down.0.conv.weight"], ["disk"]),
        (["heatmap_head.2.weight"], ["xfeat"]),
        (["reliability_head.2.weight"], ["xfeat"]),
        (["extractor.convPa.weight", "matcher.log_assignment.0.final_proj.weight"], ["lightglue"]),
        (["keypoint_detector.keypoint_decoder.conv_score_a.weight", "bin_score"], ["superglue", "superpoint"]),
        (
            ["keypoint_detector.net.unet.path_down.0.1.3.weight", "match_assignment_layers.0.final_projection.weight"],
            ["lightglue", "disk"],
        ),
        (["other.convPa.weight", "convPa.weight.more", "conv.weight"], []),
    ],
)
def test_a_network_is_recognised_by_its_tensor_names(names: list[str], held: list[str]) -> None:
    assert network_types(reversed(names)) == held


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_network_in_a_file_is_recognised_and_other_kinds_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    tensors = {"unet.path_down.0.1.3.weight": torch.zeros(1), "unet.path_down.0.1.3.bias": torch.zeros(1)}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save({"extractor": tensors}, path)
    assert network_type(path, DETECTORS) == network_type(str(path), NETWORKS) == "disk"
    with pytest.raises(WeightsError, match=r"net\.\w+ holds a disk, not a lightglue or a superglue; check which"):
        network_type(path, MATCHERS)


def test_a_folder_with_matcher_and_detector_can_be_used_as_either(random_folder: Any) -> None:
    folder = random_folder()
    assert network_type(folder, MATCHERS) == "lightglue"
    assert network_type(folder, DETECTORS) == "superpoint"
    with pytest.raises(WeightsError, match="holds a lightglue and a superpoint, not a superglue"):
        network_type(folder, ["superglue"])


def test_a_registered_name_stands_for_a_single_network() -> None:
    assert network_type("superpoint-open", DETECTORS) == "superpoint"
    with pytest.raises(WeightsError, match="superpoint-open holds a superpoint, not a lightglue"):
        network_type("superpoint-open", MATCHERS)


def test_weights_without_a_known_network_are_refused_with_the_reason(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "net.pth")
    with pytest.raises(WeightsError, match=r"net\.pth holds none of the networks lightglue, .*, but fc\.weight"):
        network_type(tmp_path / "net.pth", DETECTORS)
    (tmp_path / "net.safetensors").write_bytes(b"<html>404</html>")
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        network_type(tmp_path / "net.safetensors", DETECTORS)
    (tmp_path / "folder").mkdir()
    with pytest.raises(WeightsError, match=r"folder is not a folder of weights: it has no model\.safetensors"):
        network_type(tmp_path / "folder", DETECTORS)
    with pytest.raises(WeightsError, match="no weights are called 'superpiont'"):
        network_type("superpiont", DETECTORS)
