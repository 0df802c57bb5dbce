"""Tests that rviz/matcher.rviz and foxglove/matcher.json show existing topics with the right types."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
# The message types of the RViz displays, and of the Foxglove panels that show whole messages.
RVIZ = {
    "rviz_default_plugins/Image": "sensor_msgs/Image",
    "rviz_default_plugins/Odometry": "nav_msgs/Odometry",
    "rviz_default_plugins/Path": "nav_msgs/Path",
    "rviz_default_plugins/PointCloud2": "sensor_msgs/PointCloud2",
}
FOXGLOVE = {
    "Image": {"sensor_msgs/Image"},
    "3D": {"nav_msgs/Odometry", "sensor_msgs/PointCloud2"},
    "DiagnosticSummary": {"diagnostic_msgs/DiagnosticArray"},
}


@pytest.fixture(scope="module")
def topics() -> dict[str, str]:
    """Return the types of the topics that the node publishes, from docs/topics.md."""
    rows = re.findall(r"^\| `(\S+)` \(out\) \| `(\S+)`", (ROOT / "docs" / "topics.md").read_text(), re.MULTILINE)
    found = {name.lstrip("/"): kind for name, kind in rows}
    assert found["matches"] == "kpmatch_ros/MatchArray"
    return found


def keys_and_strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys_and_strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_and_strings(inner)
    elif isinstance(value, str):
        yield value


def test_each_rviz_display_shows_a_topic_of_its_type(topics: dict[str, str]) -> None:
    displays = yaml.safe_load((ROOT / "rviz" / "matcher.rviz").read_text())["Visualization Manager"]["Displays"]
    shown = {item["Topic"]["Value"]: item["Class"] for item in displays if "Topic" in item}
    assert set(shown) == {"match_image", "odometry", "landmarks", "path"}
    example = (ROOT / "examples" / "stereo_slam" / "node.py").read_text()
    assert (
        "from nav_msgs.msg import Path as PathMessage" in example and 'create_publisher(PathMessage, "path"' in example
    )
    known = topics | {"path": "nav_msgs/Path"}
    assert {topic: RVIZ[kind] for topic, kind in shown.items()} == {topic: known[topic] for topic in shown}


def test_each_foxglove_panel_shows_existing_topics_and_fields(topics: dict[str, str]) -> None:
    layout = json.loads((ROOT / "foxglove" / "matcher.json").read_text())
    plotted: list[str] = []
    for name, panel in layout["configById"].items():
        for path in (word for word in keys_and_strings(panel) if re.fullmatch(r"/[a-z_]+(\.[a-z_.]+)?", word)):
            topic, _, field = path.lstrip("/").partition(".")
            if field:
                message = (ROOT / "msg" / f"{topics[topic].split('/')[1]}.msg").read_text()
                assert re.search(rf"^\S+ {field}$|^\S+ {field}\s+#", message, re.MULTILINE), path
                plotted.append(path)
            else:
                assert topics[topic] in FOXGLOVE[name.split("!")[0]], path
    assert len(plotted) >= 5


def test_each_foxglove_panel_is_placed_in_the_layout() -> None:
    layout = json.loads((ROOT / "foxglove" / "matcher.json").read_text())
    placed = sorted(word for word in keys_and_strings(layout["layout"]) if "!" in word)
    assert placed == sorted(layout["configById"])
