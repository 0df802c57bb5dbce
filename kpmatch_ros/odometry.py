"""Odometry: chains metric relative poses into poses of the camera, with covariances. Does not depend on ROS."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial.transform import Rotation
from scipy.special import chdtri

from kpmatch_ros.frames import Pair
from kpmatch_ros.geometry.pose import Placed, RelativePose, cross_matrix
from kpmatch_ros.geometry.robust import FALSE_ALARM_RATE
from kpmatch_ros.geometry.static_transforms import StaticTransforms, frame_name
from kpmatch_ros.parameters import ParameterError, Parameters

__all__ = ["Odometry", "OdometryPose", "Place", "Twist", "check_odometry", "compose", "frame_fault", "of_base"]

# An odometry frame has x forward, y left and z up (REP-103), relative to the first camera. The camera's own frame is an
# optical frame: z forward, x right.
_FIRST_CAMERA = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])

_SIGNIFICANT = float(chdtri(3, FALSE_ALARM_RATE))  # squared Mahalanobis length from which a translation is not zero


@dataclass(frozen=True, eq=False)
class Twist:
    """Mean velocity of the camera or of the robot's base since the previous frame, in its own axes.

    Attributes:
        velocity: (6,) float64, metres per second along the axes, then radians per second about them.
        covariance: (6, 6) float64 covariance of ``velocity``.
        seconds: time since the previous frame.
    """

    velocity: np.ndarray
    covariance: np.ndarray
    seconds: float


@dataclass(frozen=True, eq=False)
class OdometryPose:
    """Pose of the camera's optical frame in an odometry frame: x_odom = rotation x_camera + position.

    With :func:`of_base` it is the pose of the robot's base.

    Attributes:
        rotation: (3, 3) float64.
        position: (3,) float64, metres.
        covariance: (6, 6) float64, position then rotation about the odometry frame's axes, w in
            R_true = exp([w]x) rotation, as in geometry_msgs/PoseWithCovariance.
        chain: number of breaks of the chain so far. Poses of different chains cannot be compared: each chain has its
            own odometry frame, whose origin is the chain's first camera.
        twist: velocity since the last frame with a pose in the chain; None if the only such frame is an older keyframe,
            or its stamp is not earlier.
    """

    rotation: np.ndarray
    position: np.ndarray
    covariance: np.ndarray
    chain: int
    twist: Twist | None = None


def compose(pose: OdometryPose, step: RelativePose) -> OdometryPose:
    """Return the pose after a step from ``pose``.

    The errors of pose and step are assumed to be independent. The covariance is correct to first order, for errors that
    are added to a position and multiplied to a rotation from the left (adjoint of SE(3); Barfoot and Furgale, IEEE
    Transactions on Robotics 2014).
    """
    moved = pose.rotation @ step.translation
    carried = _lever_arm_jacobian(moved)
    turned = np.kron(np.eye(2), pose.rotation)
    covariance = carried @ pose.covariance @ carried.T + turned @ step.covariance @ turned.T
    return OdometryPose(pose.rotation @ step.rotation, pose.position + moved, covariance, pose.chain)


def of_base(pose: OdometryPose, camera: Placed) -> OdometryPose:
    """Convert the camera's odometry to pose and velocity of the robot's base.

    The origin of the odometry frame is then the first pose of the base, with the base's axes, instead of the camera's.

    Args:
        pose: pose of the camera, in an odometry frame with the first camera as origin.
        camera: constant pose of the camera in the base's frame.
    """
    turn = camera.rotation @ _FIRST_CAMERA.T  # the first camera's odometry frame in the base's axes
    base = -camera.rotation.T @ camera.position  # the base's position in the camera's frame
    rotation = turn @ pose.rotation @ camera.rotation.T
    arm = turn @ pose.rotation @ base
    position = turn @ pose.position + camera.position + arm
    carried = _lever_arm_jacobian(arm) @ np.kron(np.eye(2), turn)
    twist = pose.twist
    if twist is not None:
        linear, angular = np.split(twist.velocity, 2)
        before = Rotation.from_rotvec(-twist.seconds * angular).apply(base)  # the arm at the start, before the rotation
        velocity = np.concatenate([linear + (base - before) / twist.seconds, angular])
        into = np.kron(np.eye(2), camera.rotation)
        moved = into @ _lever_arm_jacobian(base)
        twist = Twist(into @ velocity, moved @ twist.covariance @ moved.T, twist.seconds)
    return OdometryPose(rotation, position, carried @ pose.covariance @ carried.T, pose.chain, twist)


def _lever_arm_jacobian(arm: np.ndarray) -> np.ndarray:
    """Return (6, 6) that maps a small motion (translation, rotation) at the start of a rigid arm to that at its end."""
    carried = np.eye(6)
    carried[:3, 3:] = -cross_matrix(arm)
    return carried


@dataclass(frozen=True, eq=False)
class Place:
    """The pose of a frame in a chain, and the sum of the translations that no pair could distinguish from zero.

    Attributes:
        pose: pose of the frame, without these translations.
        unseen: (6,) the accumulated small motions at the frame, in the order of the pose's covariance.
        spread: (6, 6) covariance of ``unseen``.
    """

    pose: OdometryPose
    unseen: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, pose: OdometryPose) -> Place:
        """Return the place of a pose without unseen motion."""
        return cls(pose, np.zeros(6), np.zeros((6, 6)))

    def after(self, step: RelativePose) -> Place:
        """Return the place after a step.

        A slowly moving camera moves too little to be detected in any single pair, but far over many pairs. So the sum
        of these small motions is tested like the motion of a pair. Once its translation is significant, the sum is
        added to the pose.
        """
        pose = compose(self.pose, step)
        turned = np.kron(np.eye(2), self.pose.rotation)
        carried = _lever_arm_jacobian(self.pose.rotation @ step.translation)
        unseen, spread = carried @ self.unseen, carried @ self.spread @ carried.T
        if step.estimate is None:
            return Place(pose, unseen, spread)
        rotated = Rotation.from_matrix(step.estimate.rotation @ step.rotation.T).as_rotvec()
        unseen = unseen + turned @ np.concatenate([step.estimate.position, rotated])
        spread = spread + turned @ step.covariance @ turned.T
        if unseen[:3] @ np.linalg.pinv(spread[:3, :3], hermitian=True) @ unseen[:3] < _SIGNIFICANT:
            return Place(pose, unseen, spread)
        rotation = Rotation.from_rotvec(unseen[3:]).as_matrix() @ pose.rotation
        return Place.of(replace(pose, rotation=rotation, position=pose.position + unseen[:3]))


class Odometry:
    """Chains the poses of pairs.

    A pair continues the chain if the pose of its reference (the previous frame or a keyframe) is known. It is not known
    after a reset, or if the reference frame had no pose. Then the chain breaks, and the reference starts a new chain.

    A standing camera keeps its position. If a camera moves more slowly than any pair can detect, its position follows
    in steps.

    Attributes:
        breaks: number of breaks of the chain.
    """

    def __init__(self) -> None:
        self.breaks = 0
        self._known: dict[int, Place] = {}  # by number of the frame
        self._begun = False
        # The previous frame: its number, its stamp, its pose, and the covariance of its step.
        self._last: tuple[int, int, OdometryPose, np.ndarray] | None = None

    def forget(self) -> None:
        """Discard the poses of the frames, so that the next pose breaks the chain."""
        self._known = {}

    def add(self, pair: Pair) -> OdometryPose | None:
        """Add a pair, and return the pose of its current frame; None if the pair has no metric pose."""
        pose, reference = pair.pose, pair.reference.number
        origin = self._known.get(reference)
        if not pose.status.is_certain or not pose.metric:
            self._known = {} if origin is None else {reference: origin}
            return None
        if origin is None:
            self.breaks += self._begun
            self._begun = True
            origin = Place.of(OdometryPose(_FIRST_CAMERA, np.zeros(3), np.zeros((6, 6)), self.breaks))
            self._last = None
        place = origin.after(pose)
        self._known = {reference: origin, pair.current.number: place}
        # The accumulated unseen motion arose over many frames, so it is not part of the last frame's velocity. The
        # twist is the measured motion even if it is not significant: a filter that fuses many zeros as measurements
        # would never detect a slow motion.
        if pose.estimate is not None:
            pose = replace(pose, rotation=pose.estimate.rotation, translation=pose.estimate.position)
        return replace(place.pose, twist=self._twist(pair, origin.pose, compose(origin.pose, pose)))

    def _twist(self, pair: Pair, origin: OdometryPose, current: OdometryPose) -> Twist | None:
        """Return the velocity since the previous frame.

        The previous frame is the reference, or another frame that was matched with the same keyframe. In the second
        case the errors of both steps are assumed to be independent. If there is only a keyframe that may be old, there
        is no velocity.
        """
        is_old = self._last is None and pair.current.number != pair.reference.number + 1
        stamp, before, earlier = pair.reference.stamp, origin, np.zeros((6, 6))
        if self._last is not None and self._last[0] != pair.reference.number:
            _, stamp, before, earlier = self._last
        self._last = pair.current.number, pair.current.stamp, current, pair.pose.covariance
        seconds = (pair.current.stamp - stamp) * 1e-9
        if seconds <= 0 or is_old:
            return None
        way = current.position - before.position
        moved = current.rotation.T @ way
        turned = current.rotation.T @ Rotation.from_matrix(current.rotation @ before.rotation.T).as_rotvec()
        # The displacement is expressed in the current camera's axes, so it also has the errors of their rotation.
        seen = _lever_arm_jacobian(-origin.rotation.T @ way)
        spread = seen @ pair.pose.covariance @ seen.T + earlier
        into = np.kron(np.eye(2), pair.pose.rotation.T)  # from the reference's axes to the current camera's
        return Twist(np.concatenate([moved, turned]) / seconds, into @ spread @ into.T / seconds**2, seconds)


def frame_fault(child: str, frame: str, transforms: StaticTransforms | None = None) -> str:
    """Explain why TF cannot place ``child`` in ``frame``. Returns an empty text if it can.

    Args:
        child: child frame of the odometry.
        frame: the odometry frame.
        transforms: the transforms of /tf_static; None if nothing is published to TF.
    """
    if not frame_name(child):
        return (
            "odometry has no child_frame_id and is not published to TF, because the images have no frame_id: have "
            "the camera's driver set it to the camera's optical frame"
        )
    if frame_name(child) == frame_name(frame):
        return (
            f"odometry would place the frame {child!r:.80} in itself, so it is not published to TF: odom_frame must "
            "differ from base_frame, or without base_frame from the frame_id of the images"
        )
    above = [] if transforms is None else transforms.above(child)
    if frame_name(frame) in above or (transforms is not None and frame_name(child) in transforms.above(frame)):
        return (
            f"odometry is not published to TF: /tf_static already connects {child!r:.80} and {frame!r:.80}, as if "
            "they did not move. Remove that transform, or set publish_tf to false"
        )
    if above:
        return (
            f"odometry is not published to TF: a frame can have only one parent, and /tf_static gives {child!r:.80} "
            f"the parent {above[0]!r:.80}. Set base_frame to {above[-1]!r:.80}, or publish_tf to false"
        )
    return ""


def check_odometry(parameters: Parameters) -> None:
    """Check, before the networks are loaded, that odometry is not requested for one camera.

    Raises:
        ParameterError: if it is.
    """
    if parameters.publish_odometry and parameters.mode != "stereo":
        raise ParameterError("publish_odometry needs mode stereo: the poses of one camera have no metric scale")
