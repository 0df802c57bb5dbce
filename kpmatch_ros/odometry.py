"""Chains relative poses in metres: where the camera is, and how sure that is. No ROS in here."""

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

# An odometry frame has x forward, y left and z up (REP-103), seen from the first camera. The camera's own frame is an
# optical one: z forward, x right.
_FIRST_CAMERA = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])

_TOLD = float(chdtri(3, FALSE_ALARM_RATE))  # of a squared translation, in units of its covariance: it is not zero


@dataclass(frozen=True, eq=False)
class Twist:
    """Mean velocity of the camera, or of the robot's base, since the frame before, in its own axes.

    Attributes:
        velocity: (6,) float64, metres per second along the axes, then radians per second about them.
        covariance: (6, 6) float64 of these.
        seconds: since the frame before.
    """

    velocity: np.ndarray
    covariance: np.ndarray
    seconds: float


@dataclass(frozen=True, eq=False)
class OdometryPose:
    """Pose of the camera's optical frame in an odometry frame: x_odom = rotation x_camera + position.

    Or that of the robot's base, see :func:`of_base`.

    Attributes:
        rotation: (3, 3) float64.
        position: (3,) float64, metres.
        covariance: (6, 6) float64, position then rotation about the odometry frame's axes, w in
            R_true = exp([w]x) rotation, as in geometry_msgs/PoseWithCovariance.
        chain: how many times the chain of poses broke before. Poses of two chains cannot be compared: each chain has
            an odometry frame of its own, and its first camera is the origin.
        twist: velocity since the last frame with a pose in the chain; None where there is none but an older keyframe,
            or where its stamp is not earlier.
    """

    rotation: np.ndarray
    position: np.ndarray
    covariance: np.ndarray
    chain: int
    twist: Twist | None = None


def compose(pose: OdometryPose, step: RelativePose) -> OdometryPose:
    """The pose after a step from it.

    Errors of pose and step are taken to be independent. The covariance is right to first order, for errors that are
    added to a position and multiplied to a rotation from the left (adjoint of SE(3); Barfoot and Furgale, IEEE
    Transactions on Robotics 2014).
    """
    moved = pose.rotation @ step.translation
    carried = _at_the_end_of(moved)
    turned = np.kron(np.eye(2), pose.rotation)
    covariance = carried @ pose.covariance @ carried.T + turned @ step.covariance @ turned.T
    return OdometryPose(pose.rotation @ step.rotation, pose.position + moved, covariance, pose.chain)


def of_base(pose: OdometryPose, camera: Placed) -> OdometryPose:
    """The pose and velocity of a robot's base, whose camera has this odometry.

    The odometry frame then begins where the base is at first, with the base's axes, instead of the camera's.

    Args:
        pose: of the camera, in an odometry frame that begins at the first camera.
        camera: its pose in the base's frame, which does not change.
    """
    turn = camera.rotation @ _FIRST_CAMERA.T  # the first camera's odometry frame, seen from the base
    base = -camera.rotation.T @ camera.position  # the base, seen from the camera
    rotation = turn @ pose.rotation @ camera.rotation.T
    arm = turn @ pose.rotation @ base
    position = turn @ pose.position + camera.position + arm
    carried = _at_the_end_of(arm) @ np.kron(np.eye(2), turn)
    twist = pose.twist
    if twist is not None:
        linear, angular = np.split(twist.velocity, 2)
        before = Rotation.from_rotvec(-twist.seconds * angular).apply(base)  # as far as it turned with the camera
        velocity = np.concatenate([linear + (base - before) / twist.seconds, angular])
        into = np.kron(np.eye(2), camera.rotation)
        moved = into @ _at_the_end_of(base)
        twist = Twist(into @ velocity, moved @ twist.covariance @ moved.T, twist.seconds)
    return OdometryPose(rotation, position, carried @ pose.covariance @ carried.T, pose.chain, twist)


def _at_the_end_of(arm: np.ndarray) -> np.ndarray:
    """(6, 6): a small motion, translation then rotation, at the end of a rigid arm, from that at its beginning."""
    carried = np.eye(6)
    carried[:3, 3:] = -cross_matrix(arm)
    return carried


@dataclass(frozen=True, eq=False)
class Place:
    """The pose of a frame in a chain, and the translations on the way that none of the pairs could tell from zero.

    Attributes:
        pose: of the frame, without them.
        unseen: (6,) what they come to at the frame, in the order of the pose's covariance.
        spread: (6, 6) covariance of that.
    """

    pose: OdometryPose
    unseen: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, pose: OdometryPose) -> Place:
        """A pose of which nothing is unseen."""
        return cls(pose, np.zeros(6), np.zeros((6, 6)))

    def after(self, step: RelativePose) -> Place:
        """Where a step leads from there.

        A camera that creeps moves too little to be seen in any pair, and far in many. What all of them come to is
        tested as each pair is, and taken into the pose where it is not zero.
        """
        pose = compose(self.pose, step)
        turned = np.kron(np.eye(2), self.pose.rotation)
        carried = _at_the_end_of(self.pose.rotation @ step.translation)
        unseen, spread = carried @ self.unseen, carried @ self.spread @ carried.T
        if step.estimate is None:
            return Place(pose, unseen, spread)
        rotated = Rotation.from_matrix(step.estimate.rotation @ step.rotation.T).as_rotvec()
        unseen = unseen + turned @ np.concatenate([step.estimate.position, rotated])
        spread = spread + turned @ step.covariance @ turned.T
        if unseen[:3] @ np.linalg.pinv(spread[:3, :3], hermitian=True) @ unseen[:3] < _TOLD:
            return Place(pose, unseen, spread)
        rotation = Rotation.from_rotvec(unseen[3:]).as_matrix() @ pose.rotation
        return Place.of(replace(pose, rotation=rotation, position=pose.position + unseen[:3]))


class Odometry:
    """Chains the poses of pairs.

    A pair continues the chain where the pose of its reference is known: the frame before, or a keyframe. It is not
    known after a reset, or where that frame had no pose. Then the chain breaks, and the reference begins a new one.

    A camera that stands keeps its place. Where it creeps, by less than any pair can tell, its place follows by steps.

    Attributes:
        breaks: how many times the chain broke.
    """

    def __init__(self) -> None:
        self.breaks = 0
        self._known: dict[int, Place] = {}  # by the frame's number
        self._begun = False
        self._last: tuple[int, int, OdometryPose, np.ndarray] | None = None  # the frame before: number, stamp, step

    def forget(self) -> None:
        """Forget where the frames are, so that the next pose breaks the chain."""
        self._known = {}

    def add(self, pair: Pair) -> OdometryPose | None:
        """The pose of the pair's current frame; None where the pair has no pose in metres."""
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
        # What was unseen came about in many frames: it is no velocity of the last one. A twist is what was measured,
        # also where that may be zero: a filter that takes many such zeros for measurements never learns of a creep.
        if pose.estimate is not None:
            pose = replace(pose, rotation=pose.estimate.rotation, translation=pose.estimate.position)
        return replace(place.pose, twist=self._twist(pair, origin.pose, compose(origin.pose, pose)))

    def _twist(self, pair: Pair, origin: OdometryPose, current: OdometryPose) -> Twist | None:
        """The velocity since the frame before.

        That frame is the reference, or another one that was matched with the same keyframe. Then the errors of both
        steps are taken to be independent. A keyframe by itself may be old: it tells where the camera is, not how fast.
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
        # The current camera sees the way in its own axes, which err as its rotation does.
        seen = _at_the_end_of(-origin.rotation.T @ way)
        spread = seen @ pair.pose.covariance @ seen.T + earlier
        into = np.kron(np.eye(2), pair.pose.rotation.T)  # from the reference's axes to the current camera's
        return Twist(np.concatenate([moved, turned]) / seconds, into @ spread @ into.T / seconds**2, seconds)


def frame_fault(child: str, frame: str, transforms: StaticTransforms | None = None) -> str:
    """Why TF cannot place one frame in the other, in words; empty where it can.

    Args:
        child: the frame that odometry places.
        frame: the one that it is placed in.
        transforms: what /tf_static says; None where TF is left alone.
    """
    if not frame_name(child):
        return (
            "odometry has no child_frame_id and is not published into TF, as the images have no frame_id: have the "
            "camera's driver name its optical frame"
        )
    if frame_name(child) == frame_name(frame):
        return (
            f"odometry places the frame {child!r:.80} in itself and is not published into TF: odom_frame must be "
            "another frame than base_frame, or without base_frame than the frame_id of the images"
        )
    above = [] if transforms is None else transforms.above(child)
    if frame_name(frame) in above or (transforms is not None and frame_name(child) in transforms.above(frame)):
        return (
            f"odometry is not published into TF: /tf_static joins {child!r:.80} and {frame!r:.80} already, as if "
            "nothing moved. Leave that transform out, or set publish_tf to false"
        )
    if above:
        return (
            f"odometry is not published into TF: a frame has one parent, and {child!r:.80} has {above[0]!r:.80} by "
            f"/tf_static. Set base_frame to {above[-1]!r:.80}, or publish_tf to false"
        )
    return ""


def check_odometry(parameters: Parameters) -> None:
    """Refuse odometry of one camera, before its networks are loaded.

    Raises:
        ParameterError: when it is asked for.
    """
    if parameters.publish_odometry and parameters.mode != "stereo":
        raise ParameterError("publish_odometry needs mode stereo: the poses of one camera are without metres")
