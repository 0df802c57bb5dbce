"""Writes a replay as one HTML page: trajectory, figures per frame, and pictures of the matches.

The page opens without a network.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from kpmatch_ros.bags.frame_figures import STATUS_COLOURS, EvenlyChosen, FrameFigures, Jpeg
from kpmatch_ros.bags.recording import BagError
from kpmatch_ros.bags.trajectory import Trajectory
from kpmatch_ros.drawing import caption, draw_pair
from kpmatch_ros.frames import Pair, Result

__all__ = ["HtmlReport"]

_MOST_PICTURES = 120
_PICTURES_BYTES = 3_000_000  # of all JPEGs. Base64 adds a third, and plotly takes 5 MB: the page stays below 10 MB.
_PICTURE_BYTES = 120_000  # of one JPEG
_WIDTHS = (1280, 960, 720, 540, 400)  # pixels, tried in this order
_TEMPLATE = Path(__file__).with_name("report.html")
_MATCHES_AND_INLIERS = "<span style='color:#3b82c4'>matches</span>, <span style='color:#2f9e6e'>inliers</span>"
_SECONDS = "seconds"
_MOST_VECTORS = 5000  # largest number of points that a plot draws as vectors (SVG)
_BROKEN_COLOUR = "#d1495b"


class HtmlReport:
    """Collects the results of a replay, and writes them as an HTML page.

    Args:
        metric: whether the poses are in metres.

    Raises:
        BagError: plotly is not installed.
    """

    def __init__(self, metric: bool) -> None:
        if importlib.util.find_spec("plotly") is None:
            raise BagError("--report: the page needs plotly, which is not installed: pip install plotly")
        self._metric = metric
        self._start: int | None = None  # stamp of the first frame
        self._points: list[FrameFigures] = []  # of all frames except the first one, frame 0
        self._pictures = EvenlyChosen[tuple[int, str, Jpeg]](_MOST_PICTURES)  # index in _points, caption, picture
        self._trajectory = Trajectory()
        self._breaks: list[tuple[int, np.ndarray]] = []  # index in _points, position (3,) where the chain goes on

    def add(self, result: Result, milliseconds: float) -> None:
        """Add the next frame, with its latency from the message to the results."""
        breaks, before = self._trajectory.breaks, self._trajectory.position
        self._trajectory.add(result.frame, result.pair)
        if self._start is None:
            self._start = result.frame.stamp
            return
        if self._trajectory.breaks > breaks:
            self._breaks.append((len(self._points), before))
        pair, number = result.pair, len(self._points)
        self._points.append(FrameFigures.of(result, self._trajectory.position, milliseconds))
        if pair is not None:
            self._pictures.add(lambda: (number, caption(pair), _picture(pair)))

    def write(self, path: Path, title: str, rows: list[tuple[str, str]], faults: list[str]) -> None:
        """Write the page.

        Args:
            path: of the file.
            title: of the page.
            rows: of the table, each a name and a text.
            faults: what went wrong, in words.

        Raises:
            OSError: the file cannot be written.
        """
        from plotly.offline import get_plotlyjs

        places, axis = self._time_axis()
        pictures, every = self._pictures.kept, self._pictures.every
        most = _PICTURES_BYTES // max(1, len(pictures))
        frames = [
            {
                "point": number,
                "at": places[number],
                "when": f"{places[number]:.3f} s, {_frame(number)}" if axis == _SECONDS else _frame(number),
                "caption": text,
                "jpeg": base64.b64encode(jpeg.within(most, _WIDTHS).data).decode(),
            }
            for number, text, jpeg in pictures
        ]
        table = "\n".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in rows)
        notes = "\n".join(f"<li>{html.escape(fault)}</li>" for fault in faults)
        parts = {
            "@TITLE@": html.escape(title),
            "@TABLE@": table,
            "@FAULTS@": f"<ul class='faults'>{notes}</ul>" if notes else "",
            "@EVERY@": "each frame" if every == 1 else f"one frame of {every}",
            "@TRAJECTORY@": _script(self._trajectory_figure()),
            "@FIGURES@": _script(self._figures(places, axis)),
            "@FRAMES@": _script(frames),
            "@PLOTLY@": get_plotlyjs(),
        }
        page = re.sub("|".join(parts), lambda found: parts[found[0]], _TEMPLATE.read_text(encoding="utf-8"))
        path.write_text(page, encoding="utf-8", errors="backslashreplace")  # a bag's name need not be UTF-8

    def _trajectory_figure(self) -> dict[str, Any]:
        """The trajectory seen from above: x (right) on the horizontal axis, z (forward) on the vertical one."""
        known = [point for point in self._points if point.position is not None]
        at = np.array([np.zeros(3), *(point.position for point in known if point.position is not None)])
        unit = "m" if self._metric else "arbitrary scale: each step has length one"
        names = [_frame(number) for number, point in enumerate(self._points) if point.position is not None]
        trace = {
            "type": _kind(len(at)),
            "x": np.round(at[:, 0], 4).tolist(),
            "y": np.round(at[:, 2], 4).tolist(),
            "text": [_frame(-1), *names],
            "mode": "lines+markers",
            "line": {"color": "#9fb3c8", "width": 1.5},
            "marker": {"size": 5, "color": list(range(len(at))), "colorscale": "Viridis"},
            "hovertemplate": "%{text}<br>x %{x}, z %{y}<extra></extra>",
        }
        layout: dict[str, Any] = {
            "xaxis": {"title": {"text": f"x, right ({unit})"}},
            "yaxis": {"title": {"text": "z, forward"}, "scaleanchor": "x"},
        }
        if not self._breaks:
            return {"data": [trace], "layout": layout}
        places = np.array([place for _, place in self._breaks])
        broken = {
            "type": "scatter",
            "x": np.round(places[:, 0], 4).tolist(),
            "y": np.round(places[:, 2], 4).tolist(),
            "text": [_frame(number) for number, _ in self._breaks],
            "mode": "markers",
            "marker": {"size": 11, "symbol": "x", "color": _BROKEN_COLOUR},
            "hovertemplate": "the chain is broken before %{text}, and continues from here<extra></extra>",
        }
        layout["xaxis"]["title"] = {"text": f"x, right ({unit}); <span style='color:{_BROKEN_COLOUR}'>✖ broken</span>"}
        return {"data": [trace, broken], "layout": layout}

    def _time_axis(self) -> tuple[list[float], str]:
        """The position of each point on the horizontal axis of the plots, and the title of the axis."""
        stamps = [point.stamp for point in self._points]
        if len(stamps) > 1 and set(stamps) == {self._start}:  # the driver does not stamp its images
            return [number + 1.0 for number in range(len(stamps))], "frame: all stamps are the same"
        return [round((stamp - (self._start or 0)) * 1e-9, 4) for stamp in stamps], _SECONDS

    def _figures(self, places: list[float], axis_title: str) -> dict[str, Any]:
        """Four plots, one below the other, over the time since the first frame."""
        statuses = [point.status for point in self._points]
        numbers = list(range(len(places)))  # a click on a point passes its number to the page's script
        back = {number for number in range(1, len(places)) if places[number] < places[number - 1]}

        def with_gaps(values: list[Any]) -> list[Any]:  # so that no line is drawn back in time
            return [value for number, now in enumerate(values) for value in ([None, now] if number in back else [now])]

        def line(name: str, values: list[Any], axis: str, colour: str) -> dict[str, Any]:
            return {
                "type": _kind(len(places)), "mode": "lines+markers", "name": name, "x": with_gaps(places),
                "y": with_gaps(values), "yaxis": axis, "customdata": with_gaps(numbers),
                "line": {"color": colour, "width": 1.5}, "marker": {"size": 4},
            }  # fmt: skip

        data = [
            line("matches", [point.matches for point in self._points], "y", "#3b82c4"),
            line("inliers", [point.inliers for point in self._points], "y", "#2f9e6e"),
            line("rotation", [None if p.rotation is None else round(p.rotation, 4) for p in self._points], "y2",
                 "#9b5de5"),
            line("latency", [round(point.latency, 2) for point in self._points], "y3", "#e0703a"),
            {
                "type": _kind(len(places)), "mode": "markers", "name": "status", "x": places, "yaxis": "y4",
                "customdata": numbers,
                "y": [status.name for status in statuses],
                "marker": {"size": 8, "symbol": "square",
                           "color": [STATUS_COLOURS[status] for status in statuses]},
            },
        ]  # fmt: skip
        layout = {
            "xaxis": {"title": {"text": axis_title}, "anchor": "y4"},
            "yaxis": {"title": {"text": _MATCHES_AND_INLIERS}, "domain": [0.76, 1.0], "rangemode": "tozero"},
            "yaxis2": {"title": {"text": "rotation (°)"}, "domain": [0.5, 0.72], "rangemode": "tozero"},
            "yaxis3": {"title": {"text": "latency (ms)"}, "domain": [0.24, 0.46], "rangemode": "tozero"},
            "yaxis4": {"domain": [0.0, 0.18], "type": "category"},
        }
        return {"data": data, "layout": layout}


def _frame(point: int) -> str:
    """The name of the frame with this index in `_points`, which leaves out the first frame."""
    return f"frame {point + 1}"


def _kind(points: int) -> str:
    """Plotly's type for a plot with so many points: many points drawn as vectors make the page slow."""
    return "scattergl" if points > _MOST_VECTORS else "scatter"


def _picture(pair: Pair) -> Jpeg:
    """A picture of the pair with its matches."""
    return Jpeg.of(draw_pair(pair), _PICTURE_BYTES, _WIDTHS)


def _script(value: Any) -> str:
    """The value as JSON that is safe inside a script element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
