"""The calibration of the camera, or of the pair of cameras, that images come from, and what is odd about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kpmatch_ros.geometry.camera import CalibrationError, Camera
from kpmatch_ros.geometry.stereo_camera import StereoCamera

__all__ = ["Calibration", "Doubt"]

_PLAUSIBLE_BASELINES = 0.001, 10.0  # metres: a stereo endoscope has 4 mm, a lorry's cameras are 2 m apart


class Doubt(NamedTuple):
    """Something about a calibration that can be, but hardly is meant so."""

    kind: str  # a stable name
    explanation: str  # for the user


class Calibration:
    """The camera, or the pair of cameras, that the latest camera_infos describe.

    One thread may update it while another asks for the camera.

    Args:
        topics: of the images: one, or two for a stereo pair.
        rectified: as the parameter.

    Attributes:
        doubts: about the calibration that was asked for last.
    """

    def __init__(self, topics: Sequence[str], rectified: bool) -> None:
        self.doubts: list[Doubt] = []
        self._topics = topics
        self._rectified = rectified
        self._infos: list[Any] = [None] * len(topics)
        self._made_of: tuple[Any, ...] = ()
        self._camera: Camera | StereoCamera | None = None
        self._fault: CalibrationError | None = None

    def update(self, side: int, info: Any) -> None:
        """Take over a newer camera_info of camera 0 or 1."""
        self._infos[side] = info

    @property
    def complete(self) -> bool:
        """Whether every camera has sent its calibration."""
        return all(info is not None for info in self._infos)

    def camera_for(self, sizes: Sequence[tuple[int, int]]) -> Camera | StereoCamera | None:
        """The camera, or the pair, for images of these (width, height); None where a calibration is missing.

        Raises:
            CalibrationError: when the calibration cannot be used, for itself or for images of these sizes.
        """
        infos = tuple(self._infos)
        if any(info is None for info in infos):
            return None
        if len(infos) != len(self._made_of) or any(a is not b for a, b in zip(infos, self._made_of)):
            self._made_of, self._camera, self._fault, self.doubts = infos, None, None, []
            try:
                self._camera = self._make(infos)
                self.doubts = [*self._of_baseline(), *self._of_names(infos)]
            except CalibrationError as error:
                self._fault = error
        if self._fault is not None:
            raise self._fault.with_traceback(None)  # or else it would grow with every frame
        if isinstance(self._camera, StereoCamera):
            self._camera.check_size(sizes[0], sizes[1])
        elif self._camera is not None:
            self._camera.check_size(*sizes[0])
        return self._camera

    def _make(self, infos: tuple[Any, ...]) -> Camera | StereoCamera:
        if len(infos) == 1:
            return Camera.from_camera_info(infos[0], rectified=self._rectified)
        return StereoCamera.from_camera_infos(infos[0], infos[1], rectified=self._rectified)

    def _of_baseline(self) -> list[Doubt]:
        least, most = _PLAUSIBLE_BASELINES
        if not isinstance(self._camera, StereoCamera) or least <= self._camera.baseline <= most:
            return []
        explanation = (
            f"the cameras are {self._camera.baseline:.6g} m apart by their camera_infos (P[3] / P[0] of the right "
            "one): is P[3] in millimetres, or of another unit? Poses and odometry have the same scale"
        )
        return [Doubt("baseline", explanation)]

    def _of_names(self, infos: tuple[Any, ...]) -> list[Doubt]:
        """Where a topic's name says that its images are rectified, or that they are raw, and `rectified` does not."""
        found = []
        for topic, info in zip(self._topics, infos):
            coefficients = np.asarray(getattr(info, "d", getattr(info, "D", ())), dtype=np.float64)
            words = set(re.split(r"[/_]", topic.lower()))
            named = "rectified" if words & {"rect", "rectified"} else "raw" if words & {"raw", "unrectified"} else ""
            if not coefficients.any() or not named or (named == "rectified") == self._rectified:
                continue
            distortion = f"the distortion of camera_info (D is {coefficients.tolist()})"
            if named == "rectified":
                explanation = (
                    f"by its name {topic} has rectified images, but rectified is false, so {distortion} is corrected "
                    "once more: set rectified to true if they are rectified"
                )
            else:
                explanation = (
                    f"by its name {topic} has raw images, but rectified is true, so {distortion} is not corrected: set "
                    "rectified to false if they are not rectified"
                )
            found.append(Doubt("rectified", explanation))
        return found
