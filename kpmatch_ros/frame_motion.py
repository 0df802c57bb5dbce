"""Estimates the camera motion between two frames from the points found in both."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from kpmatch_ros.frames import Frame, Pair
from kpmatch_ros.geometry.pose import RelativePose
from kpmatch_ros.geometry.refinement import (
    INDEPENDENT_POINTS,
    REFINABLE,
    REFINED_RESOLUTION,
    align_matches,
    decisive_matches,
    refine,
)
from kpmatch_ros.geometry.stereo_motion import estimate_stereo_motion
from kpmatch_ros.geometry.two_view import estimate_relative_pose
from kpmatch_ros.geometry.two_view_errors import Motion
from kpmatch_ros.parameters import Parameters
from kpmatch_ros.tracking.tracks import Links

__all__ = ["FrameMotion"]

# Largest ratio of the intervals of two pairs for which the last motion is a prior: one dropped frame is allowed.
_LARGEST_INTERVAL_RATIO = 2.5


class FrameMotion:
    """Estimates motions between frames, and remembers the last one if it is certain."""

    def __init__(self) -> None:
        # The last motion if it is certain: its end frame, its duration in nanoseconds, and the motion.
        self._last: tuple[Frame, int, Motion] | None = None

    def forget(self) -> None:
        """Discard the last motion."""
        self._last = None

    def remember(self, pair: Pair) -> None:
        """Remember the motion of a pair as the last one. Its current frame becomes the reference of the next pair."""
        self._last = None
        if pair.pose.status.is_certain:
            motion = Motion(pair.pose.rotation, pair.pose.translation)
            self._last = pair.current, pair.current.stamp - pair.reference.stamp, motion

    def estimate(
        self, reference: Frame, current: Frame, links: Links, parameters: Parameters, resolution: float
    ) -> RelativePose:
        """Estimate the camera motion between two frames, in metres for stereo frames.

        With the parameter `refine` off, the points are refined here for the pose alone, where possible. With one
        camera and many refined points, only the refined points decide, because a successful refinement is evidence for
        a match. Each refined point is weighted by its standard deviation.

        Args:
            reference: the first frame.
            current: the second frame.
            links: the matches between them.
            parameters: the parameters in force.
            resolution: spacing of the positions that the extractor can output, pixels of the current image.
        """
        exact = links if parameters.refine else _refined(reference, current, links, resolution)
        right0, right1 = reference.right, current.right
        options: dict[str, Any] = {
            "max_reprojection_error": parameters.max_reprojection_error,
            "min_inliers": parameters.min_inliers,
        }
        decisive = None
        if right0 is None or right1 is None:
            decisive = decisive_matches(exact.reference_points, exact.points, exact.refined, **options)
        refined = decisive is not None or bool(exact.refined.sum() > REFINABLE * len(exact.refined))
        if not refined:
            exact = links
        options |= {
            "keypoint_resolution": REFINED_RESOLUTION if refined else resolution,
            "independent_points": INDEPENDENT_POINTS if refined else math.inf,
        }
        before = self._before(reference, current)
        if before is not None and before.translation.any() and parameters.motion_prior:
            options["prior"] = before
        points0, points1 = exact.reference_points, exact.points
        sigmas = exact.pair_sigmas if refined else None
        if right0 is None or right1 is None:
            points1 = np.where(np.isfinite(points1), points1, links.points)
            readout = _readout(reference, current, parameters.readout_time)
            options |= {"sigmas": sigmas, "decisive": decisive, "readout": readout, "before": before}
            return estimate_relative_pose(points0, points1, reference.camera, current.camera, **options)
        right_points0 = right0.beside(exact.indices[:, 0], points0)
        right_points1 = right1.beside(exact.indices[:, 1], points1)
        if exact is not links:
            right_points0 = refine(reference.normalized, right0.normalized, points0, right_points0, resolution)
            right_points1 = refine(current.normalized, right1.normalized, points1, right_points1, resolution)
            sigmas = np.ones(len(points0))  # with the known sigmas the covariance would be too small
        # sigmas are passed only where the right points were found from the left ones and share their errors.
        return estimate_stereo_motion(
            points0, right_points0, points1, right_points1, right0.camera, right1.camera, sigmas=sigmas, **options
        )

    def _before(self, reference: Frame, current: Frame) -> Motion | None:
        """Return the previous motion, scaled to this interval, if it ended at the reference and took about as long."""
        if self._last is None:
            return None
        end, before, motion = self._last
        now = current.stamp - reference.stamp
        if end is not reference or max(before, now) > _LARGEST_INTERVAL_RATIO * min(before, now):
            return None
        if before == now:
            return motion
        turn = Rotation.from_matrix(motion.rotation).as_rotvec()
        return Motion(Rotation.from_rotvec(turn * now / before).as_matrix(), motion.translation)


def _refined(reference: Frame, current: Frame, links: Links, resolution: float) -> Links:
    """Refine the points of the links, NaN where that is not possible. Without calibration, return them unchanged."""
    if reference.camera is None or current.camera is None:
        return links
    images = reference.normalized, current.normalized
    found = align_matches(*images, links.reference_points, links.points, resolution)
    points = np.where(found.good[:, None], found.points, np.float32(np.nan))
    pair_sigmas = np.where(found.good, found.sigmas, links.pair_sigmas)
    return replace(links, points=points, refined=found.good, pair_sigmas=pair_sigmas)


def _readout(reference: Frame, current: Frame, readout_time: float) -> float:
    """Return the readout time as a fraction of the interval between two frames; 0 if the interval is not longer."""
    interval = 1e-9 * abs(current.stamp - reference.stamp)
    return readout_time / interval if readout_time < interval else 0.0
