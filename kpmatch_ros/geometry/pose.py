"""Poses: of a camera in the world, and of one camera in another's frame."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

__all__ = ["Placed", "Pose", "PoseStatus", "RelativePose", "cross_matrix", "relative_motion"]


class Placed(Protocol):
    """Anything with a pose in the world: x_world = rotation x_camera + position."""

    @property
    def rotation(self) -> NDArray[np.float64]:
        """(3, 3)."""

    @property
    def position(self) -> NDArray[np.float64]:
        """(3,), metres."""


class Pose(NamedTuple):
    """Pose of a camera in the world: x_world = rotation x_camera + position."""

    rotation: NDArray[np.float64]  # (3, 3)
    position: NDArray[np.float64]  # (3,), metres


class PoseStatus(IntEnum):
    """Whether there is a pose, or why there is none: the statuses of msg/RelativePose."""

    OK = 0
    NO_CALIBRATION = 1
    TOO_FEW_MATCHES = 2
    NO_TRANSLATION = 3
    FAILED = 4
    INTERRUPTED = 5
    AMBIGUOUS = 6

    @property
    def has_pose(self) -> bool:
        """Whether there is a rotation, and a translation or its absence. Of an AMBIGUOUS one it is the likelier."""
        return self.is_certain or self is PoseStatus.AMBIGUOUS

    @property
    def is_certain(self) -> bool:
        """Whether one motion alone explains the matches: what may be chained."""
        return self in (PoseStatus.OK, PoseStatus.NO_TRANSLATION)


@dataclass(frozen=True, eq=False)
class RelativePose:
    """Pose of the current camera (image 1) in the reference camera's optical frame (image 0): x_ref = R x_cur + t.

    Never holds NaN or infinity.

    Attributes:
        status: OK; NO_TRANSLATION (standing still, or pure rotation: the translation is zero); AMBIGUOUS (two motions
            explain the matches alike: the likelier one, and a covariance that covers both); otherwise the reason why
            there is no pose, and identity in its place.
        rotation: (3, 3) float64, R.
        translation: (3,) float64, t: a unit vector; in metres where `metric` is true; or zero.
        covariance: (6, 6) float64 in the order of geometry_msgs/PoseWithCovariance: translation x y z, then rotation
            in radians about the fixed axes x y z of the reference frame, w in R_true = exp([w]x) R. A unit vector has
            no variance along itself. With NO_TRANSLATION of two views the translation's block is identity / 3, that of
            a unit vector of unknown direction. Without a pose all is zero, which ROS reads as unknown.
        metric: the translation is in metres.
        num_matches: matches given.
        num_inliers: matches that agree with the pose.
        median_parallax: median displacement of the inliers once the rotation is removed, pixels of the reference image.
        inliers: (num_matches,) bool: which matches are within the largest reprojection error of the pose and in front
            of both cameras; None if nothing was estimated.
        doubted: (num_matches,) bool: with NO_TRANSLATION, which of the matches that are no inliers agree with a
            translation, which things that move by themselves may have made as well; None where there is none.
        estimate: with NO_TRANSLATION in metres, the motion whose translation could not be told from zero, and of which
            the covariance is; None otherwise.
    """

    status: PoseStatus
    rotation: np.ndarray
    translation: np.ndarray
    covariance: np.ndarray
    metric: bool
    num_matches: int
    num_inliers: int
    median_parallax: float
    inliers: np.ndarray | None
    estimate: Pose | None = None
    doubted: np.ndarray | None = None

    @property
    def is_placed(self) -> bool:
        """Whether the current camera has a place beside the reference camera.

        Of one camera an AMBIGUOUS pose is one, the likelier of two: planes give such a pose for every pair.
        """
        return self.status.is_certain or (self.status is PoseStatus.AMBIGUOUS and not self.metric)

    @property
    def angle(self) -> float:
        """How far the camera turned, radians."""
        return float(Rotation.from_matrix(self.rotation).magnitude())

    def for_matches(self, inliers: np.ndarray) -> RelativePose:
        """The same pose for other matches, of which some (num_matches,) bool agree with it."""
        num_inliers = int(inliers.sum())
        return replace(self, num_matches=len(inliers), num_inliers=num_inliers, inliers=inliers, doubted=None)

    def for_copies(self, which: np.ndarray) -> RelativePose:
        """The same pose where each of M matches is equal to one of those that it is from, of the indices (M,)."""
        if self.inliers is None:
            return replace(self, num_matches=len(which))
        doubted = None if self.doubted is None else self.doubted[which]
        return replace(self.for_matches(self.inliers[which]), doubted=doubted)

    @classmethod
    def undefined(cls, status: PoseStatus, num_matches: int, inliers: np.ndarray | None = None) -> RelativePose:
        """No pose, and the reason: identity, zero covariance. With FAILED no match is an inlier, unless told."""
        if status is PoseStatus.FAILED and inliers is None:
            inliers = np.zeros(num_matches, bool)
        return cls(
            status=status,
            rotation=np.eye(3),
            translation=np.zeros(3),
            covariance=np.zeros((6, 6)),
            metric=False,
            num_matches=num_matches,
            num_inliers=0 if inliers is None else int(inliers.sum()),
            median_parallax=0.0,
            inliers=inliers,
        )


def relative_motion(reference: Placed, current: Placed) -> Pose:
    """Pose of the current camera in the reference camera's optical frame: x_ref = rotation x_cur + position."""
    return Pose(reference.rotation.T @ current.rotation, reference.rotation.T @ (current.position - reference.position))


def cross_matrix(vector: np.ndarray) -> np.ndarray:
    """The matrix (3, 3) of the cross product with a vector (3,) on the left."""
    x, y, z = vector
    return np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
