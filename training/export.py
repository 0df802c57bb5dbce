"""Write trained weights as the Hugging Face folder that the package ships and `transformers` loads.

    python training/export.py --points RUN/points.weights.pt --matching RUN/matching.weights.pt --network full OUT
    python training/export.py --points RUN/ranking.weights.pt --matching lightglue-superpoint-open --network full OUT

The files are outputs of train.py, distil.py and rank.py: for each network its configuration and averaged weights. A
folder of weights or a registered name can be given instead. Without ``--matching`` the result is only the SuperPoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import log_line, write_json
from safetensors.torch import save_file

from kpmatch_ros.models import LightGlue, SuperPoint
from kpmatch_ros.weights import file_hash

DETECTION: dict[str, dict[str, Any]] = {
    "full": {"keypoint_threshold": 0.004, "max_keypoints": 1024, "nms_radius": 3, "subpixel": True},
    "fast": {"keypoint_threshold": 0.012, "max_keypoints": 1024, "nms_radius": 2, "subpixel": True},
}  # detection settings for trained weights; the reasons are in runs.md, "How settings were chosen"


def read_trained(make: type[Any], source: str | Path, network: str) -> Any:
    """Read trained weights.

    Args:
        make: SuperPoint or LightGlue.
        source: a file ``….weights.pt`` of a training, a folder of weights, or a registered name.
        network: which network to read from a file: ``full`` or ``fast``.

    Raises:
        KeyError: the file holds no network of this name.
    """
    if not str(source).endswith(".weights.pt"):
        return make.from_pretrained(source)
    trained = torch.load(source, map_location="cpu", weights_only=True)
    if network not in trained:
        raise KeyError(f"{source} holds {', '.join(trained)}, but no network called {network}")
    model = make(**trained[network]["config"])
    model.load_state_dict(trained[network]["tensors"])
    return model


def export(superpoint: SuperPoint, lightglue: LightGlue, folder: Path) -> Path:
    """Write ``config.json``, with both networks' configurations, and ``model.safetensors``; return the latter's path.

    Raises:
        ValueError: a weight does not fit into float16, or the networks do not belong together.
    """
    if superpoint.descriptor_size != lightglue.input_dim:
        raise ValueError(
            f"the SuperPoint's descriptors have size {superpoint.descriptor_size}, but the LightGlue takes size "
            f"{lightglue.input_dim}"
        )
    tensors = {f"keypoint_detector.{name}": tensor for name, tensor in superpoint.state_dict().items()}
    tensors |= lightglue.state_dict()
    return write(tensors, configuration(superpoint.config, lightglue.config), folder)


def export_superpoint(superpoint: SuperPoint, folder: Path) -> Path:
    """Write a SuperPoint without a matcher, in the format of :func:`export`."""
    head = {"architectures": ["SuperPointForKeypointDetection"], "dtype": "float16"}
    return write(superpoint.state_dict(), {**head, **superpoint.config, "model_type": "superpoint"}, folder)


def write(tensors: dict[str, torch.Tensor], config: dict[str, Any], folder: Path) -> Path:
    """Write tensors in float16 and their configuration; return the path of the tensors' file.

    Raises:
        ValueError: a weight does not fit into float16.
    """
    tensors = {name: tensor.to(torch.float16).contiguous() for name, tensor in tensors.items()}
    infinite = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if infinite:
        raise ValueError(f"{', '.join(infinite)}: values too large for float16")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    return folder / "model.safetensors"


def configuration(superpoint: dict[str, Any], lightglue: dict[str, Any]) -> dict[str, Any]:
    """The configuration of both networks, with the keys of `transformers`."""
    size, heads = lightglue["descriptor_dim"], lightglue["num_attention_heads"]
    return {
        "architectures": ["LightGlueForKeypointMatching"],
        "model_type": "lightglue",
        **{name: value for name, value in lightglue.items() if name != "input_dim"},
        "num_key_value_heads": lightglue["num_key_value_heads"] or heads,
        "hidden_size": size,
        "intermediate_size": 2 * size,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "dtype": "float16",
        "keypoint_detector_config": {
            **superpoint,
            "model_type": "superpoint",
            "attn_implementation": "eager",
            "initializer_range": 0.02,
        },
    }


def add_detection_options(parser: argparse.ArgumentParser, otherwise: str) -> None:
    """Add options for the detector's configuration; ``otherwise`` describes the values without them."""
    group = parser.add_argument_group("detector", f"detection settings (default: {otherwise})")
    group.add_argument("--nms-radius", type=int, help="radius of non-maximum suppression, pixels")
    group.add_argument("--keypoint-threshold", type=float, help="lowest score of a keypoint")
    group.add_argument(
        "--subpixel", action=argparse.BooleanOptionalAction, help="refine positions to a fraction of a pixel"
    )


def detection_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the detector's configuration from the options."""
    given = {name: getattr(arguments, name) for name in ("nms_radius", "keypoint_threshold", "subpixel")}
    return {name: value for name, value in given.items() if value is not None}


def main(words: list[str] | None = None) -> None:
    """Export according to the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", required=True, help="SuperPoint: ….weights.pt, a folder or a registered name")
    parser.add_argument("--matching", help="LightGlue: ….weights.pt, a folder or a registered name")
    parser.add_argument("--network", choices=("full", "fast"), default="full", help="network to export")
    add_detection_options(parser, "those chosen for this network by validation")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args(words)
    superpoint = read_trained(SuperPoint, arguments.points, arguments.network)
    superpoint.config.update(DETECTION[arguments.network], **detection_of(arguments))
    if arguments.matching is None:
        file = export_superpoint(superpoint, arguments.folder)
    else:
        lightglue = read_trained(LightGlue, arguments.matching, arguments.network)
        file = export(superpoint, lightglue, arguments.folder)
    log_line(f"{file}: {file.stat().st_size} bytes, SHA-256 {file_hash(file)}")


if __name__ == "__main__":
    main()
