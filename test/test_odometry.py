"""Tests of chained poses: the camera's pose, a covariance that grows like the errors, and visible breaks."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from scipy.stats import chi2
from stereo_scenes import Scene

from kpmatch_ros.bags.trajectory import Trajectory
from kpmatch_ros.geometry.pose import Pose, PoseStatus, RelativePose
from kpmatch_ros.odometry import Odometry, OdometryPose, compose

TURN, STEP = np.array([0.02, -0.3, 0.01]), np.array([0.1, 0.02, 0.5])
SPREAD = np.diag([0.01, 0.02, 0.03, 0.004, 0.006, 0.002])
SPREAD[0, 4] = 0.003  # position and rotation of a step are correlated


def step(translation: np.ndarray = STEP, turn: np.ndarray = TURN, status: PoseStatus = PoseStatus.OK) -> RelativePose:
    return RelativePose(status, cv2.Rodrigues(turn)[0], translation, SPREAD @ SPREAD.T, True, 100, 90, 5.0, None)


def pair(reference: int, current: int, pose: RelativePose | None = None, reset: bool = False) -> Any:
    return SimpleNamespace(
        reference=SimpleNamespace(number=reference, stamp=0),
        current=SimpleNamespace(number=current, stamp=0),
        reset=reset,
        pose=step() if pose is None else pose,
    )


LOST = RelativePose.undefined(PoseStatus.TOO_FEW_MATCHES, 3)


def test_forward_is_x_of_the_odometry_frame_and_left_is_y() -> None:
    odometry = Odometry()
    first = odometry.add(pair(1, 2, step(np.array([0, 0, 1.0]), np.zeros(3)), reset=True))
    second = odometry.add(pair(2, 3, step(np.array([-1.0, 0, 0]), np.zeros(3))))
    third = odometry.add(pair(3, 4, step(np.array([0, -1.0, 0]), np.zeros(3))))
    assert first is not None and second is not None and third is not None
    np.testing.assert_allclose([first.position, second.position, third.position], [[1, 0, 0], [1, 1, 0], [1, 1, 1]])


def test_the_covariance_agrees_with_the_errors_of_chained_poses() -> None:
    random, trials, steps = np.random.default_rng(0), 1000, 6
    exact = start = OdometryPose(np.eye(3), np.zeros(3), np.zeros((6, 6)), 0)
    for _ in range(steps):
        exact = compose(exact, step())
    values = []
    for _ in range(trials):
        pose = start
        for _ in range(steps):
            error = SPREAD @ random.normal(size=6)
            noisy = cv2.Rodrigues(cv2.Rodrigues(error[3:])[0] @ cv2.Rodrigues(TURN)[0])[0].ravel()
            pose = compose(pose, step(STEP + error[:3], noisy))
        turn = cv2.Rodrigues(exact.rotation @ pose.rotation.T)[0].ravel()
        error = np.concatenate([exact.position - pose.position, turn])
        values.append(error @ np.linalg.solve(pose.covariance, error))
    low, high = chi2.ppf([0.001, 0.999], 6 * trials) / trials
    assert low < np.mean(values) < high


def test_the_uncertainty_grows_even_while_the_camera_stands() -> None:
    odometry = Odometry()
    poses = [
        odometry.add(pair(i, i + 1, step(np.zeros(3), np.zeros(3), PoseStatus.NO_TRANSLATION), i == 1))
        for i in range(1, 6)
    ]
    sizes = [np.trace(pose.covariance) for pose in poses if pose is not None]
    assert len(sizes) == 5 and sizes == sorted(set(sizes))


def chain(scene: Scene, steps: int = 25) -> tuple[list[PoseStatus], OdometryPose]:
    """Chain the poses of a stereo pair that has the same motion in every step.

    Wherever odometry has a pose, a replay has the same one, except for the axes of the frame.
    """
    odometry, trajectory, statuses = Odometry(), Trajectory(), []
    for i in range(1, steps + 1):
        found = scene.estimate(150, seed=i)
        made = pair(i, i + 1, found, reset=i == 1)
        if i == 1:
            trajectory.add(made.reference, None)
        trajectory.add(made.current, made)
        pose = odometry.add(made)
        statuses.append(found.status)
        assert pose is not None
        rotation, (x, y, z) = trajectory.pose
        np.testing.assert_allclose(pose.position, [z, -x, -y], atol=1e-9)
        np.testing.assert_allclose(pose.rotation, [[0, 0, 1], [-1, 0, 0], [0, -1, 0]] @ rotation.as_matrix(), atol=1e-9)
    return statuses, pose


def test_slow_motion_adds_up_although_most_pairs_do_not_detect_it() -> None:
    moved = np.array([0.05e-3, 0.02e-3, 0.2e-3])
    statuses, pose = chain(Scene(rotation=(0, 0, 0), translation=tuple(moved), noise=0.1))
    assert statuses.count(PoseStatus.NO_TRANSLATION) > 0.8 * len(statuses)
    error = 25 * moved[[2, 0, 1]] * (1, -1, -1) - pose.position
    assert error @ np.linalg.solve(pose.covariance[:3, :3], error) < 25, "a test of 16.3, and noise since it was passed"
    turned = cv2.Rodrigues(np.array([[0, 0, 1.0], [-1, 0, 0], [0, -1, 0]]) @ pose.rotation.T)[0].ravel()
    assert turned @ np.linalg.solve(pose.covariance[3:, 3:], turned) < 25


def test_a_standing_camera_keeps_its_position() -> None:
    statuses, pose = chain(Scene(rotation=(0, 0, 0), translation=(0, 0, 0), noise=0.1))
    assert set(statuses) == {PoseStatus.NO_TRANSLATION} and not pose.position.any()


def test_undetected_motion_is_added_later_and_a_twist_covers_only_its_own_step() -> None:
    """The camera moves slowly and undetected, then by a metre, and then slowly until the motion is detected."""
    still, creep = np.eye(3), np.array([0.0, 0.0, 0.004])
    spread = np.diag([1e-6] * 3 + [1e-8] * 3)
    unseen = RelativePose(
        PoseStatus.NO_TRANSLATION, still, np.zeros(3), spread, True, 100, 90, 0.1, None,
        Pose(cv2.Rodrigues(np.array([0, 1e-4, 0]))[0], creep),
    )  # fmt: skip
    small = replace(unseen, estimate=Pose(unseen.estimate.rotation, creep / 2)) if unseen.estimate else unseen
    walk = RelativePose(PoseStatus.OK, still, np.array([1.0, 0, 0]), spread, True, 100, 90, 9.0, None)
    odometry, poses = Odometry(), []
    for i, each in enumerate([small, walk, unseen], 1):
        made = pair(i, i + 1, each, reset=i == 1)
        made.reference.stamp, made.current.stamp = i * 10**9, (i + 1) * 10**9
        poses.append(odometry.add(made))
    first, second, third = poses
    assert first is not None and second is not None and third is not None and third.twist is not None
    assert not first.position.any()
    np.testing.assert_allclose(second.position, [0, -1, 0])
    # The rotation by 1e-4 about the camera's y axis before the large motion moves its end back by 0.1 mm.
    np.testing.assert_allclose(third.position, [0.006 - 1e-4, -1, 0], atol=1e-8)
    np.testing.assert_allclose(third.twist.velocity, [*creep, 0, 1e-4, 0], atol=1e-6)
    assert np.trace(third.covariance) > np.trace(second.covariance)


@pytest.mark.parametrize(("metric", "breaks", "steps"), [(False, 0, 4), (True, 1, 3)])
def test_a_monocular_chain_continues_with_the_likelier_motion_and_marks_it_as_ambiguous(
    metric: bool, breaks: int, steps: int
) -> None:
    """A frame that is AMBIGUOUS becomes the next reference. For a stereo pair this is so only for a second one."""
    stream, turn = io.StringIO(), np.array([0, np.radians(10), 0])
    trajectory = Trajectory(stream)
    trajectory.add(pair(0, 1).reference, None)
    for number, status in enumerate((PoseStatus.OK, PoseStatus.AMBIGUOUS, PoseStatus.OK, PoseStatus.OK)):
        made = pair(number, number + 1, replace(step(turn=turn, status=status), metric=metric))
        trajectory.add(made.current, made)
    rotation, _ = trajectory.pose
    assert np.degrees(rotation.magnitude()) == pytest.approx(10 * steps)
    assert (trajectory.breaks, trajectory.doubts) == (breaks, 1 - breaks)
    text = stream.getvalue()
    assert ("# broken" in text, "# ambiguous" in text) == (bool(breaks), not breaks)
    assert sum(not line.startswith("#") for line in text.splitlines()) == 4, "it has no line itself"


def lines(*steps: tuple[int, int, PoseStatus] | None) -> tuple[list[str], Trajectory]:
    """Chain pairs, given by the numbers of their frames and their status; None is a frame after an interruption."""
    stream = io.StringIO()
    trajectory = Trajectory(stream)
    trajectory.add(pair(0, 1).reference, None)
    for made in steps:
        if made is None:
            trajectory.add(pair(8, 9).current, None)
        else:
            number, current, status = made
            pose = step(turn=np.zeros(3), status=status) if status.has_pose else LOST
            found = pair(number, current, replace(pose, metric=False))
            trajectory.add(found.current, found)
    return stream.getvalue().splitlines()[1:], trajectory


def test_a_gap_after_an_ambiguous_pose_that_could_not_be_chained_breaks_the_chain() -> None:
    text, trajectory = lines(
        (0, 1, PoseStatus.OK), (1, 2, PoseStatus.FAILED), (1, 3, PoseStatus.FAILED), (3, 4, PoseStatus.AMBIGUOUS),
        None, (9, 10, PoseStatus.OK),
    )  # fmt: skip
    assert trajectory.breaks == 1 and [line.startswith("# broken") for line in text] == [False, False, True, False]


def test_an_ambiguous_pose_is_marked_only_if_a_later_frame_depends_on_it() -> None:
    ambiguous = (0, 1, PoseStatus.AMBIGUOUS)
    text, trajectory = lines(ambiguous, (0, 2, PoseStatus.OK), (0, 3, PoseStatus.OK))
    assert trajectory.doubts == 0 and not any(line.startswith("#") for line in text), "all depend on the keyframe"
    text, trajectory = lines(ambiguous, (1, 2, PoseStatus.OK), (1, 3, PoseStatus.OK))
    assert trajectory.doubts == 1 and [line.startswith("# ambig") for line in text] == [False, True, False, False]


def test_a_lost_frame_breaks_the_chain_and_a_new_one_begins() -> None:
    odometry = Odometry()
    assert [odometry.add(pair(1, 2, reset=True)).chain, odometry.add(pair(2, 3)).chain] == [0, 0]
    assert odometry.add(pair(3, 4, LOST)) is None and odometry.breaks == 0
    after = odometry.add(pair(4, 5))
    assert after.chain == odometry.breaks == 1
    np.testing.assert_allclose(after.covariance, odometry.add(pair(1, 2, reset=True)).covariance)
    assert odometry.breaks == 2, "its reference is not known any more"


def test_new_tracks_do_not_break_the_chain_if_the_reference_frame_is_known() -> None:
    odometry = Odometry()
    chains = [odometry.add(pair(1, 2, reset=True)).chain, odometry.add(pair(2, 3, reset=True)).chain]
    assert chains == [0, 0] and odometry.breaks == 0


def test_twists_of_a_slowly_moving_camera_average_to_its_velocity() -> None:
    """Each twist may be zero within its covariance, but their average is not."""
    moved, odometry, twists = np.array([0, 0, 0.2e-3]), Odometry(), []
    scene = Scene(rotation=(0, 0, 0), translation=tuple(moved), noise=0.1)
    for i in range(1, 61):
        found = scene.estimate(150, seed=i)
        pose = odometry.add(at(i + 1, i + 1.0, (i, float(i)), found, reset=i == 1))
        assert pose is not None and pose.twist is not None
        twists.append(pose.twist)
    errors = np.array([twist.velocity - [*moved, 0, 0, 0] for twist in twists])
    squares = [error @ np.linalg.solve(twist.covariance, error) for error, twist in zip(errors, twists)]
    assert chi2.ppf(1e-4, 360) < np.sum(squares) < 1.6 * chi2.ppf(1 - 1e-4, 360)
    mean, sigma = errors.mean(axis=0)[2], np.sqrt(twists[0].covariance[2, 2] / 60)
    assert abs(mean) < 4 * sigma < moved[2]


def test_forgetting_starts_a_new_chain_unless_there_was_none() -> None:
    odometry = Odometry()
    odometry.forget()
    chains = []
    for number in range(1, 4):
        chains.append(odometry.add(pair(number, number + 1)).chain)
        odometry.forget()
    assert chains == [0, 1, 2] and odometry.breaks == 2


def test_a_lost_frame_does_not_break_the_chain_if_the_next_one_matches_the_keyframe() -> None:
    odometry = Odometry()
    first = odometry.add(pair(1, 2, reset=True))
    assert odometry.add(pair(1, 3, LOST)) is None
    third = odometry.add(pair(1, 4))
    assert third.chain == 0
    np.testing.assert_allclose(third.position, first.position)


def test_the_covariance_does_not_grow_between_frames_with_the_same_keyframe() -> None:
    odometry = Odometry()
    first, second = odometry.add(pair(1, 2, reset=True)), odometry.add(pair(1, 3))
    np.testing.assert_allclose(first.covariance, second.covariance)
    assert np.trace(odometry.add(pair(3, 4)).covariance) > np.trace(second.covariance)


def test_poses_without_metric_scale_are_not_chained() -> None:
    unit = RelativePose(PoseStatus.OK, np.eye(3), np.array([1.0, 0, 0]), np.eye(6), False, 100, 90, 5.0, None)
    odometry = Odometry()
    assert odometry.add(pair(1, 2, unit, reset=True)) is None and odometry.breaks == 0


def test_an_ambiguous_pose_is_a_pose_but_is_not_chained() -> None:
    assert [status.name for status in PoseStatus if status.has_pose] == ["OK", "NO_TRANSLATION", "AMBIGUOUS"]
    assert [status.name for status in PoseStatus if status.is_certain] == ["OK", "NO_TRANSLATION"]
    odometry = Odometry()
    assert odometry.add(pair(1, 2, step(status=PoseStatus.AMBIGUOUS), reset=True)) is None


def test_the_twist_is_the_motion_since_the_previous_frame_even_with_a_keyframe() -> None:
    """0.5 m forward and 0.3 rad about y per frame, at ten frames per second, in the camera's own frame."""

    def at(reference: int, current: int, count: int) -> Any:
        turn = np.array([0, 0.03 * count, 0])
        # The steps of a screw motion along its own axes: the relative motion is the same for all frames.
        moved, rotation = np.zeros(3), np.eye(3)
        for _ in range(count):
            moved = moved + rotation @ np.array([0, 0, 0.5])
            rotation = rotation @ cv2.Rodrigues(np.array([0, 0.03, 0]))[0]
        made = pair(reference, current, step(moved, turn), reset=current == 2)
        made.reference.stamp, made.current.stamp = reference * 10**8, current * 10**8
        return made

    chained, keyframe = Odometry(), Odometry()
    steps = [chained.add(at(1, 2, 1)), chained.add(at(2, 3, 1)), chained.add(at(3, 4, 1))]
    seen = [keyframe.add(at(1, 2, 1)), keyframe.add(at(1, 3, 2)), keyframe.add(at(1, 4, 3))]
    back = cv2.Rodrigues(np.array([0, -0.03, 0]))[0]
    for pose in [*steps, *seen]:
        assert pose is not None and pose.twist is not None
        np.testing.assert_allclose(pose.twist.velocity, [*(back @ [0, 0, 5.0]), 0, 0.3, 0], atol=1e-9)
    assert steps[1] is not None and steps[1].twist is not None and seen[1] is not None and seen[1].twist is not None
    assert np.trace(seen[1].twist.covariance) > 1.5 * np.trace(steps[1].twist.covariance)


def test_the_twists_covariance_agrees_with_the_errors_of_the_poses() -> None:
    """2 m per frame: a rotation error changes the direction of the velocity in the camera's own axes."""
    generator, draws = np.random.default_rng(0), 1000
    first, second = np.array([0.1, 0, 2.0]), np.array([0.3, 0, 4.0])

    def twist(reference: int, errors: np.ndarray) -> Any:
        """Return the twist of a chain of two steps (reference 2), or of two steps from one keyframe (reference 1)."""
        odometry = Odometry()
        ways = [(1, 2, first, 0.03), (reference, 3, first if reference == 2 else second, 0.03 * (3 - reference))]
        for (before, after, way, angle), error in zip(ways, errors):
            rotation = cv2.Rodrigues(np.array([0, angle, 0]))[0]
            erring = cv2.Rodrigues(cv2.Rodrigues(error[3:])[0] @ rotation)[0].ravel()
            made = pair(before, after, step(way + error[:3], erring), reset=after == 2)
            made.reference.stamp, made.current.stamp = before * 10**8, after * 10**8
            pose = odometry.add(made)
        assert pose is not None and pose.twist is not None
        return pose.twist

    for reference in (2, 1):
        nominal = twist(reference, np.zeros((2, 6)))
        drawn = generator.normal(size=(draws, 2, 6)) @ SPREAD.T
        off = np.array([twist(reference, errors).velocity - nominal.velocity for errors in drawn])
        squares = np.einsum("ni,ij,nj->n", off, np.linalg.inv(nominal.covariance), off)
        assert squares.mean() == pytest.approx(6, abs=5 * np.sqrt(12 / draws))  # chi-square with mean 6, five sigma


def test_without_time_between_two_frames_there_is_no_twist() -> None:
    pose = Odometry().add(pair(1, 2, reset=True))
    assert pose is not None and pose.twist is None


def at(number: int, seconds: float, reference: tuple[int, float], pose: RelativePose, reset: bool = False) -> Any:
    found = pair(reference[0], number, pose, reset)
    found.reference.stamp, found.current.stamp = round(reference[1] * 1e9), round(seconds * 1e9)
    return found


def test_the_velocity_covers_the_time_since_the_last_pose_not_since_an_old_keyframe() -> None:
    odometry, keyframe = Odometry(), (1, 0.0)
    stands = step(np.zeros(3), np.zeros(3), PoseStatus.NO_TRANSLATION)
    odometry.add(at(2, 4.0, keyframe, stands, reset=True))
    assert odometry.add(at(3, 4.1, keyframe, LOST)) is None
    moved = odometry.add(at(4, 4.2, keyframe, step(np.array([0, 0, 0.2]), np.zeros(3))))
    assert moved is not None and moved.twist is not None
    np.testing.assert_allclose(moved.twist.velocity[:3], [0, 0, 1.0], atol=1e-9)  # 0.2 m in 0.2 s, not in 4.2 s


def test_a_chain_that_starts_at_an_old_keyframe_has_a_position_but_no_velocity_yet() -> None:
    odometry, keyframe = Odometry(), (1, 0.0)
    odometry.add(at(2, 4.0, keyframe, step(), reset=True))
    odometry.forget()
    again = odometry.add(at(3, 4.1, keyframe, step()))
    assert again is not None and again.chain == 1 and again.twist is None
    further = odometry.add(at(4, 4.2, keyframe, step(2 * STEP, 2 * TURN)))
    assert further is not None and further.twist is not None
