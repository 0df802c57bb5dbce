"""The single declaration of all parameters.

The node's ROS parameters, ``config/matcher.yaml``, the table in ``docs/parameters.md``, the options of the ``kpmatch``
command and the keyword arguments of :class:`kpmatch_ros.FeatureMatcher` are all generated from the fields of
:class:`Parameters`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from kpmatch_ros.declaration import Declaration, ParameterError
from kpmatch_ros.declaration import parameter as _parameter

__all__ = [
    "PROFILES",
    "Declaration",
    "ParameterError",
    "Parameters",
    "declaration",
    "declarations",
    "meant",
]


PROFILES: Mapping[str, Mapping[str, Any]] = {
    "accurate": {},
    "fast": {
        "extractor": "superpoint-open-fast",
        "matcher": "lightglue-superpoint-open-fast",
        "max_keypoints": 512,
        "depth_confidence": 0.9,  # with small camera motion, 2 layers are enough, instead of 3.5
    },
}
"""For each profile, the values that replace the defaults, by parameter name."""

_PROVIDER = "(tensorrt|cuda|openvino|cpu)"


@dataclass(frozen=True)
class Parameters:
    """A checked, immutable set of all parameters.

    `profile` is only a name here: :meth:`given` applies the values of the profile.

    Raises:
        ParameterError: if a value, or a combination of values, is not allowed.
    """

    mode: str = _parameter(
        "mono", "mono: one camera over time; stereo: a stereo pair of cameras", choices=("mono", "stereo")
    )
    profile: str = _parameter(
        "accurate",
        "a choice of weights, max_keypoints and depth_confidence: accurate has the defaults; fast, for robots "
        "without a GPU, has smaller networks, 512 keypoints and depth_confidence 0.9; a parameter that is set "
        "itself wins",
        choices=tuple(PROFILES),
    )
    extractor: str = _parameter(
        "superpoint-open", "weights that find and describe keypoints: a registered name, a folder or a file"
    )
    matcher: str = _parameter(
        "lightglue-superpoint-open",
        "weights that match: a registered name, a folder or a file made for the extractor, or 'nearest' for mutual "
        "nearest neighbours",
    )
    backend: str = _parameter(
        "torch",
        "what runs the networks: torch, or onnxruntime, which runs all layers (SuperPoint with LightGlue or "
        "SuperGlue; needs onnx and onnxruntime)",
        choices=("torch", "onnxruntime"),
    )
    providers: str = _parameter(
        "cpu",
        "with backend onnxruntime: its execution providers, with commas between them and the preferred one first: "
        "tensorrt, cuda, openvino, cpu; those that are not available are left out with a warning",
        pattern=rf"{_PROVIDER}(, *{_PROVIDER})*",
        needs=("backend", "onnxruntime"),
    )
    device: str = _parameter(
        "auto",
        "where the networks run: auto (the GPU where there is one), cpu, cuda or cuda:N",
        pattern=r"auto|cpu|cuda(:\d{1,2})?",
    )
    precision: str = _parameter(
        "auto",
        "number format of the networks; auto is float16 on a GPU, bfloat16 on a processor that computes in it, and "
        "float32 on others",
        choices=("auto", "float32", "float16", "bfloat16"),
    )
    threads: int = _parameter(
        0,
        "processor threads of the networks, for the whole process: as many as the robot's other processes leave "
        "free; 0 leaves it to PyTorch, which takes all cores",
        minimum=0,
        maximum=1024,
    )
    max_keypoints: int = _parameter(
        1024, "keypoints kept per image, those of highest score", minimum=1, maximum=16384, dynamic=True
    )
    keypoint_threshold: float = _parameter(
        -1.0,
        "lowest detection score of a keypoint; -1 takes the value published with the weights",
        minimum=0.0,
        maximum=1.0,
        special=-1.0,
        dynamic=True,
    )
    nms_radius: int = _parameter(
        -1,
        "radius of non-maximum suppression, in the image after resize: two maxima of the scores are further apart than "
        "this, before subpixel moves each by up to about a pixel; -1 takes the value published with the weights",
        unit="pixels",
        minimum=-1,
        maximum=64,
    )
    border: int = _parameter(
        -1,
        "no keypoint is closer to the border of the image after resize than this; -1 takes the value published with "
        "the weights",
        unit="pixels",
        minimum=-1,
        maximum=65535,
    )
    subpixel: bool = _parameter(
        True,
        "find keypoints to a fraction of a pixel, with weights that were trained for it (superpoint-open and its fast "
        "one); false finds whole pixels",
    )
    resize: int = _parameter(
        0, "longest side of the image that the extractor sees; 0 keeps the size", unit="pixels", minimum=0, maximum=8192
    )
    filter_threshold: float = _parameter(0.1, "lowest score of a match", minimum=0.0, maximum=1.0, dynamic=True)
    ratio_threshold: float = _parameter(
        1.0,
        "with matcher 'nearest': highest ratio of the distances to the nearest and the second nearest descriptor; 1 "
        "turns the test off",
        minimum=0.0,
        maximum=1.0,
        dynamic=True,
        needs=("matcher", "nearest"),
    )
    depth_confidence: float = _parameter(
        0.95,
        "with backend torch: LightGlue stops early once this share of the points is sure of its matches; -1 always "
        "runs every layer",
        minimum=0.01,
        maximum=1.0,
        special=-1.0,
        dynamic=True,
        needs=("backend", "torch"),
    )
    width_confidence: float = _parameter(
        0.99,
        "with backend torch: LightGlue drops points that are unmatchable with this confidence, where that is faster: "
        "on a GPU only above 4096 keypoints; -1 keeps every point",
        minimum=0.01,
        maximum=1.0,
        special=-1.0,
        dynamic=True,
        needs=("backend", "torch"),
    )
    reference: str = _parameter(
        "previous",
        "what a frame is matched with: previous, the frame before, or the one before that where it has no pose; "
        "keyframe, a frame that is kept until keyframe_min_matches or keyframe_max_parallax replaces it",
        choices=("previous", "keyframe"),
        dynamic=True,
    )
    keyframe_min_matches: int = _parameter(
        100,
        "with reference 'keyframe': a frame with fewer matches becomes the new keyframe",
        minimum=1,
        maximum=16384,
        dynamic=True,
        needs=("reference", "keyframe"),
    )
    keyframe_max_parallax: float = _parameter(
        40.0,
        "with reference 'keyframe': a frame with a larger median displacement of its matches becomes the new "
        "keyframe; where a pose is known, the rotation's part does not count",
        unit="pixels",
        minimum=0.0,
        maximum=1e9,
        dynamic=True,
        needs=("reference", "keyframe"),
    )
    refine: bool = _parameter(
        True,
        "refine points to a fraction of a pixel by the image around them, and follow tracks through frames without "
        "a match; false publishes keypoints as detected",
        dynamic=True,
    )
    lost_tracks: int = _parameter(
        2000,
        "with refine: lost tracks that are remembered at most; one whose point is found again goes on under its old "
        "id; 0 remembers none",
        minimum=0,
        maximum=100000,
        dynamic=True,
        needs=("refine", True),
    )
    max_gap: float = _parameter(
        5.0,
        "a longer time between two frames clears the cached features and begins new tracks; 0 allows any gap",
        unit="seconds",
        minimum=0.0,
        maximum=1e9,
        dynamic=True,
    )
    queue: str = _parameter(
        "latest",
        "latest drops frames that a newer one has overtaken; all processes every frame in order, for bags (up to 2 "
        "GB of waiting images)",
        choices=("latest", "all"),
    )
    image_transport: str = _parameter(
        "raw", "raw images on <image>, or compressed ones on <image>/compressed", choices=("raw", "compressed")
    )
    stretch: str = _parameter(
        "auto",
        "images of 16 bits that use a small part of the range (thermal cameras, 12-bit sensors): auto stretches that "
        "part to 8 bits and follows it over time; off divides by 257",
        choices=("auto", "off"),
        dynamic=True,
    )
    mask: str = _parameter(
        "",
        "image file that is 0 (black) where no keypoint may be, such as on the robot's own body; in stereo for the "
        "left camera; empty for none",
    )
    mask_right: str = _parameter("", "with mode stereo: the same for the right camera")
    rectified: bool = _parameter(
        False, "the images are rectified already: use the projection matrix P of camera_info, and no distortion"
    )
    max_reprojection_error: float = _parameter(
        1.0,
        "a match further than this from its epipolar line is an outlier",
        unit="pixels",
        minimum=0.01,
        maximum=100.0,
        dynamic=True,
    )
    min_inliers: int = _parameter(
        15,
        "a relative pose needs at least so many matches that agree with it, or its status is TOO_FEW_MATCHES",
        minimum=6,
        maximum=16384,
        dynamic=True,
    )
    readout_time: float = _parameter(
        0.0,
        "with mode mono and a rolling shutter: time from reading an image's first row to its last; poses are then as "
        "of images read at once, between their middle rows; 0 for a global shutter",
        unit="seconds",
        minimum=0.0,
        maximum=0.2,
        dynamic=True,
        needs=("mode", "mono"),
    )
    motion_prior: bool = _parameter(
        True,
        "where two motions explain the matches equally well, as on a plane, take the one that is like the motion "
        "before; false reports them as AMBIGUOUS",
        dynamic=True,
    )
    sync_tolerance: float = _parameter(
        0.01,
        "largest difference of the stamps of a stereo pair, or of an image and its mask; also how long an image "
        "waits for its mask and its camera_info (with queue 'all' one second)",
        unit="seconds",
        minimum=0.0,
        maximum=1.0,
    )
    publish_odometry: bool = _parameter(
        False,
        "with mode stereo: chain the poses, and publish them as nav_msgs/Odometry on 'odometry', and to TF where "
        "tf2_msgs is installed",
    )
    odom_frame: str = _parameter(
        "odom",
        "with publish_odometry: its frame, of letters, digits, _ and /; after each break of the chain a number is "
        "added to it (odom_1)",
        pattern=r"[A-Za-z0-9_][A-Za-z0-9_/]*",
        needs=("publish_odometry", True),
    )
    base_frame: str = _parameter(
        "",
        "with publish_odometry: the robot's frame, such as base_link, whose pose and velocity are published; "
        "/tf_static must join it to the camera's frame; empty publishes the left camera's optical frame",
        pattern=r"([A-Za-z0-9_][A-Za-z0-9_/]*)?",
        needs=("publish_odometry", True),
    )
    publish_tf: bool = _parameter(
        True,
        "with publish_odometry: publish the odometry to TF too; set it to false where the camera's frame, or "
        "base_frame, has a parent in TF already",
    )
    autostart: bool = _parameter(
        True,
        "the node configures and activates itself when it starts; false leaves that to a lifecycle manager, with which "
        "the node then has a bond",
    )
    bond_heartbeat_period: float = _parameter(
        0.1,
        "without autostart: time between heartbeats to nav2's lifecycle manager, if bondpy is installed; 0 sends none",
        unit="seconds",
        minimum=0.0,
        maximum=4.0,
        needs=("autostart", False),
    )

    def __post_init__(self) -> None:
        for declaration in declarations():
            value = declaration.check(getattr(self, declaration.name))
            object.__setattr__(self, declaration.name, value)
        if self.device == "cpu" and self.precision == "float16":
            raise ParameterError("precision float16 needs a GPU; with device cpu use float32, bfloat16 or auto")
        if self.base_frame == self.odom_frame:
            raise ParameterError(
                f"base_frame and odom_frame are both {self.odom_frame!r}: TF places a frame in another"
            )
        if self.backend == "onnxruntime":
            # Only TensorRT can be told to compute in another number format than that of the ONNX graphs.
            precisions = ("auto", "float32", *(["float16"] if "tensorrt" in self.providers else []))
            for name, taken in (("device", ("auto", "cpu")), ("precision", precisions)):
                if getattr(self, name) not in taken:
                    raise ParameterError(
                        f"{name} is {getattr(self, name)!r}, but backend onnxruntime takes {' or '.join(taken)}"
                    )

    @classmethod
    def given(cls, values: Mapping[str, Any]) -> Parameters:
        """Return the parameters with these values. All others are set by the profile or have their defaults.

        Raises:
            ParameterError: for a name that is not a parameter or a value that is not allowed.
        """
        return cls().replace({**profile_values(values.get("profile", "accurate")), **values})

    def replace(self, changes: Mapping[str, Any]) -> Parameters:
        """Return a copy with ``changes`` applied. All parameters are checked again.

        Raises:
            ParameterError: for a name that is not a parameter or a value that is not allowed.
        """
        for name in changes:
            declaration(name)
        return dataclasses.replace(self, **changes)

    def idle(self) -> list[str]:
        """Return a text for each value without effect because of another parameter. Default values are not reported."""
        found = []
        chosen = profile_values(self.profile)
        if chosen and all(getattr(self, name) != value for name, value in chosen.items()):
            found.append(f"profile is {self.profile!r} and plays no part: {', '.join(chosen)} have other values")
        for item in declarations():
            value = getattr(self, item.name)
            if item.needs is None or value in (item.default, chosen.get(item.name)):
                continue
            other, needed = item.needs
            if getattr(self, other) != needed:
                found.append(
                    f"{item.name} is {value!r} and plays no part: it needs {other} {needed!r}, which is "
                    f"{getattr(self, other)!r}"
                )
        return found


def profile_values(profile: Any) -> Mapping[str, Any]:
    """Return the values of a profile by parameter name; empty if there is no such profile."""
    return PROFILES.get(profile, {}) if isinstance(profile, str) else {}


@cache
def declarations() -> tuple[Declaration, ...]:
    """Return the declarations of all parameters, in the order of the fields."""
    return tuple(
        Declaration(name=item.name, default=item.default, **item.metadata)  # type: ignore[arg-type]
        for item in dataclasses.fields(Parameters)
    )


def declaration(name: str) -> Declaration:
    """Return the declaration of the parameter ``name``.

    Raises:
        ParameterError: if there is no such parameter.
    """
    for candidate in declarations():
        if candidate.name == name:
            return candidate
    names = [item.name for item in declarations()]
    raise ParameterError(f"there is no parameter {name!r}{meant(name, names)}; the parameters are {', '.join(names)}")


def meant(name: str, names: Iterable[str]) -> str:
    """Return ", did you mean …?" with the known name most similar to an unknown one; empty if none is similar.

    The comparison ignores case, and treats dashes as underscores. It also ignores everything before a full stop,
    because other programs group their parameters in this way.
    """

    def plain(text: str) -> str:
        return text.lower().replace("-", "_").strip("_")

    known = {plain(each): each for each in names}
    alike = difflib.get_close_matches(plain(name.rpartition(".")[2]), known, n=1, cutoff=0.75)
    return f", did you mean {known[alike[0]]}?" if alike else ""
