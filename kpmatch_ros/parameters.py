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
        "mono",
        "mono: one camera, whose frames are matched over time; stereo: a stereo pair, whose poses are in metres",
        choices=("mono", "stereo"),
    )
    profile: str = _parameter(
        "accurate",
        "preset of weights, max_keypoints and depth_confidence: accurate uses the defaults; fast, for robots without "
        "a GPU, uses smaller networks, 512 keypoints and depth_confidence 0.9; a parameter that is set explicitly "
        "overrides the profile",
        choices=tuple(PROFILES),
    )
    extractor: str = _parameter(
        "superpoint-open",
        "weights of the extractor, which detects keypoints and computes their descriptors: a registered name, a "
        "folder or a file",
    )
    matcher: str = _parameter(
        "lightglue-superpoint-open",
        "weights of the matcher: a registered name, a folder or a file, trained for the extractor; or 'nearest' for "
        "mutual nearest neighbours",
    )
    backend: str = _parameter(
        "torch",
        "library that runs the networks: torch (PyTorch), or onnxruntime, which always runs all layers, supports "
        "SuperPoint with LightGlue or SuperGlue, and needs the packages onnx and onnxruntime",
        choices=("torch", "onnxruntime"),
    )
    providers: str = _parameter(
        "cpu",
        "with backend onnxruntime: its execution providers, separated by commas, the preferred one first: tensorrt, "
        "cuda, openvino, cpu; a provider that is not available is skipped with a warning",
        pattern=rf"{_PROVIDER}(, *{_PROVIDER})*",
        needs=("backend", "onnxruntime"),
    )
    device: str = _parameter(
        "auto",
        "device of the networks: auto (the GPU if there is one, else the CPU), cpu, cuda or cuda:N (GPU number N)",
        pattern=r"auto|cpu|cuda(:\d{1,2})?",
    )
    precision: str = _parameter(
        "auto",
        "number format of the networks; auto is float16 on a GPU, bfloat16 on a CPU with bfloat16 instructions, and "
        "float32 on other CPUs",
        choices=("auto", "float32", "float16", "bfloat16"),
    )
    threads: int = _parameter(
        0,
        "number of CPU threads for the networks, set for the whole process: as many as the robot's other processes "
        "leave free; 0 leaves the number to PyTorch, which uses all cores",
        minimum=0,
        maximum=1024,
    )
    max_keypoints: int = _parameter(
        1024,
        "largest number of keypoints per image; those with the highest scores are kept",
        minimum=1,
        maximum=16384,
        dynamic=True,
    )
    keypoint_threshold: float = _parameter(
        -1.0,
        "lowest detection score of a keypoint; -1 uses the value that was published with the weights",
        minimum=0.0,
        maximum=1.0,
        special=-1.0,
        dynamic=True,
    )
    nms_radius: int = _parameter(
        -1,
        "radius of non-maximum suppression, in the image after resize: any two keypoints are further apart than this, "
        "before subpixel moves each by up to about a pixel; -1 uses the value that was published with the weights",
        unit="pixels",
        minimum=-1,
        maximum=64,
    )
    border: int = _parameter(
        -1,
        "width of the border without keypoints, in the image after resize; -1 uses the value that was published with "
        "the weights",
        unit="pixels",
        minimum=-1,
        maximum=65535,
    )
    subpixel: bool = _parameter(
        True,
        "detect keypoints with subpixel accuracy, if the weights were trained for it (superpoint-open and "
        "superpoint-open-fast); false detects whole pixels",
    )
    resize: int = _parameter(
        0,
        "resize images for the extractor such that their longest side has this length; 0 keeps the size",
        unit="pixels",
        minimum=0,
        maximum=8192,
    )
    filter_threshold: float = _parameter(
        0.1, "lowest score of a match; matches with lower scores are discarded", minimum=0.0, maximum=1.0, dynamic=True
    )
    ratio_threshold: float = _parameter(
        1.0,
        "with matcher 'nearest': ratio test, the largest ratio of the distances to the nearest and to the "
        "second nearest descriptor; 1 disables the test",
        minimum=0.0,
        maximum=1.0,
        dynamic=True,
        needs=("matcher", "nearest"),
    )
    depth_confidence: float = _parameter(
        0.95,
        "with backend torch: LightGlue stops early once it is confident about this fraction of the points; -1 always "
        "runs all layers",
        minimum=0.01,
        maximum=1.0,
        special=-1.0,
        dynamic=True,
        needs=("backend", "torch"),
    )
    width_confidence: float = _parameter(
        0.99,
        "with backend torch: LightGlue drops points that it considers unmatchable with this confidence, where that "
        "saves time (on a GPU only above 4096 keypoints); -1 keeps all points",
        minimum=0.01,
        maximum=1.0,
        special=-1.0,
        dynamic=True,
        needs=("backend", "torch"),
    )
    reference: str = _parameter(
        "previous",
        "reference frame that a frame is matched with: previous is the frame before, or the one before that if the "
        "frame before has no pose; keyframe is a frame that is kept until keyframe_min_matches or "
        "keyframe_max_parallax replaces it",
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
        "with reference 'keyframe': a frame whose matches have a larger median displacement becomes the new "
        "keyframe; if the pose is known, displacement by rotation does not count",
        unit="pixels",
        minimum=0.0,
        maximum=1e9,
        dynamic=True,
        needs=("reference", "keyframe"),
    )
    refine: bool = _parameter(
        True,
        "refine the matched points to subpixel accuracy by the image around them, and follow tracks through frames "
        "in which they have no match; false publishes keypoints as detected",
        dynamic=True,
    )
    lost_tracks: int = _parameter(
        2000,
        "with refine: largest number of lost tracks that are remembered; if the point of such a track is found "
        "again, the track continues with its old id; 0 remembers none",
        minimum=0,
        maximum=100000,
        dynamic=True,
        needs=("refine", True),
    )
    max_gap: float = _parameter(
        5.0,
        "if more time than this passes between two frames, the cached features are discarded and new tracks start; 0 "
        "allows any gap",
        unit="seconds",
        minimum=0.0,
        maximum=1e9,
        dynamic=True,
    )
    queue: str = _parameter(
        "latest",
        "latest: if frames arrive faster than they are processed, only the newest is processed; all: every frame is "
        "processed in order, for bags (up to 2 GB of images may wait)",
        choices=("latest", "all"),
    )
    image_transport: str = _parameter(
        "raw",
        "raw: images on the topic <image>; compressed: compressed images on <image>/compressed",
        choices=("raw", "compressed"),
    )
    stretch: str = _parameter(
        "auto",
        "for 16-bit images that use a small part of their range (thermal cameras, 12-bit sensors): auto stretches "
        "that part to 8 bits and adapts it over time; off divides by 257",
        choices=("auto", "off"),
        dynamic=True,
    )
    mask: str = _parameter(
        "",
        "image file that is 0 (black) where no keypoint may be detected, such as on the robot's own body; in stereo "
        "for the left camera; empty for no mask",
    )
    mask_right: str = _parameter(
        "", "with mode stereo: image file with the mask of the right camera; empty for no mask"
    )
    rectified: bool = _parameter(
        False,
        "whether the images are already rectified: true uses the projection matrix P of camera_info and no distortion; "
        "false corrects the lens distortion",
    )
    max_reprojection_error: float = _parameter(
        1.0,
        "inlier threshold: a match further than this from its epipolar line is an outlier",
        unit="pixels",
        minimum=0.01,
        maximum=100.0,
        dynamic=True,
    )
    min_inliers: int = _parameter(
        15,
        "smallest number of inliers of a relative pose; with fewer, its status is TOO_FEW_MATCHES",
        minimum=6,
        maximum=16384,
        dynamic=True,
    )
    readout_time: float = _parameter(
        0.0,
        "with mode mono and a rolling shutter: time between the readout of an image's first and last row; poses then "
        "refer to the middle rows; 0 for a global shutter",
        unit="seconds",
        minimum=0.0,
        maximum=0.2,
        dynamic=True,
        needs=("mode", "mono"),
    )
    motion_prior: bool = _parameter(
        True,
        "if two motions explain the matches equally well, as on a plane, choose the one closer to the previous "
        "motion; false reports such poses as AMBIGUOUS",
        dynamic=True,
    )
    sync_tolerance: float = _parameter(
        0.01,
        "largest difference between the stamps of a stereo pair, or of an image and its mask; also how long an image "
        "waits for its mask and its camera_info (one second with queue 'all')",
        unit="seconds",
        minimum=0.0,
        maximum=1.0,
    )
    publish_odometry: bool = _parameter(
        False,
        "with mode stereo: chain the poses, and publish them as nav_msgs/Odometry on the topic odometry, and to TF "
        "if tf2_msgs is installed",
    )
    odom_frame: str = _parameter(
        "odom",
        "with publish_odometry: frame_id of the odometry, of letters, digits, _ and /; after each break of the chain "
        "a new number is appended (odom_1)",
        pattern=r"[A-Za-z0-9_][A-Za-z0-9_/]*",
        needs=("publish_odometry", True),
    )
    base_frame: str = _parameter(
        "",
        "with publish_odometry: the robot's frame, such as base_link, whose pose and velocity are published; "
        "/tf_static must connect it to the camera's frame; empty publishes those of the left camera's optical frame",
        pattern=r"([A-Za-z0-9_][A-Za-z0-9_/]*)?",
        needs=("publish_odometry", True),
    )
    publish_tf: bool = _parameter(
        True,
        "with publish_odometry: publish the odometry to TF, too; set it to false if the camera's frame, or "
        "base_frame, already has a parent in TF",
    )
    autostart: bool = _parameter(
        True,
        "whether the node configures and activates itself when it starts; false leaves this to a lifecycle manager, "
        "with which the node then forms a bond",
    )
    bond_heartbeat_period: float = _parameter(
        0.1,
        "without autostart: time between two heartbeats to nav2's lifecycle manager, if bondpy is installed; 0 sends "
        "no heartbeats",
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
                f"base_frame and odom_frame are both {self.odom_frame!r}; they must be different frames"
            )
        if self.backend == "onnxruntime":
            # Only TensorRT can be told to compute in another number format than that of the ONNX graphs.
            precisions = ("auto", "float32", *(["float16"] if "tensorrt" in self.providers else []))
            for name, taken in (("device", ("auto", "cpu")), ("precision", precisions)):
                if getattr(self, name) not in taken:
                    raise ParameterError(
                        f"{name} is {getattr(self, name)!r}, but backend onnxruntime supports only {' or '.join(taken)}"
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
            found.append(f"profile is {self.profile!r} and has no effect: {', '.join(chosen)} have other values")
        for item in declarations():
            value = getattr(self, item.name)
            if item.needs is None or value in (item.default, chosen.get(item.name)):
                continue
            other, needed = item.needs
            if getattr(self, other) != needed:
                found.append(
                    f"{item.name} is {value!r} and has no effect: it needs {other} {needed!r}, which is "
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
