"""Reading of weights from disk, without ever running code from a file."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from kpmatch_ros import weights

__all__ = [
    "MATCHERS",
    "NETWORKS",
    "Checkpoint",
    "build",
    "build_from",
    "check_made_for",
    "network_type",
    "network_types",
    "read_source",
]

# One tensor that only this network has: its name in the authors' files, and in this package and `transformers`.
# Matchers come first: a matcher's folder can also hold its detector, whose names have a prefix.
_MARKS = {
    "lightglue": ("log_assignment.0.final_proj.weight", "match_assignment_layers.0.final_projection.weight"),
    "superglue": ("bin_score",),
    "superpoint": ("convPa.weight", "keypoint_decoder.conv_score_a.weight"),
    "aliked": ("desc_head.agg_weights", "descriptor_head.aggregation.weight"),
    "disk": ("unet.path_down.0.1.3.weight", "unet.down.0.conv.weight"),
    "xfeat": ("heatmap_head.2.weight", "reliability_head.2.weight"),
}
NETWORKS = tuple(_MARKS)
MATCHERS = ("lightglue", "superglue")
CONFIG_KEY = "kpmatch_config"  # in the header of a .safetensors file, which has no other place for a configuration

_WRAPPERS = 3  # levels of dictionaries around the tensors, as in {"model": {...}}; a malformed one may contain itself

# Keys of a Hugging Face config.json that do not change what the network computes.
_DESCRIPTIVE = {
    "_name_or_path",
    "architectures",
    "attention_dropout",  # used only in training
    "attn_implementation",
    "dtype",
    "initializer_range",
    "is_decoder",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torch_dtype",
    "transformers_version",
}


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors and the configuration stored with them (empty if the format has none)."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    source: str

    def part(self, config_key: str, prefix: str) -> Checkpoint:
        """The network stored in this checkpoint under ``prefix``."""
        tensors = {name[len(prefix) :]: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}
        return Checkpoint(dict(self.config[config_key]), tensors, self.source)


class _Buildable(Protocol):
    MODEL_TYPE: str
    DEFAULTS: dict[str, Any]

    @classmethod
    def prepare(cls, checkpoint: Checkpoint) -> Checkpoint: ...


Model = TypeVar("Model", bound=nn.Module)


def network_types(names: Iterable[str]) -> list[str]:
    """The :data:`NETWORKS` in a file, according to the names of its tensors; a matcher comes before its detector."""
    names = list(names)
    found = []
    for kind, marks in _MARKS.items():
        pattern = re.compile(rf"(matcher\.|keypoint_detector\.(\w+\.)*)?({'|'.join(map(re.escape, marks))})")
        if any(pattern.fullmatch(name) for name in names):
            found.append(kind)
    return found


def network_type(source: str | Path, kinds: Collection[str]) -> str:
    """Return which of the networks ``kinds`` the weights hold, without reading the tensors.

    Args:
        source: a registered name, a Hugging Face folder, a ``.safetensors`` or an authors' ``.pth`` file.
        kinds: some of :data:`NETWORKS`, for example all matchers.

    Raises:
        WeightsError: the weights are missing or damaged, or hold none of these networks; the text names the networks
            that they hold and those that were expected.
    """
    found = _networks_of(source)
    for kind in found:
        if kind in kinds:
            return kind
    raise weights.WeightsError(
        f"{source} holds a {' and a '.join(found)}, not a {' or a '.join(kinds)}; check which is given as extractor "
        "and which as matcher"
    )


def check_made_for(matcher: str | Path, extractor: str | Path) -> None:
    """Check that a matcher was made for an extractor, as far as the names and the weights show.

    Descriptors of two networks may have the same size. A matcher finds no matches with those of the wrong network.

    Raises:
        WeightsError: the matcher was made for another extractor; or see :func:`network_type`.
    """
    weights.check_pair(str(matcher), str(extractor))
    registered = weights.REGISTRY.get(str(matcher))
    made_for = matcher if registered is None else registered.extractor
    wanted, given = (
        [kind for kind in _networks_of(source) if kind not in MATCHERS] if source else []
        for source in (made_for, extractor)
    )
    if wanted and given and not set(wanted) & set(given):
        raise weights.WeightsError(
            f"the matcher {matcher} was made for the features of a {' or a '.join(wanted)}, but {extractor} holds a "
            f"{' and a '.join(given)}: they do not belong together"
        )


def _networks_of(source: str | Path) -> list[str]:
    """The networks in the weights, at least one; arguments and errors as for :func:`network_type`."""
    registered = weights.REGISTRY.get(str(source))
    if registered is not None:  # the folder may hold more networks than the registered name stands for
        return list(registered.networks)
    names = _tensor_names(tensor_file(weights.resolve(source)))
    found = network_types(names)
    if not found:
        raise no_network(str(source), names)
    return found


def no_network(source: str, names: Collection[str]) -> weights.WeightsError:
    """The error for a file whose tensors belong to no network of this package."""
    return weights.WeightsError(
        f"{source} holds none of the networks {', '.join(NETWORKS)}, but {', '.join(list(names)[:3])} and others"
    )


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a Hugging Face folder (``config.json``, ``model.safetensors``), a ``.safetensors`` file or a ``.pth``.

    Raises:
        WeightsError: a file is missing, damaged, of an unknown format, or holds anything but tensors.
    """
    if path.is_dir():
        config_path = path / "config.json"
        try:
            if config_path.exists() and not config_path.is_file():  # reading a FIFO would wait for ever
                raise TypeError("it is not a regular file")
            config = json.loads(config_path.read_text())
            if not isinstance(config, dict):
                raise TypeError("it is not a JSON object")
        except (OSError, TypeError, ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise weights.WeightsError(
                f"{path} is not a folder of weights: its config.json cannot be read ({reason})"
            ) from error
        return Checkpoint(config, _read_tensors(tensor_file(path)), str(path))
    file = tensor_file(path)
    return Checkpoint(_own_config(file), _read_tensors(file), str(path))


def read_source(source: str | Path) -> Checkpoint:
    """Read a registered name, a folder or a file. A registered LightGlue may stand for only its first layers.

    Raises:
        WeightsError: there is no such name or file; or see :func:`read_checkpoint`.
    """
    read = read_checkpoint(weights.resolve(source))
    registered = weights.REGISTRY.get(str(source))
    return first_layers(read, registered.layers) if registered is not None and registered.layers else read


def first_layers(lightglue: Checkpoint, count: int) -> Checkpoint:
    """A LightGlue with only its first ``count`` layers, from a Hugging Face folder.

    Matching can stop after any layer, because each was trained to give matches.
    """

    def kept(name: str) -> bool:
        layer = re.match(r"(transformer_layers|match_assignment_layers|token_confidence)\.(\d+)\.", name)
        # A confidence layer stands between two layers, so there is one fewer.
        return not layer or int(layer[2]) < count - (layer[1] == "token_confidence")

    tensors = {name: tensor for name, tensor in lightglue.tensors.items() if kept(name)}
    return Checkpoint({**lightglue.config, "num_hidden_layers": count}, tensors, lightglue.source)


def _own_config(path: Path) -> dict[str, Any]:
    """The configuration in the header of a ``.safetensors`` file written by this package; empty for other files."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(CONFIG_KEY, "{}")
        config = json.loads(text)
    except Exception as error:  # SafetensorError, OSError, JSONDecodeError
        raise _damaged(path, error) from error
    return config if isinstance(config, dict) else {}


def tensor_file(path: Path) -> Path:
    """The file with the tensors in a Hugging Face folder; a path to a file is returned unchanged.

    Raises:
        WeightsError: the folder has no such file, or it is not a regular file.
    """
    names = ("model.safetensors", "pytorch_model.bin") if path.is_dir() else ("",)
    for file in (path / name for name in names):
        if file.exists():
            if not file.is_file():  # reading a FIFO would wait for ever
                raise weights.WeightsError(f"{file} is not a regular file, so it holds no weights")
            return file
    raise weights.WeightsError(f"{path} is not a folder of weights: it has no model.safetensors")


def _tensor_names(path: Path) -> list[str]:
    if path.suffix != ".safetensors":
        return list(_read_tensors(path))
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except Exception as error:  # SafetensorError, OSError
        raise _damaged(path, error) from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return _checked(path, load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # SafetensorError, UnpicklingError, OSError, and whatever malformed archives raise
        raise _damaged(path, error) from error
    tensors = dict(loaded) if isinstance(loaded, Mapping) else {}
    for _ in range(_WRAPPERS):
        if len(tensors) == 1 and isinstance(inner := next(iter(tensors.values())), Mapping):
            tensors = dict(inner)
    tensors = {str(name): tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise weights.WeightsError(f"{path} holds no named tensors, so it holds no weights")
    return _checked(path, tensors)


def _checked(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, if all of them are plain real numbers stored completely in the file."""
    for name, tensor in tensors.items():
        fault = _fault(tensor)
        if fault:
            raise weights.WeightsError(
                f"{path} holds {name:.80}, which {fault}; weights must be plain arrays of real numbers"
            )
    return tensors


def _fault(tensor: Tensor) -> str:
    """Why a tensor is not a plain dense array of real numbers; empty if it is."""
    if tensor.is_nested or tensor.layout != torch.strided:
        return "is sparse or nested"
    if tensor.is_quantized or tensor.is_complex():
        return f"is of the type {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.device.type != "cpu":
        return f"is on the device {tensor.device}"
    # A tensor of stride 0 takes one number in the file and any amount of memory when copied.
    repeats = tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    return "repeats its numbers" if repeats else ""


def _damaged(path: Path, error: Exception) -> weights.WeightsError:
    if isinstance(error, pickle.UnpicklingError):  # PyTorch's own text recommends running the file's code
        reason = "it holds something other than tensors, which is not loaded because it could run code"
    elif isinstance(error, LookupError):  # the first byte is no opcode of pickle
        reason = "it is not a PyTorch file"
    else:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return weights.WeightsError(
        f"{path} cannot be read as weights ({reason}); it may be truncated, or a web page saved under this name: "
        "fetch it again"
    )


def prepared(network: type[_Buildable], read: Checkpoint) -> Checkpoint:
    """The tensors and configuration for ``network``, under its own names; a matcher's folder may hold its detector."""
    part, own_name = "keypoint_detector.", _MARKS[network.MODEL_TYPE][-1]
    if read.config.get("model_type") != network.MODEL_TYPE and part + own_name in read.tensors:
        read = read.part("keypoint_detector_config", part)
    return network.prepare(read)


def build(cls: type[Model], source: str | Path, options: Mapping[str, Any]) -> Model:
    """Construct the network ``cls`` from weights: a registered name, a folder or a file.

    Args:
        options: configuration values that replace the checkpoint's.

    Raises:
        WeightsError: the weights are missing, damaged, or made for another network or configuration.
    """
    network: type[_Buildable] = cls  # type: ignore[assignment]
    registered = weights.REGISTRY.get(str(source))
    if registered is not None and network.MODEL_TYPE not in registered.networks:
        _check_kind(registered.name, registered.model, network.MODEL_TYPE)
    return build_from(cls, read_source(source), options)


def build_from(cls: type[Model], read: Checkpoint, options: Mapping[str, Any]) -> Model:
    """Construct the network ``cls`` from a checkpoint, see :func:`build`.

    Raises:
        WeightsError: the checkpoint is damaged, or made for another network or configuration.
    """
    network: type[_Buildable] = cls  # type: ignore[assignment]
    with _explained(read.source, network.MODEL_TYPE):
        checkpoint = prepared(network, read)
    _check_kind(checkpoint.source, checkpoint.config.get("model_type", network.MODEL_TYPE), network.MODEL_TYPE)
    config = {**checkpoint.config, **options}
    unknown = sorted(set(config) - set(network.DEFAULTS) - _DESCRIPTIVE)
    if unknown:
        raise weights.WeightsError(
            f"{checkpoint.source} sets {', '.join(unknown)}, which this {network.MODEL_TYPE} does not support; the "
            "matches would differ from those that the weights were trained for"
        )
    config = {key: value for key, value in config.items() if key in network.DEFAULTS and value is not None}
    _check_config(checkpoint, network, config)
    with _explained(checkpoint.source, network.MODEL_TYPE), torch.device("meta"):
        # Without memory: the file may declare a network of any size. float() overrides PyTorch's default data type.
        model = cls(**config).float()
    expected, stored = model.state_dict(), checkpoint.tensors
    problems = [f"{name} is missing" for name in expected if name not in stored]
    problems += [f"{name} is unknown" for name in stored if name not in expected]
    problems += [
        f"{name} is {tuple(stored[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise weights.WeightsError(
            f"{checkpoint.source} does not fit {network.MODEL_TYPE}: {', '.join(problems[:3])}{more}"
        )
    given = {name: stored[name].to(tensor.dtype, copy=True).contiguous() for name, tensor in expected.items()}
    if not all(_is_finite(tensor) for tensor in given.values()):
        raise weights.WeightsError(f"{checkpoint.source} holds weights that are not finite: the file is damaged")
    model.load_state_dict(given, assign=True)
    return model


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite, checked by the minimum and the maximum, which are NaN if any number is."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(each)) for each in tensor.aminmax())


def _check_config(checkpoint: Checkpoint, network: type[_Buildable], config: Mapping[str, Any]) -> None:
    """Check the types of a configuration, and that the file has enough tensors for the declared number of parts.

    Raises:
        WeightsError: a value has the wrong type, or declares more parts than the file has tensors.
    """
    for key, value in config.items():
        default = network.DEFAULTS[key]
        if isinstance(default, bool) and not isinstance(value, bool):
            raise weights.WeightsError(f"{checkpoint.source} sets {key} to {value!r:.80}, which is not true or false")
        if isinstance(default, bool) or not isinstance(default, (int, float, list)):
            continue
        numbers = value if isinstance(default, list) and isinstance(value, (list, tuple)) else [value]
        kind = (int, float) if isinstance(default, float) else (int, str) if isinstance(default, list) else (int,)
        sound = isinstance(value, (list, tuple)) == isinstance(default, list) and all(
            isinstance(number, kind) and not isinstance(number, bool) for number in numbers
        )
        if not sound or any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            wanted = (
                "a list" if isinstance(default, list) else "a number" if isinstance(default, float) else "an integer"
            )
            raise weights.WeightsError(f"{checkpoint.source} sets {key} to {value!r:.80}, which is not {wanted}")
        parts = len(numbers) if isinstance(default, list) else value if key.startswith("num_") else 0
        if parts > max(len(checkpoint.tensors), 1):
            raise weights.WeightsError(
                f"{checkpoint.source} sets {key} to {value!r:.80}, but holds {len(checkpoint.tensors)} tensors: the "
                "configuration belongs to another network"
            )


@contextmanager
def _explained(source: str, kind: str) -> Iterator[None]:
    """Turn any failure caused by a malformed checkpoint into an error that names the file."""
    try:
        yield
    except weights.WeightsError as error:
        raise weights.WeightsError(f"{source}: {error}") from error
    except Exception as error:
        raise weights.WeightsError(
            f"{source} is not a valid {kind}: its configuration or its tensors are incomplete or contradictory "
            f"({error!r})"
        ) from error


def _check_kind(source: str, kind: str, wanted: str) -> None:
    if kind != wanted:
        raise weights.WeightsError(
            f"{source} holds a {kind}, not a {wanted}; check which is given as extractor and which as matcher"
        )
