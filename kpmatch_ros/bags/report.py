"""Collects the figures of a replay, as text for people and as JSON for programs."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kpmatch_ros.bags.cameras import CameraTopics
from kpmatch_ros.bags.readout import ReadoutSearch
from kpmatch_ros.frames import Result
from kpmatch_ros.geometry.pose import PoseStatus

__all__ = ["Report"]

_SIZES = 3  # most frequent sizes of images that are named
_BARREN = 0.2  # fraction of frames with too few keypoints or matches above which the report says so


@dataclass
class Report:
    """The figures of a replay.

    It receives a pipeline's events, see :class:`kpmatch_ros.events.Events`.

    Attributes:
        cameras: one camera, or the left and the right one.
        sizes: number of frames by width and height of their (left) image, pixels.
        latencies: of each frame, from its (last) message to its results in the bag, milliseconds.
        keypoints: number for each frame.
        matches, inliers: numbers for each pair of frames. A pair without calibration has no entry in `inliers`.
        stereo_matches, stereo_inliers: numbers for each stereo pair of images, likewise.
        poses: number of poses by status.
        rejections: number of frames that could not be used, by reason.
        refusals: number of frames whose calibration could not be used, by reason.
        stamp_faults: number of images whose stamp is zero or repeated, by fault and topic.
        mask_faults: number of images without a mask, with an unusable mask, or with a mask that hides everything, and
            number of masks that were dropped, by fault and topic.
        doubts: number of frames with a suspicious property that is probably not intended, by kind.
        interruptions: number of frames that could not follow the previous one, by reason: time jumped, or the frame_id
            changed.
        barren: number of frames with too few keypoints or matches for a pose.
        without_partner: in stereo, number of images without a partner, by topic. A frame is a pair of images.
        faults: what was wrong, in words: the first case of each kind.
        first_rejection: why the first rejected frame could not be used; empty if none was rejected.
        remarks: what is odd about the bag that was read, in words, such as message counts that differ from its
            metadata.
        recorded: time from the first to the last image, seconds.
        period: mean time between two recorded images of a camera, without pauses, seconds; 0 for a single image.
        elapsed: time that the replay took, seconds.
        breaks: number of breaks in the chain of poses.
        chain_doubts: number of steps in this chain that use the likelier of two motions.
        odometry_breaks: number of breaks in the odometry; None if no odometry was written.
        readout: the search for the parameter `readout_time`; None if it was not requested.
    """

    cameras: tuple[CameraTopics, ...]
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    keypoints: list[int] = field(default_factory=list)
    matches: list[int] = field(default_factory=list)
    inliers: list[int] = field(default_factory=list)
    stereo_matches: list[int] = field(default_factory=list)
    stereo_inliers: list[int] = field(default_factory=list)
    poses: Counter[str] = field(default_factory=Counter)
    rejections: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    stamp_faults: Counter[str] = field(default_factory=Counter)
    mask_faults: Counter[str] = field(default_factory=Counter)
    doubts: Counter[str] = field(default_factory=Counter)
    interruptions: Counter[str] = field(default_factory=Counter)
    without_partner: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    first_rejection: str = ""
    recorded: float = 0.0
    period: float = 0.0
    elapsed: float = 0.0
    barren: int = 0
    breaks: int = 0
    chain_doubts: int = 0
    odometry_breaks: int | None = None
    readout: ReadoutSearch | None = None
    _barren_because: str = ""
    _unpaired_because: dict[str, str] = field(default_factory=dict)  # the last explanation, by topic

    def processed(self, result: Result, milliseconds: float) -> None:
        """Count a frame that was fully processed."""
        self.sizes[result.frame.features.size] += 1
        self.latencies.append(milliseconds)
        self.keypoints.append(len(result.frame.keypoints))
        if result.stereo is not None:
            self.stereo_matches.append(len(result.stereo.indices))
            if result.stereo.inliers is not None:
                self.stereo_inliers.append(result.stereo.num_inliers)
        if result.pair is not None:
            self.matches.append(len(result.pair.indices))
            if result.pair.pose.status != PoseStatus.NO_CALIBRATION:
                self.inliers.append(result.pair.num_inliers)

    def rejected(self, reason: str, explanation: str) -> None:
        """Count a frame that could not be used."""
        self.first_rejection = self.first_rejection or explanation
        self._fault(self.rejections, reason, explanation)

    def calibration_refused(self, reason: str, explanation: str) -> None:
        """Count a frame that was processed without its calibration, because the calibration could not be used."""
        self._fault(self.refusals, reason, explanation)

    def doubted(self, kind: str, explanation: str) -> None:
        """Count a frame with a suspicious property that is probably not intended."""
        self._fault(self.doubts, kind, explanation)

    def interrupted(self, explanation: str) -> None:
        """Count a frame that could not follow the previous one. A pose with a status for this says so too."""
        # The reason is the text before its values.
        self._fault(self.interruptions, re.split(r"[\d']", explanation)[0].strip(), explanation)

    def stamp_fault(self, fault: str, topic: str, explanation: str) -> None:
        """Count an image whose stamp is not its time."""
        self._fault(self.stamp_faults, f"{fault} on {topic}", explanation)

    def mask_fault(self, fault: str, topic: str, explanation: str) -> None:
        """Count an image without its mask or with a mask that hides everything, or a mask that was dropped."""
        self._fault(self.mask_faults, f"{fault} on {topic}", explanation)

    def matched(self, fault: str) -> None:
        """Count a matched frame as barren if `fault` says why it has too few keypoints or matches."""
        if fault:
            self.barren += 1
            self._barren_because = fault

    def unpaired(self, topic: str, images: int, explanation: str) -> None:
        """Count images of one camera of a stereo pair that found no partner."""
        self.without_partner[topic] += images
        self._unpaired_because[topic] = explanation

    def pose(self, status: PoseStatus) -> None:
        """Count a pose that was written."""
        self.poses[status.name] += 1

    def odometry(self, breaks: int, explanation: str) -> None:
        """Note the number of breaks in the odometry so far."""
        self.odometry_breaks = breaks

    def finish(self) -> None:
        """Add the faults that are known only at the end of the bag."""
        if self.barren > _BARREN * len(self.latencies):
            self.faults.append(
                f"{self.barren} of {len(self.latencies)} frames have too few keypoints or matches for a pose; "
                f"the last one: {self._barren_because}"
            )
        self.faults += self.remarks
        self.faults += [f"{self.without_partner[topic]} {why}" for topic, why in self._unpaired_because.items()]

    def _fault(self, counter: Counter[str], reason: str, explanation: str) -> None:
        counter[reason] += 1
        if counter[reason] == 1:
            self.faults.append(explanation)

    def figures(self) -> dict[str, Any]:
        """The figures as a dict for JSON; a median without values is None (null)."""
        names = ("image",) if len(self.cameras) == 1 else ("left", "right")
        infos = ("camera_info",) if len(self.cameras) == 1 else ("left_info", "right_info")
        figures = {
            **{name: camera.image for name, camera in zip(names, self.cameras)},
            **{name: camera.camera_info or None for name, camera in zip(infos, self.cameras)},
            "frames": len(self.latencies),
            "rejected": dict(self.rejections),
            "camera_info_refused": dict(self.refusals),
            "stamps": dict(self.stamp_faults),
            "masks": dict(self.mask_faults),
            "doubts": dict(self.doubts),
            "rate": _rounded(len(self.latencies) / self.elapsed),
            "times_real_time": _rounded(self.period * len(self.latencies) / self.elapsed) if self.period else None,
            "latency_ms": {"median": _percentile(self.latencies, 50), "95 %": _percentile(self.latencies, 95)},
            "keypoints": _percentile(self.keypoints, 50),
            "matches": _percentile(self.matches, 50),
            "inliers": _percentile(self.inliers, 50),
            "poses": dict(self.poses),
            "breaks": self.breaks,
            "chain_doubts": self.chain_doubts,
            "remarks": list(self.remarks),
        }
        if self.readout is not None:
            found = self.readout.found()
            figures["readout"] = None if found is None else {**found._asdict(), "sure": found.is_sure}
        if len(self.cameras) == 2:
            figures |= {
                "unpaired": dict(self.without_partner),
                "stereo_matches": _percentile(self.stereo_matches, 50),
                "stereo_inliers": _percentile(self.stereo_inliers, 50),
                "odometry_breaks": self.odometry_breaks,
            }
        return figures

    def rows(self) -> list[tuple[str, str]]:
        """The figures in words, each with its name."""
        figures = self.figures()

        def counts(counter: Counter[str]) -> str:
            return ", ".join(f"{name} {count}" for name, count in sorted(counter.items()))

        def of_pairs(name: str) -> str:
            return "-" if figures[name] is None else f"{figures[name]:.0f} per pair (median)"

        sizes = [f"{width} x {height}" for (width, height), _ in self.sizes.most_common(_SIZES)]
        sizes += ["other sizes"] * (len(self.sizes) > _SIZES)
        latency, times = figures["latency_ms"], figures["times_real_time"]
        as_recorded = "" if times is None else f", {times:.1f} times as fast as recorded"
        topics = " with ".join(camera.image for camera in self.cameras)
        rows = [
            ("frames", f"{figures['frames']} of {' and '.join(sizes)} ({topics})"),
            ("rate", f"{figures['rate']:.1f} frames a second{as_recorded}"),
            ("latency", f"{latency['median']:.0f} ms (median), {latency['95 %']:.0f} ms (95 %)"),
            ("keypoints", f"{figures['keypoints']:.0f} per frame (median)"),
            ("matches", of_pairs("matches")),
            ("inliers", of_pairs("inliers")),
            ("poses", counts(self.poses) or "none"),
        ]  # fmt: skip
        stereo = len(self.cameras) == 2
        if stereo:
            agree = figures["stereo_inliers"]
            inliers = "" if agree is None else f", {agree:.0f} inliers"
            rows.insert(
                4, ("stereo", f"{figures['stereo_matches']:.0f} matches of left and right{inliers} per frame (median)")
            )
        if self.odometry_breaks:
            again = _counted(self.odometry_breaks, "time")
            rows.append(("odometry", f"restarted {again}; each restart uses a new frame: odom_1, odom_2, ..."))
        if self.breaks:
            again = _counted(self.breaks, "time")
            rows.append(("chain", f"broken {again}: --poses joins the parts as if the camera had not moved there"))
        if self.chain_doubts:
            steps = _counted(self.chain_doubts, "step")
            rows.append(
                ("chain", f"{steps} AMBIGUOUS, with the likelier of two motions; see the comments in the --poses file")
            )
        if self.readout is not None:
            rows.append(("readout", self.readout.in_words()))
        if self.rejections:
            rejected = _counted(sum(self.rejections.values()), "frame" if stereo else "image")
            rows.insert(1, ("rejected", f"{rejected}: {counts(self.rejections)}"))
        if self.without_partner:
            rows.insert(1, ("unpaired", f"images without a partner: {counts(self.without_partner)}"))
        if self.stamp_faults:
            rows.append(("stamps", counts(self.stamp_faults)))
        if self.doubts:
            rows.append(("doubts", counts(self.doubts)))
        if self.mask_faults:
            rows.append(("masks", counts(self.mask_faults)))
        rows += [("remark", remark) for remark in self.remarks]
        if self.refusals:
            rows.append(("camera_info", f"refused: {counts(self.refusals)}"))
        return rows


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _percentile(values: list[float] | list[int], percent: float) -> float | None:
    return _rounded(float(np.percentile(values, percent))) if values else None


def _rounded(value: float) -> float:
    return round(value, 3)
