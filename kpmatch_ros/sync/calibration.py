"""Chooses the calibration of the camera, or of the stereo pair, for each image, and finds what is odd about it."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kpmatch_ros.geometry.camera import CalibrationError, Camera, camera_info_field
from kpmatch_ros.geometry.lens import listed
from kpmatch_ros.geometry.static_transforms import frame_name
from kpmatch_ros.geometry.stereo_camera import StereoCamera

__all__ = ["Calibration", "Doubt"]

_KEPT = 100  # camera_infos of a camera that are kept while time goes forward, even if later ones are in use
_INFO_BYTES = 2000  # size of a camera_info's fixed fields, and of the Python objects that hold them
# Largest distance of a principal point from the centre of the full image, as a fraction of half the side. Lenses are
# centred to a few hundredths, cheap ones to a tenth. If the point is further off than _OFF_CENTRE along both sides, by
# the same factor, K probably was not scaled with the image. If it is further off than _FAR_OFF_CENTRE along one side,
# it is probably not that of this image either.
_OFF_CENTRE = 0.2
_FAR_OFF_CENTRE = 0.4
_ALIKE = 0.15  # largest relative difference of the factors along both sides that counts as the same factor
_LARGEST_TANGENTIAL = 0.01  # p1 and p2: even a lens that is mounted obliquely has only some thousandths
_PLAUSIBLE_BASELINES = 0.001, 10.0  # metres: a stereo endoscope has 4 mm, the cameras of a lorry are 2 m apart


class Doubt(NamedTuple):
    """A property of a calibration that is possible, but probably not intended."""

    kind: str  # a stable name, with the topic of the images if it concerns one camera
    explanation: str  # for the user


class Calibration:
    """The camera, or the stereo pair of cameras, that the camera_infos describe.

    An image gets the camera_info with its own stamp, or else the last one that is not later than the image, or else the
    newest one. The camera_info may change, for example with a zoom lens or with the resolution, and an image that has
    to wait must not get the camera_info of later images. A camera_info is kept until a later image is processed,
    because an image of its time may still wait.

    One thread may update it while another waits and asks for the camera.

    Args:
        topics: of the images: one, or two for a stereo pair.
        rectified: as the parameter.
        memory: largest size of a camera's camera_infos, bytes, except the newest one. The oldest are dropped.

    Attributes:
        doubts: about the calibration that was requested last.
    """

    def __init__(self, topics: Sequence[str], rectified: bool, memory: int) -> None:
        self.doubts: list[Doubt] = []
        self._topics = topics
        self._rectified = rectified
        self._memory = memory
        self._infos: list[dict[int, Any]] = [{} for _ in topics]  # by stamp, in the order of arrival
        self._held = [0 for _ in topics]  # bytes of the camera_infos, by camera
        self._processed: list[int | None] = [None] * len(topics)  # stamps of the last images in camera_for
        self._changed = threading.Condition()
        self._made_of: tuple[Any, ...] = ()  # the camera_infos of self._camera
        self._frame_ids: Sequence[str] = ()  # of the images for which the doubts were found
        self._camera: Camera | StereoCamera | None = None
        self._fault: CalibrationError | None = None

    def update(self, side: int, stamp: int, info: Any) -> None:
        """Add a camera_info of camera 0 or 1 that has just arrived, with its stamp in nanoseconds."""
        with self._changed:
            infos = self._infos[side]
            self._held[side] += _bytes(info) - _bytes(infos.pop(stamp, None))
            infos[stamp] = info
            while self._held[side] > self._memory and len(infos) > 1:
                self._delete_oldest(side)
            self._changed.notify_all()

    def complete(self, stamps: Sequence[int]) -> bool:
        """Whether no image of a frame, given by the stamps in nanoseconds, has to wait for its camera_info.

        An image has to wait if its camera_info is missing, the previous image's came, and no later one is there. After
        time went back, the camera_infos from before do not count as later.
        """
        with self._changed:
            return self._complete(stamps)

    def wait(self, stamps: Sequence[int], seconds: float) -> None:
        """Wait until the frame is complete, for at most so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._complete(stamps), max(0.0, seconds))

    def _complete(self, stamps: Sequence[int]) -> bool:
        return not any(
            before in infos and stamp not in infos and not _is_past(next(reversed(infos)), stamp, before)
            for infos, before, stamp in zip(self._infos, self._processed, stamps)
        )

    def _forget(self, side: int, stamp: int, used: int) -> None:
        """Drop camera_infos whose images have passed, when an image is processed with the one of stamp `used`.

        Images come in order. If time went back, all camera_infos that arrived before the used one belong to the time
        before the jump and are dropped. Otherwise, later camera_infos belong to images that wait. They are kept, even
        if they arrived before the used one, as when a bag starts again.
        """
        infos, before = self._infos[side], self._processed[side]
        went_back = before is not None and stamp < before
        while infos and used <= stamp and (went_back or len(infos) > _KEPT):
            oldest = next(iter(infos))
            if oldest == used or (oldest > used and not went_back):
                return
            self._delete_oldest(side)

    def _delete_oldest(self, side: int) -> None:
        infos = self._infos[side]
        self._held[side] -= _bytes(infos.pop(next(iter(infos))))

    def camera_for(
        self, sizes: Sequence[tuple[int, int]], stamps: Sequence[int], frame_ids: Sequence[str]
    ) -> Camera | StereoCamera | None:
        """The camera, or the stereo pair, for the images of a frame; None if a calibration is missing.

        Args:
            sizes: width and height of each image, pixels.
            stamps: of each image, nanoseconds.
            frame_ids: of each image; no entries or empty ones if not known.

        Raises:
            CalibrationError: the calibration is invalid, or does not fit images of these sizes.
        """
        with self._changed:
            used = [_time_of(infos, stamp) for infos, stamp in zip(self._infos, stamps)]
            infos = tuple(infos.get(time) for infos, time in zip(self._infos, used))
            for side, stamp in enumerate(stamps):
                self._forget(side, stamp, used[side])
            self._processed = list(stamps)
        if any(info is None for info in infos):
            return None
        same = len(infos) == len(self._made_of) and all(a is b for a, b in zip(infos, self._made_of))
        if not same or frame_ids != self._frame_ids:
            self._made_of, self._frame_ids, self._camera, self._fault, self.doubts = infos, frame_ids, None, None, []
            try:
                self._camera = self._make(infos)
                self.doubts = [
                    *self._baseline_doubts(),
                    *self._topic_name_doubts(infos),
                    *self._number_doubts(infos),
                    *self._frame_id_doubts(infos, frame_ids),
                ]
            except CalibrationError as error:
                self._fault = error
        if self._fault is not None:
            raise self._fault.with_traceback(None)  # otherwise the traceback would grow with every frame
        if isinstance(self._camera, StereoCamera):
            self._camera.check_size(sizes[0], sizes[1])
        elif self._camera is not None:
            self._camera.check_size(*sizes[0])
        return self._camera

    def _make(self, infos: tuple[Any, ...]) -> Camera | StereoCamera:
        if len(infos) == 1:
            return Camera.from_camera_info(infos[0], rectified=self._rectified)
        return StereoCamera.from_camera_infos(infos[0], infos[1], rectified=self._rectified)

    def _baseline_doubts(self) -> list[Doubt]:
        least, most = _PLAUSIBLE_BASELINES
        if not isinstance(self._camera, StereoCamera) or least <= self._camera.baseline <= most:
            return []
        explanation = (
            f"the cameras are {self._camera.baseline:.6g} m apart according to their camera_infos (P[3] / P[0] of the "
            "right one): is P[3] in millimetres, or in another unit? Poses and odometry have the same scale"
        )
        return [Doubt("baseline", explanation)]

    def _topic_name_doubts(self, infos: tuple[Any, ...]) -> list[Doubt]:
        """Doubts about topics whose names contradict `rectified`: they say that their images are rectified, or raw."""
        found = []
        for topic, info in zip(self._topics, infos):
            coefficients = np.asarray(camera_info_field(info, "D"), dtype=np.float64)
            words = set(re.split(r"[/_]", topic.lower()))
            named = "rectified" if words & {"rect", "rectified"} else "raw" if words & {"raw", "unrectified"} else ""
            if not coefficients.any() or not named or (named == "rectified") == self._rectified:
                continue
            distortion = f"the distortion of camera_info (D is {listed(coefficients)})"
            if named == "rectified":
                explanation = (
                    f"according to its name, {topic} has rectified images, but rectified is false, so {distortion} is "
                    "corrected a second time: set rectified to true if they are rectified"
                )
            else:
                explanation = (
                    f"according to its name, {topic} has raw images, but rectified is true, so {distortion} is not "
                    "corrected: set rectified to false if they are not rectified"
                )
            found.append(Doubt(f"rectified on {topic}", explanation))
        return found

    def _frame_id_doubts(self, infos: tuple[Any, ...], frame_ids: Sequence[str]) -> list[Doubt]:
        """A doubt if the calibration has another frame_id than the images.

        Only the left camera is checked, because poses are in its frame. The right camera_info may have either frame_id:
        drivers of rectified pairs give both cameras that of the left one.
        """
        frame_id = infos[0].header.frame_id
        names = {frame_name(name) for name in (frame_id, *frame_ids[:1])}
        if not frame_ids or "" in names or len(names) == 1:
            return []
        explanation = (
            f"the images on {self._topics[0]} have the frame_id {frame_ids[0]!r:.80}, but their camera_info has "
            f"{frame_id!r:.80}: does it belong to another camera? Poses are in the frame of the images, which must be "
            "the camera's optical frame"
        )
        return [Doubt("frame", explanation)]

    def _number_doubts(self, infos: tuple[Any, ...]) -> list[Doubt]:
        """Doubts about numbers that are valid, but look like those of another image size or another lens model."""
        found = []
        for topic, info in zip(self._topics, infos):
            principal_point = _principal_point_fault(info, self._rectified)
            if principal_point:
                found.append(Doubt(f"principal point on {topic}", f"{principal_point} (camera_info of {topic})"))
            region = _region_fault(info)
            if region:
                found.append(Doubt(f"region on {topic}", f"{region} (camera_info of {topic})"))
            lens = "" if self._rectified else _lens_fault(info)
            if lens:
                found.append(Doubt(f"lens on {topic}", f"{lens} (camera_info of {topic})"))
        return found


def _bytes(info: Any) -> int:
    """The size of a camera_info in memory, bytes."""
    if info is None:
        return 0
    return _INFO_BYTES + 8 * len(camera_info_field(info, "D")) + len(info.distortion_model) + len(info.header.frame_id)


def _time_of(infos: dict[int, Any], stamp: int) -> int:
    """The stamp of the camera_info for an image, from `infos` by stamp in the order of arrival; 0 if there is none."""
    if stamp in infos:
        return stamp
    return next((time for time in reversed(infos) if time <= stamp), next(reversed(infos), 0))


def _principal_point_fault(info: Any, rectified: bool) -> str:
    """What is odd about the principal point of the full image, in words; empty if it is near the centre."""
    if not (info.width and info.height):  # the full size is not known: only the region of interest gives a size
        return ""
    name, row = ("P", 4) if rectified else ("K", 3)
    numbers = camera_info_field(info, name)
    x, y = float(numbers[2]), float(numbers[row + 2])
    across, down = (2 * x + 1) / info.width, (2 * y + 1) / info.height
    if min(abs(across - 1), abs(down - 1)) > _OFF_CENTRE and abs(across - down) < _ALIKE * abs(down):
        size = f"{across * info.width:.0f}x{down * info.height:.0f}"
        return (
            f"{name} seems to belong to images of about {size} pixels, because its principal point ({x:g}, {y:g}) is "
            f"in their middle, but the images are {info.width}x{info.height}: scale {name} like the images"
        )
    if max(abs(across - 1), abs(down - 1)) > _FAR_OFF_CENTRE:
        return (
            f"the principal point ({x:g}, {y:g}) of {name} is far from the middle of {info.width}x{info.height} "
            "pixels: poses are wrong unless the images are cropped in this way"
        )
    return ""


def _region_fault(info: Any) -> str:
    """What is odd about a region of interest, in words; empty if it is inside the full image."""
    roi = info.roi
    if not (info.width and info.height):
        return ""
    if roi.x_offset + roi.width <= info.width and roi.y_offset + roi.height <= info.height:
        return ""
    return (
        f"the region of interest, {roi.width}x{roi.height} pixels at ({roi.x_offset}, {roi.y_offset}), reaches beyond "
        f"the {info.width}x{info.height} pixels of width and height. Width, height and K must be those of the full "
        "image: poses are wrong unless K nevertheless belongs to the full image"
    )


def _lens_fault(info: Any) -> str:
    """What is odd about the coefficients of a polynomial lens model, in words; empty if they are plausible."""
    numbers = [float(number) for number in camera_info_field(info, "D")]
    if len(numbers) < 4 or any(numbers[4:]) or max(map(abs, numbers[2:4])) <= _LARGEST_TANGENTIAL:
        return ""
    if Camera.from_camera_info(info, rectified=False).distortion_model == "equidistant":
        return ""
    return (
        f"D is {numbers} with {info.distortion_model}, whose third and fourth coefficients are tangential distortion, "
        "a few thousandths in most lenses: if these are the coefficients of a fisheye lens, set distortion_model to "
        "equidistant"
    )


def _is_past(newest: int, stamp: int, before: int | None) -> bool:
    """Whether the newest calibration is later than an image. The previous image had the stamp ``before``.

    A calibration from before a jump back in time does not count as later.
    """
    of_before_time_went_back = before is not None and stamp < before <= newest
    return stamp < newest and not of_before_time_went_back
