"""Write trained weights as the Hugging Face folder that the package ships and `transformers` loads.

python training/export.py --superpoint runs/superpoint/checkpoint.pt --lightglue runs/lightglue/checkpoint.pt OUT
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import log_line, write_json
from safetensors.torch import save_file
from train_lightglue import load_lightglue
from train_superpoint import load_superpoint

from kpmatch_ros.models import LightGlue, SuperPoint
from kpmatch_ros.weights import file_hash

DETECTION = {"keypoint_threshold": 0.0005, "max_keypoints": 1024, "nms_radius": 1}  # why: README.md, what was measured


def export(superpoint: SuperPoint, lightglue: LightGlue, folder: Path) -> Path:
    """Write ``config.json`` and ``model.safetensors`` in float16; the latter's path.

    Raises:
        ValueError: when a weight does not fit into float16, or the two do not belong together.
    """
    if superpoint.descriptor_size != lightglue.input_dim:
        raise ValueError(
            f"the SuperPoint's descriptors have {superpoint.descriptor_size} numbers, and the LightGlue "
            f"takes {lightglue.input_dim}"
        )
    tensors = {f"keypoint_detector.{name}": tensor for name, tensor in superpoint.state_dict().items()}
    tensors |= lightglue.state_dict()
    tensors = {name: tensor.to(torch.float16).contiguous() for name, tensor in tensors.items()}
    infinite = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if infinite:
        raise ValueError(f"{', '.join(infinite)} cannot be written in float16")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", configuration(superpoint.config, lightglue.config))
    return folder / "model.safetensors"


def configuration(superpoint: dict[str, Any], lightglue: dict[str, Any]) -> dict[str, Any]:
    """The configuration of both, as `transformers` names it."""
    size, heads = lightglue["descriptor_dim"], lightglue["num_attention_heads"]
    detector = {**superpoint, "model_type": "superpoint", **DETECTION}
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
        "keypoint_detector_config": {**detector, "attn_implementation": "eager", "initializer_range": 0.02},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--superpoint", default="superpoint-open", help="a training's checkpoint.pt, a folder, a name")
    parser.add_argument("--lightglue", default="lightglue-superpoint-open", help="likewise")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    file = export(load_superpoint(arguments.superpoint), load_lightglue(arguments.lightglue), arguments.folder)
    log_line(f"{file}: {file.stat().st_size} bytes, SHA-256 {file_hash(file)}")


if __name__ == "__main__":
    main()
