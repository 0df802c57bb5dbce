"""Poses of a camera in the world, and of one camera in another camera's frame."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

__all__ = ["Placed", "Pose", "PoseStatus", "RelativePose", "cross_matrix", "relative_motion"]


class Placed(Protocol):
    """An object with a pose in the world: x_world = rotation x_camera + position."""

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
    """Status of a pose, or the reason why there is none: the statuses of msg/RelativePose."""

    OK = 0
    NO_CALIBRATION = 1
    TOO_FEW_MATCHES = 2
    NO_TRANSLATION = 3
    FAILED = 4
    INTERRUPTED = 5
    AMBIGUOUS = 6

    @property
    def has_pose(self) -> bool:
        """Whether there is a rotation, and a translation or zero. AMBIGUOUS has the likelier of two poses."""
        return self.is_certain or self is PoseStatus.AMBIGUOUS

    @property
    def is_certain(self) -> bool:
        """Whether only one motion explains the matches. Such poses can be chained."""
        return self in (PoseStatus.OK, PoseStatus.NO_TRANSLATION)


@dataclass(frozen=True, eq=False)
class RelativePose:
    """Pose of the current camera (image 1) in the reference camera's optical frame (image 0): x_ref = R x_cur + t.

    No value is NaN or infinite.

    Attributes:
        status: OK; NO_TRANSLATION (camera at rest or in pure rotation: the translation is zero); AMBIGUOUS (two motions
            explain the matches equally well: the pose is the likelier one, and the covariance covers both); otherwise
            the reason why there is no pose, which is then the identity.
        rotation: (3, 3) float64, R.
        translation: (3,) float64, t: in metres if `metric` is true, otherwise a unit vector; or zero.
        covariance: (6, 6) float64 in the order of geometry_msgs/PoseWithCovariance: translation x y z, then rotation
            in radians about the fixed axes x y z of the reference frame, w in R_true = exp([w]x) R. A unit vector has
            no variance along itself. With NO_TRANSLATION of two views, the translation's block is identity / 3, that of
            a unit vector of unknown direction. Without a pose, all elements are zero, which ROS reads as unknown.
        metric: whether the translation is in metres.
        num_matches: number of given matches.
        num_inliers: number of matches that agree with the pose.
        median_parallax: median displacement of the inliers without the rotation, pixels of the reference image.
        inliers: (num_matches,) bool: matches within the largest reprojection error of the pose and in front of both
            cameras; None if nothing was estimated.
        undecided: (num_matches,) bool: with NO_TRANSLATION, the matches that are not inliers but agree with a rejected
            translation, which moving objects may have caused; None without such a translation.
        estimate: with NO_TRANSLATION in metres, the motion whose translation could not be distinguished from zero; the
            covariance belongs to it; otherwise None.
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
    undecided: np.ndarray | None = None

    @property
    def is_placed(self) -> bool:
        """Whether the current camera has a position relative to the reference camera.

        This includes an AMBIGUOUS pose of one camera, the likelier of two, because every pair of views of a plane
        gives such a pose.
        """
        return self.status.is_certain or (self.status is PoseStatus.AMBIGUOUS and not self.metric)

    @property
    def angle(self) -> float:
        """Rotation angle of the camera, radians."""
        return float(Rotation.from_matrix(self.rotation).magnitude())

    def for_matches(self, inliers: np.ndarray) -> RelativePose:
        """The same pose for other matches, with their inliers (num_matches,) bool."""
        num_inliers = int(inliers.sum())
        return replace(self, num_matches=len(inliers), num_inliers=num_inliers, inliers=inliers, undecided=None)

    def for_copies(self, which: np.ndarray) -> RelativePose:
        """The same pose for M matches with duplicates. `which` (M,) are their indices in the pose's own matches."""
        if self.inliers is None:
            return replace(self, num_matches=len(which))
        undecided = None if self.undecided is None else self.undecided[which]
        return replace(self.for_matches(self.inliers[which]), undecided=undecided)

    @classmethod
    def undefined(cls, status: PoseStatus, num_matches: int, inliers: np.ndarray | None = None) -> RelativePose:
        """No pose, and the reason: identity, zero covariance. With FAILED, no match is an inlier unless given."""
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
    """The matrix (3, 3) of the cross product with a vector (3,) as the left factor."""
    x, y, z = vector
    return np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
