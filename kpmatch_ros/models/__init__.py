"""The networks, in plain PyTorch, for inference."""
from kpmatch_ros.models.lightglue import LightGlue
from kpmatch_ros.models.nearest import NearestNeighbour
from kpmatch_ros.models.superpoint import SuperPoint

__all__ = ["LightGlue", "NearestNeighbour", "SuperPoint"]
