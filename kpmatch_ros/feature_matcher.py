"""One interface to the networks that extract and match features. Does not depend on ROS."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kpmatch_ros import weights
from kpmatch_ros.cuda_graphs import SIZES, CudaGraphs, batch_is_small
from kpmatch_ros.features import Features, Matches, on_device, to_numpy
from kpmatch_ros.imaging.colour import grey_levels, in_memory_order, resize, resized_size
from kpmatch_ros.imaging.images import ImageError
from kpmatch_ros.imaging.masks import fit, shrink_or_enlarge
from kpmatch_ros.models import ALIKED, DISK, LightGlue, NearestNeighbour, SuperGlue, SuperPoint, XFeat
from kpmatch_ros.models.assignment import Assignment, ImageFeatures
from kpmatch_ros.models.base import LARGEST_IMAGE
from kpmatch_ros.models.checkpoint import check_made_for, network_type
from kpmatch_ros.models.compiled import transforms
from kpmatch_ros.models.detections import Detections
from kpmatch_ros.models.export import ExportError
from kpmatch_ros.models.onnx_backend import OnnxBackend
from kpmatch_ros.models.onnx_providers import RequestedProviders
from kpmatch_ros.models.transformed import can_transform, transform_convolutions
from kpmatch_ros.parameters import ParameterError, Parameters
from kpmatch_ros.runtime.device import choose_runtime, set_threads
from kpmatch_ros.runtime.processor import has_amx

__all__ = ["FeatureMatcher"]

Extractor = SuperPoint | ALIKED | DISK | XFeat
Matcher = LightGlue | SuperGlue | NearestNeighbour

_EXTRACTORS: dict[str, type[Extractor]] = {kind.MODEL_TYPE: kind for kind in (SuperPoint, ALIKED, DISK, XFeat)}
_MATCHERS: dict[str, type[LightGlue | SuperGlue]] = {kind.MODEL_TYPE: kind for kind in (LightGlue, SuperGlue)}

# Parameters that are fixed once the networks are loaded.
_LOADED = ("profile", "extractor", "matcher", "backend", "providers", "device", "precision", "threads")

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as OpenCV and the authors of SuperPoint convert colour to grey


class FeatureMatcher:
    """Extracts and matches features.

    Several threads may share an instance. It can be copied and pickled. If PyTorch has computed with more than one
    thread, start processes with "spawn": after a fork, OpenMP's threads are missing and PyTorch waits for them forever.

    Args:
        parameters: a parameter set; the defaults if not given.
        options: single parameters by name (see :class:`kpmatch_ros.parameters.Parameters`), such as ``extractor``,
            ``matcher``, ``device``, ``precision`` and ``max_keypoints``.

    Attributes:
        parameters: the parameters in force.
        device: device of the networks.
        dtype: number format of the networks.
        luma: (3,) weights of red, green and blue for the conversion to grey, on the device.
        repeated_in_float32: number of images and pairs recomputed in float32 because half precision overflowed.
        graphs: CUDA graphs of the networks; None on a CPU. ``graphs.enabled = False`` turns them off. With CUDA
            graphs, ``width_confidence`` has no effect on images with up to 4,096 keypoints.
        onnx: the networks in ONNX Runtime; None with the backend torch.

    Raises:
        ParameterError: if a parameter value is not allowed, or the device or the backend is not available.
        WeightsError: if weights are missing or damaged, or the extractor and the matcher are not compatible.
    """

    def __init__(self, parameters: Parameters | None = None, **options: Any) -> None:
        self.parameters = Parameters.given(options) if parameters is None else parameters.replace(options)
        set_threads(self.parameters.threads)
        self.device, self.dtype = choose_runtime(self.parameters)
        self.luma = torch.tensor(_LUMA, dtype=torch.float32, device=self.device)
        self.graphs = CudaGraphs.for_device(self.device)
        self.extractor = self._load_extractor()
        self.matcher = self._load_matcher()
        self.onnx = self._load_onnx() if self.parameters.backend == "onnxruntime" else None
        followed = ("keypoint_threshold", "nms_radius", "border")
        self.repeated_in_float32 = 0
        self._published = {name: getattr(self.extractor, name) for name in followed}
        self.configure(self.parameters)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> FeatureMatcher:
        """Load extractor and matcher from one Hugging Face LightGlue or SuperGlue folder, or its name on the hub."""
        return cls(extractor=str(folder), matcher=str(folder), **options)

    def configure(self, parameters: Parameters) -> None:
        """Apply the parameters that may change at run time. Parameters that are fixed at loading keep their values."""
        loaded = {name: getattr(self.parameters, name) for name in _LOADED}
        if any(getattr(parameters, name) != value for name, value in loaded.items()):
            parameters = parameters.replace(loaded)
        self.parameters = parameters
        self.extractor.max_keypoints = parameters.max_keypoints
        for name, published in self._published.items():
            chosen = getattr(parameters, name)
            setattr(self.extractor, name, published if chosen < 0 else chosen)
        if isinstance(self.extractor, SuperPoint):
            self.extractor.subpixel = parameters.subpixel and self.extractor.config["subpixel"]
        self.matcher.filter_threshold = parameters.filter_threshold
        if isinstance(self.matcher, LightGlue):
            self.matcher.depth_confidence = parameters.depth_confidence
            self.matcher.width_confidence = parameters.width_confidence
        elif isinstance(self.matcher, NearestNeighbour):
            self.matcher.ratio_threshold = parameters.ratio_threshold

    @property
    def keypoint_resolution(self) -> float:
        """Spacing of the positions that keypoints can have, pixels of the network's input image; 0 without a grid."""
        return self.extractor.RESOLUTION

    def confidences(self) -> dict[str, str]:
        """Describe what ``depth_confidence`` and ``width_confidence`` do in this configuration, by parameter name."""
        found = {}
        for name in ("depth_confidence", "width_confidence"):
            value, above = getattr(self.parameters, name), 0
            if name == "width_confidence" and isinstance(self.matcher, LightGlue):
                recorded = self.graphs is not None and self.graphs.enabled
                above = max(self.matcher.prune_above, SIZES[-1] if recorded else 0)
            if not isinstance(self.matcher, LightGlue):
                found[name] = "no effect: the matcher is not LightGlue"
            elif self.onnx is not None:
                found[name] = "no effect: backend onnxruntime runs all layers with all points"
            elif value < 0:
                found[name] = "off"
            elif above >= self.parameters.max_keypoints:
                found[name] = f"no effect: up to {above} keypoints per image, keeping all points is faster"
            else:
                found[name] = f"{value:g}" + (f", for images with more than {above} keypoints" if above else "")
        return found

    def extract(self, image: np.ndarray | Tensor, mask: np.ndarray | Tensor | None = None) -> Features:
        """Detect the keypoints of an image and compute their descriptors.

        Args:
            image: uint8 grey (H, W) or RGB (H, W, 3).
            mask: uint8 or bool (H', W'), 0 where no keypoint may be. A mask of another size is scaled to the image. The
                parameters `mask` and `mask_right` apply in the front end only, not here.

        Raises:
            ValueError: if image or mask have a wrong shape or pixel type, or no pixels.
            ImageError: if the image has too many pixels. It is a subclass of ValueError.
            TypeError: if image or mask are not arrays.
        """
        return self.extract_batch([image], [mask])[0]

    @torch.inference_mode()
    def extract_batch(
        self, images: Sequence[np.ndarray | Tensor], masks: Sequence[np.ndarray | Tensor | None] | None = None
    ) -> list[Features]:
        """Extract features of several images. Images of the same size go through the network as one batch.

        Args:
            images: as for :meth:`extract`, of any sizes.
            masks: one mask per image, as for :meth:`extract`; None for no mask.

        Raises:
            ValueError: for the reasons of :meth:`extract`, or if the numbers of masks and images differ.
        """
        received = [_pixels(image) for image in images]
        masks = [None] * len(received) if masks is None else masks
        if len(masks) != len(received):
            raise ValueError(f"there are {len(received)} images and {len(masks)} masks")
        allowed = [_allowed(mask, pixels) for mask, pixels in zip(masks, received)]
        seen = [self.upload(self._resize(pixels)) for pixels in received]
        found: dict[int, Features] = {}
        for i, mask in enumerate(allowed):
            if mask is not None and not mask.any():
                found[i] = self._no_features(received[i])  # saves a network run that would detect nothing
        for shape in {image.shape for image in seen}:
            group = [i for i, image in enumerate(seen) if image.shape == shape and i not in found]
            if not group:
                continue
            inputs = [torch.cat([seen[i] for i in group]) if len(group) > 1 else seen[group[0]]]
            if any(allowed[i] is not None for i in group):
                inputs.append(torch.stack([self._upload_mask(allowed[i], shape[-2:]) for i in group]))
            detected = self._run(self.extractor, *inputs)
            counts = torch.stack([each.mask.sum() for each in detected]).tolist()  # the only wait for a GPU
            for i, count, each in zip(group, counts, detected):
                keypoints, scores, descriptors = (values[0] for values in each[:3])
                height, width = received[i].shape[:2]
                x, y = keypoints[:count].unbind(1)
                found[i] = Features(
                    keypoints=torch.stack(
                        [(x + 0.5) * (width / shape[-1]) - 0.5, (y + 0.5) * (height / shape[-2]) - 0.5], dim=1
                    ),
                    scores=scores[:count],
                    descriptors=descriptors[:count],
                    size=(width, height),
                )
        return [found[i] for i in range(len(seen))]

    @torch.inference_mode()
    def match(self, features0: Features, features1: Features) -> Matches:
        """Match the features of two images.

        Args:
            features0: features of the reference image, from :meth:`extract` (or their ``numpy()``).
            features1: features of the current image.

        Raises:
            ValueError: if the matcher takes descriptors of another size, or the arrays of the features do not fit.
            TypeError: if an argument is not of type Features.
        """
        return self.match_batch([features0], [features1])[0]

    @torch.inference_mode()
    def match_batch(self, features0: Sequence[Features], features1: Sequence[Features]) -> list[Matches]:
        """Match the features of several pairs of images.

        Args:
            features0: features of the reference images.
            features1: features of the current images, one for each reference image.

        Raises:
            ValueError: if the two numbers of images differ, or for the reasons of :meth:`match`.
        """
        if len(features0) != len(features1):
            raise ValueError(f"there are {len(features0)} reference images and {len(features1)} current ones")
        if not features0:
            return []
        if self.graphs is not None and self.graphs.enabled and len(features0) > 1 and batch_is_small(len(features0)):
            return [self.match(*pair) for pair in zip(features0, features1)]
        images = self._batch(features0), self._batch(features1)
        found = self._run(self.matcher, *images)
        return [_without_padding(pair, len(f0), len(f1)) for pair, f0, f1 in zip(found, features0, features1)]

    def warm_up(self, width: int = 640, height: int = 480) -> None:
        """Run every network once, so that the first frame takes no longer than later frames.

        With CUDA graphs (:attr:`graphs`), this records all graphs that frames of this size may need: for one image or
        a stereo pair, as the parameter `mode` says, and for all numbers of keypoints up to `max_keypoints`.

        Args:
            width: width of the images, pixels.
            height: height of the images, pixels. It is reduced if `resize` would make the images too large for the
                networks.
        """
        random = np.random.default_rng(0)
        while height > 1 and math.prod(resized_size(width, height, self.parameters.resize)) > LARGEST_IMAGE:
            height -= 1
        shape = (height, width, 3) if self.extractor.CHANNELS == 3 else (height, width)
        images = [random.integers(0, 256, shape, dtype=np.uint8)] * (2 if self.parameters.mode == "stereo" else 1)
        masked = self.parameters.mask or self.parameters.mask_right
        self.extract_batch(images, [np.ones((height, width), np.uint8)] * len(images) if masked else None)
        for count in self._counts_to_warm_up():
            descriptors = random.normal(size=(count, self.extractor.descriptor_size)).astype(np.float32)
            features = Features(
                keypoints=(random.random((count, 2)) * (width, height)).astype(np.float32),
                scores=np.ones(count, np.float32),
                descriptors=descriptors / np.linalg.norm(descriptors, axis=1, keepdims=True),
                size=(width, height),
            )
            self.match(features, features)
            if self.graphs is not None:
                self.graphs.record(self.matcher, self._batch([features]), self._batch([features]))

    def _counts_to_warm_up(self) -> list[int]:
        """Return the numbers of keypoints to warm up with: one per recorded size, or only one without CUDA graphs."""
        most = min(self.parameters.max_keypoints, SIZES[-1])
        if self.graphs is None or not self.graphs.enabled:
            return [min(SIZES[0], most)]
        # One less than each recorded size, because images usually have fewer keypoints and need padding. An exact fit
        # needs no padding and so has its own recording. It is likely only for max_keypoints.
        return sorted({most, *(min(size - 1, most) for size in SIZES)})

    def _run(self, network: Any, *inputs: Any) -> list[Any]:
        """Run a network on a batch, and return one result per item; in float32 where half precision overflowed."""
        if self.onnx is not None:
            found = self.onnx.run(network, *inputs)
        else:
            found = network(*inputs) if self.graphs is None else self.graphs.run(network, *inputs)
        each = [_item(found, i) for i in range(len(found[0]))]
        if isinstance(network, NearestNeighbour) or network.dtype == torch.float32:
            return each
        unsound = [i for i, sound in enumerate(found.are_sound().tolist()) if not sound]
        if unsound:
            self.repeated_in_float32 += len(unsound)
            # Convert a copy: CUDA graphs need the weights at their addresses, and another thread may be running the
            # network. The copy is not cached, because it would have to follow later settings, and overflows are rare.
            in_float32 = copy.deepcopy(network).float()
            for i in unsound:
                each[i] = in_float32(*(_item(given, i) for given in inputs))
        return each

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.matcher, LightGlue):  # the compiled layers may not run on the machine that loads the copy
            self.matcher.round_up = self._rounds_up(self.matcher)
            self.matcher.prune_above = _pruned_above(self.device, self.dtype, self.matcher.is_compiled)

    def _rounds_up(self, network: Any) -> bool:
        # In this case oneDNN compiles its matrix products for each number of points and caches them.
        by_onednn = not (isinstance(network, LightGlue) and network.is_compiled)
        return self.device.type == "cpu" and self.dtype == torch.bfloat16 and by_onednn

    def _to_precision(self, network: Any) -> Any:
        network.round_up = self._rounds_up(network)
        if not isinstance(network, (LightGlue, SuperGlue)):
            # The memory format in which convolutions run fastest, on CPUs and on tensor cores.
            network.to(memory_format=torch.channels_last)
            in_float32 = self.device.type == "cpu" and self.dtype == torch.float32
            if in_float32 and isinstance(network, SuperPoint) and _transform_pays():
                transform_convolutions(network)
        return network.to_precision(self.dtype)

    def _resize(self, pixels: np.ndarray) -> np.ndarray:
        """Return the image at the size of the extractor's input."""
        seen = resize(pixels, self.parameters.resize)
        height, width = seen.shape[:2]
        if height * width > LARGEST_IMAGE:
            raise ImageError(
                "size",
                f"an image of {width} x {height} pixels is too large for the networks, which take at most "
                f"{LARGEST_IMAGE / 1e6:.1f} million pixels: set the parameter resize to the longest side that you need",
            )
        return seen

    def upload(self, pixels: np.ndarray) -> Tensor:
        """Convert uint8 pixels to (1, C, H, W) in [0, 1] on the device. Colour is kept if the extractor uses it."""
        pixels, blue_first = in_memory_order(pixels)
        if self.device.type == "cpu" and pixels.ndim == 3 and self.extractor.CHANNELS == 1:
            return torch.from_numpy(grey_levels(pixels, blue_first))[None, None]
        if min(pixels.strides) < 0 or not pixels.flags.writeable:  # torch.from_numpy supports neither
            pixels = pixels.copy()
        image = self._send(torch.from_numpy(pixels)).float().div_(255)
        if image.ndim == 2:
            return image[None, None]
        if self.extractor.CHANNELS == 3:
            return (image.flip(-1) if blue_first else image).permute(2, 0, 1)[None]
        return (image @ (self.luma.flip(0) if blue_first else self.luma))[None, None]

    def _upload_mask(self, mask: np.ndarray | None, shape: Sequence[int]) -> Tensor:
        """Return a mask scaled to the extractor's input shape (H, W), on the device; all true without a mask."""
        height, width = shape
        if mask is None:
            return torch.ones(height, width, dtype=torch.bool, device=self.device)
        return self._send(torch.from_numpy(np.array(shrink_or_enlarge(mask, width, height))))

    def _send(self, host: Tensor) -> Tensor:
        """Copy a tensor from the host to the device, without waiting for the copy."""
        if self.device.type == "cuda":
            host = host.pin_memory()  # a copy from pageable memory would block
        return host.to(self.device, non_blocking=True)

    def _no_features(self, pixels: np.ndarray) -> Features:
        none = Detections.none(1, self.extractor.descriptor_size, self.device)
        size = (pixels.shape[1], pixels.shape[0])
        return Features(none.keypoints[0], none.scores[0], none.descriptors[0], size)

    def _batch(self, features: Sequence[Features]) -> ImageFeatures:
        """Stack the features of several images, padded to the same number. A single image has no mask."""
        expected = getattr(self.matcher, "input_dim", None)
        given = [on_device(item, self.device, expected, self.parameters.matcher) for item in features]

        def padded(tensors: list[Any]) -> Tensor:
            return tensors[0][None] if len(tensors) == 1 else pad_sequence(tensors, batch_first=True)

        mask = None
        if len(features) > 1:
            counts = self._send(torch.tensor([len(item) for item in features], device="cpu"))
            mask = torch.arange(max(map(len, features)), device=self.device) < counts[:, None]
        return ImageFeatures(
            keypoints=padded([item.keypoints for item in given]),
            descriptors=padded([item.descriptors for item in given]),
            size=self._send(torch.tensor([item.size for item in given], device="cpu")),
            mask=mask,
            scores=padded([item.scores for item in given]),
        )

    def _load_extractor(self) -> Extractor:
        name = self.parameters.extractor
        network = _EXTRACTORS[network_type(name, _EXTRACTORS)]
        if self.parameters.matcher != "nearest":
            check_made_for(self.parameters.matcher, name)  # before the user fetches weights that do not fit
        extractor = network.from_pretrained(name)
        if isinstance(extractor, SuperPoint) and self.device.type == "cpu":
            extractor.use_compiled(self.dtype)
        loaded: Extractor = self._to_precision(extractor.to(self.device))
        return loaded

    def _load_matcher(self) -> Matcher:
        name, extractor = self.parameters.matcher, self.parameters.extractor
        if name == "nearest":
            return NearestNeighbour()
        matcher = _MATCHERS[network_type(name, _MATCHERS)].from_pretrained(name)
        if matcher.input_dim != self.extractor.descriptor_size:
            raise weights.WeightsError(
                f"the matcher {name} takes descriptors of size {matcher.input_dim}, but {extractor} makes descriptors "
                f"of size {self.extractor.descriptor_size}: they do not belong together"
            )
        if isinstance(matcher, LightGlue):
            matcher.fuse()
            if self.device.type != "cpu":
                matcher.run_ahead = True
                matcher.match_as_one_batch()
            if has_amx():
                matcher.leave_attention_to_pytorch()
            if self.device.type == "cpu":
                matcher.use_compiled(self.dtype)
            matcher.prune_above = _pruned_above(self.device, self.dtype, matcher.is_compiled)
        loaded: Matcher = self._to_precision(matcher.to(self.device))
        return loaded

    def _load_onnx(self) -> OnnxBackend:
        names = dict.fromkeys(self.parameters.providers.replace(" ", "").split(","))
        requested = RequestedProviders(
            list(names), half=self.parameters.precision == "float16", threads=torch.get_num_threads()
        )
        try:
            backend = OnnxBackend(self.extractor, self.matcher, requested)
        except ExportError as error:
            raise ParameterError(f"backend is 'onnxruntime', but {error}; or use the backend torch") from error
        if backend.note:
            warnings.warn(backend.note, RuntimeWarning, stacklevel=3)
        return backend


def _transform_pays() -> bool:
    """Whether NNPACK's convolutions are the fastest ones here. Compiled ones are faster, as are oneDNN's with AMX.

    docs/performance.md has the measurements.
    """
    return can_transform() and not (transforms() or has_amx())


def _pruned_above(device: torch.device, dtype: torch.dtype, compiled: bool) -> int:
    """Return the number of keypoints per image above which pruning saves more time than it costs.

    docs/performance.md has the measurements. The value for a GPU is cvg/LightGlue's pruning_keypoint_thresholds with
    flash attention. The same value holds for PyTorch's bfloat16 with AMX: its products are so fast that pruning gained
    nothing at 1024 keypoints.
    """
    if compiled and dtype == torch.bfloat16:
        return 128
    if device.type != "cpu" or (dtype == torch.bfloat16 and has_amx()):
        return 1536
    return 256 if dtype == torch.bfloat16 else 0


def _item(batch: Any, i: int) -> Any:
    """Return item i of a batch (a tensor, or a named tuple of tensors) as a batch of one."""
    if isinstance(batch, Tensor):
        return batch[i : i + 1]
    return type(batch)(*(None if values is None else values[i : i + 1] for values in batch))


def _without_padding(pair: Assignment, count0: int, count1: int) -> Matches:
    """Return the matches of a pair without its padding. Without keypoints in an image, the number of layers is 0."""
    if count0 == 0 or count1 == 0:
        assignment = Assignment.empty(1, count0, count1, pair.layers.device)
    else:
        assignment = pair.first(count0, count1)
    index0 = (assignment.matches0[0] >= 0).nonzero()[:, 0]
    return Matches(
        indices=torch.stack([index0, assignment.matches0[0, index0]], dim=1),
        scores=assignment.scores0[0, index0],
        layers=int(assignment.layers[0]),
        assignment=assignment,
    )


def _allowed(mask: np.ndarray | Tensor | None, pixels: np.ndarray) -> np.ndarray | None:
    """Return where in an image keypoints may be, (H, W) bool; None for everywhere."""
    return None if mask is None else fit(_array(mask, "mask"), pixels.shape[1], pixels.shape[0])


def _pixels(image: np.ndarray | Tensor) -> np.ndarray:
    pixels = _array(image, "image")
    is_image = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    if pixels.dtype != np.uint8 or not is_image or pixels.size == 0:
        raise ValueError(
            f"the image is {pixels.dtype} of shape {pixels.shape}; it must be uint8 and (H, W) grey or (H, W, 3) "
            "RGB, with at least one pixel"
        )
    return pixels


def _array(given: Any, what: str) -> np.ndarray:
    if not isinstance(given, (np.ndarray, Tensor)):
        raise TypeError(
            f"the {what} is a {type(given).__name__}; it must be a NumPy array or a torch tensor. numpy.asarray("
            f"{what}.convert({'RGB' if what == 'image' else 'L'!r})) makes one of a PIL image"
        )
    return to_numpy(given)
