"""The networks, in plain PyTorch, for inference."""

from kpmatch_ros.models.aliked import ALIKED
from kpmatch_ros.models.assignment import Assignment, ImageFeatures
from kpmatch_ros.models.disk import DISK
from kpmatch_ros.models.inspection import Trace, trace
from kpmatch_ros.models.lightglue import LightGlue
from kpmatch_ros.models.nearest import NearestNeighbour
from kpmatch_ros.models.superglue import SuperGlue
from kpmatch_ros.models.superpoint import SuperPoint
from kpmatch_ros.models.xfeat import XFeat

__all__ = [
    "ALIKED",
    "DISK",
    "Assignment",
    "ImageFeatures",
    "LightGlue",
    "NearestNeighbour",
    "SuperGlue",
    "SuperPoint",
    "Trace",
    "XFeat",
    "trace",
]
