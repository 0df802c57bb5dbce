"""Check of stereo matches against the calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.geometry.robust import FALSE_ALARM_RATE, epipolar_chance, log_false_alarms
from kpmatch_ros.geometry.stereo_camera import StereoCamera, check_stereo_camera
from kpmatch_ros.geometry.stereo_errors import StereoPoints, as_pixels

__all__ = ["StereoAgreement", "check_stereo_matches"]


@dataclass(frozen=True, eq=False)
class StereoAgreement:
    """Agreement of the matches of a left and a right image with the calibration.

    Attributes:
        status: OK; NO_CALIBRATION; or FAILED if the matches contradict the calibration.
        agree: (M,) bool, matches on their epipolar lines and in front of the cameras; None without calibration.
    """

    status: PoseStatus
    agree: np.ndarray | None

    @property
    def inliers(self) -> np.ndarray | None:
        """(M,) bool, the matches that agree; all False with FAILED; None without calibration."""
        if self.agree is None or self.status is PoseStatus.OK:
            return self.agree
        return np.zeros_like(self.agree)

    @property
    def num_inliers(self) -> int:
        """Number of inliers."""
        return 0 if self.inliers is None else int(self.inliers.sum())


def check_stereo_matches(
    left: np.ndarray,
    right: np.ndarray,
    camera: StereoCamera | None,
    *,
    max_reprojection_error: float = 1.0,
    min_inliers: int = 15,
) -> StereoAgreement:
    """Check which matches of a left and a right image are on their epipolar lines and in front of the cameras.

    Matches contradict the calibration if no more of them agree than by chance, or if more are behind the cameras than
    in front.

    Args:
        left: (M, 2) pixels in the left image as received. NaN and infinity count as outliers.
        right: (M, 2) pixels in the right image, the same matches.
        camera: the calibration; None gives NO_CALIBRATION.
        max_reprojection_error: the inlier threshold, pixels.
        min_inliers: with fewer matches, the calibration is never contradicted.

    Raises:
        ValueError: an array has another shape.
        TypeError: the calibration is not a StereoCamera.
    """
    left, right = as_pixels(left), as_pixels(right)
    camera = check_stereo_camera(camera)
    if camera is None:
        return StereoAgreement(PoseStatus.NO_CALIBRATION, None)
    points = StereoPoints.of(left, right, camera)
    on_line = points.has_depth & (points.distances(points.points).sum(axis=0) < max_reprojection_error)
    front = on_line & (points.points[2] > 0)
    behind = on_line & (points.points[2] < 0) & ~points.is_distant(max_reprojection_error)
    chances = np.full(len(left), epipolar_chance(camera.left, max_reprojection_error))
    contradicted = len(left) >= min_inliers and (
        behind.sum() > front.sum() or log_false_alarms(front, chances, 1) > math.log(FALSE_ALARM_RATE)
    )
    return StereoAgreement(PoseStatus.FAILED if contradicted else PoseStatus.OK, front)
