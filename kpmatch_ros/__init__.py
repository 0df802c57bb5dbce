"""Learned feature matching for ROS 2: SuperPoint with LightGlue on camera frames.

Everything except the node also runs on machines without ROS::

    from kpmatch_ros import FeatureMatcher

    matcher = FeatureMatcher(max_keypoints=1024)
    features0, features1 = matcher.extract(image0), matcher.extract(image1)
    matches = matcher.match(features0, features1)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kpmatch_ros.feature_matcher import FeatureMatcher
    from kpmatch_ros.features import Features, Matches
    from kpmatch_ros.front_end import FrontEnd
    from kpmatch_ros.geometry.camera import Camera
    from kpmatch_ros.geometry.stereo_camera import StereoCamera
    from kpmatch_ros.parameters import ParameterError, Parameters
    from kpmatch_ros.weights import WeightsError

__all__ = [
    "Camera",
    "FeatureMatcher",
    "Features",
    "FrontEnd",
    "Matches",
    "ParameterError",
    "Parameters",
    "StereoCamera",
    "WeightsError",
]
__version__ = "0.2.0"

_HOME = {
    "Camera": "geometry.camera",
    "StereoCamera": "geometry.stereo_camera",
    "FeatureMatcher": "feature_matcher",
    "Features": "features",
    "Matches": "features",
    "FrontEnd": "front_end",
    "ParameterError": "parameters",
    "Parameters": "parameters",
    "WeightsError": "weights",
}


def __getattr__(name: str) -> Any:
    # Imported on demand: subscribers that import only kpmatch_ros.msg must not load or need PyTorch.
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"kpmatch_ros.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
