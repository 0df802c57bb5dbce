"""A replay as a recording for the Rerun viewer: trajectory, images with their matches, and figures per frame."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kpmatch_ros.bags.files import BagError
from kpmatch_ros.bags.frame_figures import STATUS_COLOURS, FrameFigures, small_jpeg
from kpmatch_ros.bags.recording import encodable
from kpmatch_ros.bags.trajectory import Trajectory
from kpmatch_ros.frames import Frame, Pair, Result

__all__ = ["RerunRecording"]

_MOST_IMAGES = 1000
_IMAGES_BYTES = 25_000_000  # of all JPEGs
_IMAGE_BYTES = 60_000  # of one
_WIDTHS = (640, 480, 320, 240)  # pixels, tried in this order
_KEYPOINT, _INLIER, _OUTLIER = (170, 178, 189), (47, 158, 110), (209, 73, 91)  # RGB
_SERIES = {"matches": (59, 130, 196), "inliers": _INLIER, "rotation": (155, 93, 229), "latency": (224, 112, 58)}
_MATCHES, _AT, _PATH, _STATUS = "image/matches", "world/camera", "world/path", "figures/status"


class RerunRecording:
    """Writes what a replay does into a file for Rerun, as a context manager.

    The timelines are `stamp`, the images' time, and `frame`, which counts them. Positions and rotations are in the
    first camera's optical frame. Everything is written as it comes; the path and the table follow with :meth:`finish`.

    Args:
        path: of the file.
        frames: how many there will be about, to choose those that have an image.
        title: of the recording.
        metric: whether the poses are in metres.

    Raises:
        BagError: when rerun-sdk is not installed.
    """

    def __init__(self, path: Path, frames: int, title: str, metric: bool) -> None:
        self.check_installed()
        import rerun
        import rerun.blueprint as views

        self._rerun = rerun
        self._every = -(-max(frames, 1) // _MOST_IMAGES)
        self._image_bytes = min(_IMAGE_BYTES, _IMAGES_BYTES // max(1, min(frames, _MOST_IMAGES)))
        self._trajectory = Trajectory()
        self._paths: list[list[np.ndarray]] = []  # a chain of positions each, (3,)
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
        """Raise BagError when rerun-sdk is not installed."""
        if importlib.util.find_spec("rerun") is None:
            raise BagError("--rerun: the file needs rerun-sdk, which is not installed: pip install rerun-sdk")

    def __enter__(self) -> RerunRecording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._stream.flush()  # raises where not all can be written
        self._stream.disconnect()

    def add(self, result: Result, milliseconds: float) -> None:
        """The next frame, and what it took from its message to its results."""
        breaks, before = self._trajectory.breaks, self._trajectory.position
        self._trajectory.add(result.frame, result.pair)
        self._stream.set_time("stamp", timestamp=np.datetime64(result.frame.stamp, "ns"))
        self._stream.set_time("frame", sequence=self._frames)
        pair = result.pair
        if not self._paths or self._trajectory.breaks > breaks:
            self._paths.append([before])  # the chain goes on from there
        if self._frames % self._every == 0:
            self._add_image(result.frame, pair)
        self._frames += 1
        if pair is None:
            return
        figures = FrameFigures.of(pair, self._trajectory.position, milliseconds)
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
        """The path, and the table.

        Args:
            rows: the table: names and texts.
            faults: what went wrong, in words.
        """
        rerun = self._rerun
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

    def _add_image(self, frame: Frame, pair: Pair | None) -> None:
        rerun = self._rerun
        jpeg, size = small_jpeg(frame.image, self._image_bytes, _WIDTHS)
        self._stream.log("image", rerun.EncodedImage(contents=jpeg, media_type="image/jpeg"))
        # Rerun's pixel (0, 0) has its centre at (0.5, 0.5).
        scale = np.array(size) / frame.image.shape[1::-1]
        self._stream.log(
            "image/keypoints", rerun.Points2D((frame.keypoints + 0.5) * scale, colors=_KEYPOINT, radii=1.0)
        )
        if pair is not None:
            ends = (np.stack([pair.reference_points, pair.points], axis=1) + 0.5) * scale
            agree = np.ones(len(ends), bool) if pair.inliers is None else pair.inliers
            colours = np.where(agree[:, None], _INLIER, _OUTLIER).astype(np.uint8)
            self._stream.log(_MATCHES, rerun.LineStrips2D(ends, colors=colours))


def _layout(views: Any) -> Any:
    """How the viewer shows it."""
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
