"""Writes a replay as a recording for the Rerun viewer: trajectory, images with their matches, figures per frame."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from kpmatch_ros.bags.frame_figures import STATUS_COLOURS, EvenlyChosen, FrameFigures, Jpeg
from kpmatch_ros.bags.recording import BagError
from kpmatch_ros.bags.trajectory import Trajectory
from kpmatch_ros.encodable import encodable
from kpmatch_ros.frames import Result

__all__ = ["RerunRecording"]

_MOST_IMAGES = 1000
_IMAGES_BYTES = 25_000_000  # of all JPEGs
_IMAGE_BYTES = 60_000  # of one JPEG
_WIDTHS = (640, 480, 320, 240)  # pixels, tried in this order
_KEYPOINT, _INLIER, _OUTLIER = (170, 178, 189), (47, 158, 110), (209, 73, 91)  # RGB
_MATCH = (59, 130, 196)  # a match that may be an inlier or an outlier: there is no calibration
_SERIES = {"matches": _MATCH, "inliers": _INLIER, "rotation": (155, 93, 229), "latency": (224, 112, 58)}
_MATCHES, _AT, _PATH, _STATUS = "image/matches", "world/camera", "world/path", "figures/status"


class _Picture(NamedTuple):
    """An image and what is drawn on it. It is kept until the end, when the images to write are known."""

    frame: int
    stamp: int
    jpeg: Jpeg
    keypoints: np.ndarray  # (N, 2) as fractions of the image's width and height
    matches: np.ndarray  # (M, 2, 2) likewise: for each match the point in the reference and the point in this image
    colours: np.ndarray  # (M, 3) RGB of the matches


class RerunRecording:
    """Context manager that writes the results of a replay into a file for Rerun.

    The timelines are `stamp`, the time of the images, and `frame`, their number. Positions and rotations are in the
    first camera's optical frame. Figures and poses are written at once. :meth:`finish` writes the images, the path and
    the table.

    Args:
        path: of the file.
        title: of the recording.
        metric: whether the poses are in metres.

    Raises:
        BagError: rerun-sdk is not installed.
    """

    def __init__(self, path: Path, title: str, metric: bool) -> None:
        self.check_installed()
        import rerun
        import rerun.blueprint as views

        self._rerun = rerun
        self._pictures = EvenlyChosen[_Picture](_MOST_IMAGES)
        self._trajectory = Trajectory()
        self._paths: list[list[np.ndarray]] = []  # positions (3,), one list for each part of the chain
        self._frames = 0
        self._stream = rerun.RecordingStream("kpmatch_ros")
        self._stream.set_log_time_enabled(False)
        self._stream.set_log_tick_enabled(False)
        self._stream.save(path, default_blueprint=_layout(views))
        self._stream.send_recording_name(title)
        self._metric = metric
        self._stream.log("world", rerun.ViewCoordinates.RDF, static=True)
        for name, colour in _SERIES.items():
            self._stream.log(f"figures/{name}", rerun.SeriesLines(colors=[colour], names=[name]), static=True)
        colours = [int(colour[1:], 16) << 8 | 0xFF for colour in STATUS_COLOURS.values()]
        names = [status.name for status in STATUS_COLOURS]
        self._stream.log(_STATUS, rerun.StateConfiguration(values=names, labels=names, colors=colours), static=True)

    @staticmethod
    def check_installed() -> None:
        """Raise BagError if rerun-sdk is not installed."""
        if importlib.util.find_spec("rerun") is None:
            raise BagError("--rerun: the file needs rerun-sdk, which is not installed: pip install rerun-sdk")

    def __enter__(self) -> RerunRecording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._stream.flush()  # raises if not everything can be written
        self._stream.disconnect()

    def add(self, result: Result, milliseconds: float) -> None:
        """Add the next frame, with its latency from the message to the results."""
        breaks, before = self._trajectory.breaks, self._trajectory.position
        self._trajectory.add(result.frame, result.pair)
        self._at(self._frames, result.frame.stamp)
        if not self._paths or self._trajectory.breaks > breaks:
            self._paths.append([before])  # the next part of the chain begins there
        self._pictures.add(lambda: self._picture(result))
        self._frames += 1
        if self._frames == 1 and result.pair is None:
            return
        figures = FrameFigures.of(result, self._trajectory.position, milliseconds)
        values = {"matches": figures.matches, "inliers": figures.inliers, "rotation": figures.rotation,
                  "latency": figures.latency}  # fmt: skip
        for name, value in values.items():
            scalars = self._rerun.Scalars([] if value is None else [float(value)])  # an empty one is a gap
            self._stream.log(f"figures/{name}", scalars)
        self._stream.log(_STATUS, self._rerun.StateChange(state=figures.status.name))
        if figures.position is not None:
            self._paths[-1].append(figures.position)
            self._add_pose()

    def finish(self, rows: list[tuple[str, str]], faults: list[str]) -> None:
        """Write the images, the path and the table.

        Args:
            rows: of the table, each a name and a text.
            faults: what went wrong, in words.
        """
        rerun = self._rerun
        most = _IMAGES_BYTES // max(1, len(self._pictures.kept))
        for picture in self._pictures.kept:
            self._add_picture(picture, picture.jpeg.within(most, _WIDTHS))
        self._stream.log(_PATH, rerun.LineStrips3D([np.array(path) for path in self._paths]), static=True)
        unit = "metres" if self._metric else "arbitrary scale: each step has length one"
        lines = ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows), f"| positions | {unit} |"]
        lines += ["", *(f"- {fault}" for fault in faults)]
        document = rerun.TextDocument(encodable("\n".join(lines)), media_type=rerun.MediaType.MARKDOWN)
        self._stream.log("table", document, static=True)

    def _add_pose(self) -> None:
        rotation, position = self._trajectory.pose
        quaternion = self._rerun.Quaternion(xyzw=rotation.as_quat())
        self._stream.log(_AT, self._rerun.Transform3D(translation=position, quaternion=quaternion))

    def _at(self, frame: int, stamp: int) -> None:
        self._stream.set_time("stamp", timestamp=np.datetime64(stamp, "ns"))
        self._stream.set_time("frame", sequence=frame)

    def _picture(self, result: Result) -> _Picture:
        frame, pair = result.frame, result.pair
        size = np.array(frame.image.shape[1::-1], np.float32)
        # Without matches an empty list is written, because the viewer would keep those of the previous frame.
        ends = np.zeros((0, 2, 2)) if pair is None else np.stack([pair.reference_points, pair.points], axis=1)
        colours = np.full((len(ends), 3), _MATCH, np.uint8)
        if pair is not None and pair.inliers is not None:
            colours[:] = np.where(pair.inliers[:, None], _INLIER, _OUTLIER)
        jpeg = Jpeg.of(frame.image, _IMAGE_BYTES, _WIDTHS)
        # Rerun's pixel (0, 0) has its centre at (0.5, 0.5).
        centre = np.float32(0.5)
        keypoints, matches = (frame.keypoints + centre) / size, (ends + centre) / size
        return _Picture(self._frames, frame.stamp, jpeg, keypoints, matches, colours)

    def _add_picture(self, picture: _Picture, jpeg: Jpeg) -> None:
        rerun, size = self._rerun, np.array(jpeg.size)
        self._at(picture.frame, picture.stamp)
        self._stream.log("image", rerun.EncodedImage(contents=jpeg.data, media_type="image/jpeg"))
        self._stream.log("image/keypoints", rerun.Points2D(picture.keypoints * size, colors=_KEYPOINT, radii=1.0))
        self._stream.log(_MATCHES, rerun.LineStrips2D(picture.matches * size, colors=picture.colours))


def _layout(views: Any) -> Any:
    """The layout of the viewer: images, trajectory and table above, the plots below."""
    return views.Blueprint(
        views.Vertical(
            views.Horizontal(
                views.Spatial2DView(origin="image", name="image and matches"),
                views.Spatial3DView(origin="world", name="trajectory"),
                views.TextDocumentView(origin="table", name="table"),
            ),
            views.Horizontal(
                views.TimeSeriesView(contents=["figures/matches", "figures/inliers"], name="matches and inliers"),
                views.TimeSeriesView(contents=["figures/rotation"], name="rotation, degrees"),
                views.TimeSeriesView(contents=["figures/latency"], name="latency, ms"),
                views.StateTimelineView(contents=[_STATUS], name="status"),
            ),
            row_shares=[3, 2],
        ),
        collapse_panels=True,
    )
