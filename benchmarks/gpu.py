"""Run the tests that need a GPU, then measure the package's speed there, compared with other installed implementations.

    make gpu                                          # with the environment of make env, on any machine
    make gpu PYTHON=python3 OUT=results               # that has PyTorch, OpenCV, SciPy, safetensors, psutil, pytest
    PYTHONPATH=. python benchmarks/gpu.py --help      # the same without make

It takes at most 8 minutes, needs neither network nor ROS, and continues after every failure. It writes gpu.json and
gpu.md to OUT. Without a GPU it reports this and runs everything on the processor, at small sizes and with imitated CUDA
graphs. Such a run shows that the benchmark works, not how fast the package is.

It measures the extraction of an image's features, the matching of a pair, and a frame from pixels to pose, by precision
and number of keypoints, with and without CUDA graphs ("captured", "eager"), with all layers and adaptive. An easy pair
is two neighbouring frames of a synthetic camera, a hard pair two that are eight frames apart. Other implementations are
measured in turn with this package, on the same images, with the same weights and all layers.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import kpmatch_ros
from benchmarks.imitation import Imitation
from benchmarks.peers import PEERS
from kpmatch_ros import FeatureMatcher, FrontEnd, Parameters
from kpmatch_ros.cuda_graphs import CudaGraphs
from kpmatch_ros.process import configure_process
from kpmatch_ros.runtime.processor import processor_name
from simulation import Scene, camera_path, demo_camera

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("test/test_gpu.py", "test/test_cuda_graphs.py", "test/test_gpu_path.py", "test/test_feature_matcher.py")
APART = 8  # frames between the images of a hard pair

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Plan:
    """The extent of the measurements.

    Attributes:
        device: device of the networks.
        precisions: number formats.
        counts: numbers of keypoints requested.
        size: (width, height) of the images, pixels.
        repeats: number of repetitions of each measurement.
        frames: number of frames of the sequences for the measurement from pixels to pose.
        peer_counts: numbers of keypoints for the comparison with others.
        compiled_counts: numbers of keypoints for the comparison with compiled others, which takes long.
    """

    device: str
    precisions: Sequence[str]
    counts: Sequence[int]
    size: tuple[int, int]
    repeats: int
    frames: int
    peer_counts: Sequence[int]
    compiled_counts: Sequence[int]


ON_GPU = Plan(
    device="cuda",
    precisions=("float16", "bfloat16", "float32"),
    counts=(256, 512, 1024, 2048, 4096),
    size=(640, 480),
    repeats=20,
    frames=12,
    peer_counts=(512, 1024, 2048),
    compiled_counts=(1024,),
)
STAND_IN = Plan(
    device="cpu",
    precisions=("float32", "bfloat16"),
    counts=(64,),
    size=(160, 120),
    repeats=1,
    frames=1,
    peer_counts=(64,),
    compiled_counts=(),
)


@dataclass
class Report:
    """Results.

    Attributes:
        machine: properties of the machine that the figures depend on.
        tests: numbers of tests by outcome.
        rows: figures of this package.
        peers: figures of others.
        failures: what failed, and the error.
        left_out: what was not done, and the reason.
    """

    machine: dict[str, Any]
    tests: dict[str, int] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    peers: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Record and print a failure of the block, and continue."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            self.failures.append({"what": what, "error": traceback.format_exc(limit=-4)})
            print(f"FAILED: {what}: {type(error).__name__}: {str(error).partition(chr(10))[0]}", flush=True)
            with contextlib.suppress(RuntimeError):
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def leave_out(self, what: str) -> None:
        """Record and print what is not done."""
        self.left_out.append(what)
        print(f"left out: {what}", flush=True)


class Deadline:
    """The time after which nothing new is started.

    Args:
        seconds: time from now.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the remaining seconds."""
        return self._end - time.monotonic()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, default=Path("gpu"), help="folder for gpu.json and gpu.md (default: gpu)"
    )
    parser.add_argument("--minutes", metavar="N", type=float, default=7.5, help="time limit in minutes (default 7.5)")
    parser.add_argument("--skip-tests", action="store_true", help="run only the benchmark")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = Deadline(60 * options.minutes)
    has_gpu = torch.cuda.is_available()
    plan = ON_GPU if has_gpu else STAND_IN
    report = Report(describe_machine(has_gpu))
    if has_gpu:
        print(f"on {report.machine['gpu']}", flush=True)
    else:
        report.leave_out(
            f"the GPU: PyTorch {torch.__version__} finds none; the tests and the benchmark run on the processor, "
            "at small sizes, and the figures are meaningless"
        )
        torch.set_num_threads(1)  # small networks gain nothing from more
    for module, purpose in (("rclpy", "the node and its messages"), ("rosbags", "bags")):
        if not can_import(module):
            report.leave_out(f"{purpose}: {module} is not installed")
    try:
        if not options.skip_tests:
            run_tests(report, min(0.45 * deadline.left(), 200) if has_gpu else deadline.left())
            write(report, options.out)
        film: list[Image] = []
        with report.attempt("images of the synthetic camera"):
            film = make_film(plan)
        if film:
            measure_all(plan, film, report, deadline)
            write(report, options.out)
            measure_peers(plan, film, report, deadline)
    except KeyboardInterrupt:
        report.leave_out("the rest: interrupted by the user")
    write(report, options.out)
    print((options.out / "gpu.md").read_text())
    print(f"wrote {options.out / 'gpu.json'} and {options.out / 'gpu.md'}")
    return 1 if report.failures else 0


def can_import(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def describe_machine(has_gpu: bool) -> dict[str, Any]:
    """Return properties of the machine that the figures depend on."""
    machine: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if has_gpu else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if has_gpu else None,
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kpmatch_ros": kpmatch_ros.__version__,
    }
    return machine


# Tests


def run_tests(report: Report, seconds: float) -> None:
    """Run the tests that need CUDA, or their stand-ins, and the GPU test of test_feature_matcher.py."""
    with tempfile.TemporaryDirectory() as folder, report.attempt("the tests"):
        result = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        command += ["-o", "addopts=--import-mode=importlib", f"--junitxml={result}"]
        command += ["-k", "not test_feature_matcher or gpu", *TESTS]
        paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the tests took longer than {seconds:.0f} s") from None
        if not result.is_file():
            raise RuntimeError(f"pytest ended with status {done.returncode} and wrote no results")
        read_results(result, report)


def read_results(path: Path, report: Report) -> None:
    """Read numbers and failures of tests from pytest's XML."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname', '')}.{case.get('name', '')}"
        wrong = [child for child in case if child.tag in ("failure", "error")]
        if wrong:
            counts["failed"] += 1
            report.failures.append({"what": f"test {name}", "error": (wrong[0].text or "")[-3000:]})
        elif case.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    report.tests = counts


# This package


def make_film(plan: Plan) -> list[Image]:
    """Return frames of the synthetic camera, in colour."""
    frames = max(plan.frames + 1, APART + 1)
    camera = demo_camera(*plan.size)
    return [view.image for view in Scene(seed=0).film(camera_path(frames), camera, noise=2.0)]


def make_matcher(plan: Plan, precision: str, recorded: bool, adaptive: bool, count: int) -> FeatureMatcher:
    confidences = {} if adaptive else {"depth_confidence": -1.0, "width_confidence": -1.0}
    parameters = Parameters(device=plan.device, precision=precision, max_keypoints=count, **confidences)
    matcher = FeatureMatcher(parameters)
    if plan.device == "cpu":
        matcher.graphs = CudaGraphs(Imitation())
    if not recorded:
        matcher.graphs = None
    return matcher


def measure_all(plan: Plan, film: list[Image], report: Report, deadline: Deadline) -> None:
    """Measure every combination, the most important first."""
    for count in sorted(plan.counts, key=lambda count: abs(count - 1024)):
        for precision in plan.precisions:
            for recorded in (True, False):
                for adaptive in (False, True):
                    layers = "adaptive" if adaptive else "all layers"
                    what = f"{precision}, {count} keypoints, {mode(recorded)}, {layers}"
                    if deadline.left() < 100 and plan.device != "cpu":
                        report.leave_out(f"{what}: no time left")
                        continue
                    with report.attempt(what):
                        report.rows += measure(plan, film, precision, count, recorded, adaptive)


def mode(recorded: bool) -> str:
    return "captured" if recorded else "eager"


def measure(
    plan: Plan, film: list[Image], precision: str, count: int, recorded: bool, adaptive: bool
) -> list[dict[str, Any]]:
    """Return a row for the easy pair and one for the hard pair."""
    matcher = make_matcher(plan, precision, recorded, adaptive, count)
    on_gpu = plan.device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    upload = time_of(lambda: matcher.upload(film[0]), plan.repeats)  # included in extract
    extract = time_of(lambda: matcher.extract(film[0]).numpy(), plan.repeats)
    frame = time_of_frames(matcher, film, plan) if adaptive else None
    rows = []
    for kind, image in (("easy", film[1]), ("hard", film[APART])):
        pair = matcher.extract(film[0]), matcher.extract(image)
        matches = matcher.match(*pair)
        row = {
            "precision": precision,
            "mode": mode(recorded),
            "adaptive": adaptive,
            "pair": kind,
            "max_keypoints": count,
            "keypoints": [len(features) for features in pair],
            "matches": len(matches),
            "layers": matches.layers,
            "upload_ms": upload,
            "extract_ms": extract,
            "match_ms": time_of(lambda: matcher.match(*pair).indices.cpu(), plan.repeats),  # type: ignore # noqa: B023
            "frame_ms": frame,
            "gpu_mb": round(torch.cuda.max_memory_reserved() / 1e6) if on_gpu else None,
        }
        rows.append(row)
        print(
            f"{precision:9} {count:5} {row['mode']:8} {'adaptive' if adaptive else 'all':8} {kind} "
            f"extract {extract['p50']:.2f} match {row['match_ms']['p50']:.2f} ms, {len(matches)} matches",
            flush=True,
        )
    graphs = matcher.graphs
    if graphs is not None and not graphs.enabled:
        raise RuntimeError(f"nothing was captured, so the figures are those of eager execution: {graphs.failure}")
    return rows


def time_of(work: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Milliseconds until the result is on the host: median, 95th percentile, minimum."""
    for _ in range(min(repeats, 3)):
        work()
    return spread([timed(work) for _ in range(repeats)])


def timed(work: Callable[[], Any]) -> float:
    """Return the milliseconds of a call."""
    wait()
    started = time.perf_counter()
    work()
    wait()
    return (time.perf_counter() - started) * 1e3


def wait() -> None:
    """Wait until the GPU is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(times: Sequence[float]) -> dict[str, float]:
    p50, p95 = np.percentile(times, [50, 95])
    return {"p50": round(float(p50), 4), "p95": round(float(p95), 4), "least": round(min(times), 4)}


def time_of_frames(matcher: FeatureMatcher, film: list[Image], plan: Plan) -> dict[str, dict[str, float]]:
    """Time frames of a sequence from pixels to matches, and to the pose; the reference's features are kept."""
    result = {}
    for name, camera in (("matches", None), ("pose", demo_camera(*plan.size))):
        front = FrontEnd(matcher.parameters, matcher)
        times = []
        for i in range(2 * plan.frames + 1):
            image = film[min(i % (2 * plan.frames), -i % (2 * plan.frames))]  # forwards and backwards
            started = time.perf_counter()
            front.register_frame(image, i * 100_000_000, camera)
            times.append((time.perf_counter() - started) * 1e3)
        result[name] = spread(times[1:])
    return result


# Others


def measure_peers(plan: Plan, film: list[Image], report: Report, deadline: Deadline) -> None:
    """Measure transformers and cvg/LightGlue, if they can be imported; the latter also compiled.

    Each runs in its own process, because after an illegal access of a kernel all further GPU work of a process fails.
    """
    for name, compiled in (("transformers", False), ("lightglue", False), ("lightglue", True)):
        for precision in ("float16", "float32") if plan.device != "cpu" else ("float32",):
            if compiled and not plan.compiled_counts:
                continue
            what = f"compared with {name}{', compiled' if compiled else ''}, {precision}"
            if not can_import(name):
                report.leave_out(f"{what}: {name} is not installed")
                continue
            if deadline.left() < (75 if compiled else 35) and plan.device != "cpu":
                report.leave_out(f"{what}: no time left")
                continue
            with report.attempt(what), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                report.peers += pool.submit(measure_peer, plan, film, name, compiled, precision).result()


def measure_peer(plan: Plan, film: list[Image], name: str, compiled: bool, precision: str) -> list[dict[str, Any]]:
    """Return a row for each number of keypoints."""
    matcher = make_matcher(plan, precision, True, False, 1024)
    # cvg/LightGlue fails with weights in half precision. Its authors' way to half precision is float32 weights,
    # autocast and the matcher's option mp.
    half = name == "lightglue" and precision != "float32"
    peer: Any = PEERS[name](matcher, torch.float32 if half else getattr(torch, precision))
    label = f"{'cvg/LightGlue' if name == 'lightglue' else name}{', compiled' if compiled else ''}"
    if name == "lightglue":
        peer.use_mixed_precision(half)
    if compiled:
        peer.compile(plan.compiled_counts)
    rows = []
    for count in plan.compiled_counts if compiled else plan.peer_counts:
        with torch.autocast(plan.device, torch.float16, enabled=half):
            rows.append(beside(peer, label, matcher, precision, count, film, plan))
    return rows


def beside(
    peer: Any, label: str, matcher: FeatureMatcher, precision: str, count: int, film: list[Image], plan: Plan
) -> dict[str, Any]:
    """Time a pair without kept features and, if the other can keep features, a frame with the reference's kept."""
    matcher.configure(matcher.parameters.replace({"max_keypoints": count}))
    peer.max_keypoints(count)

    def pair() -> int:
        with torch.autocast(plan.device, enabled=False):
            return len(matcher.match(matcher.extract(film[0]), matcher.extract(film[1])).numpy())

    def frame() -> int:
        with torch.autocast(plan.device, enabled=False):
            return len(matcher.match(kept, matcher.extract(film[1])).numpy())

    with torch.autocast(plan.device, enabled=False):
        kept = matcher.extract(film[0])
    for _ in range(min(plan.repeats, 3)):
        pair(), frame(), peer.match(peer.extract(film[0]), film[1])
    ours: dict[str, list[float]] = {"pair": [], "frame": []}
    theirs: dict[str, list[float]] = {"pair": [], "frame": []}
    matches = 0
    for i in range(plan.repeats):
        for name in ("ours", "theirs") if i % 2 else ("theirs", "ours"):
            if name == "ours":
                ours["pair"].append(timed(pair))
                ours["frame"].append(timed(frame))
                continue
            started = time.perf_counter()
            reference = peer.extract(film[0])
            wait()
            extracted = time.perf_counter()
            matches = peer.match(reference, film[1])
            ended = time.perf_counter()
            theirs["pair"].append((ended - started) * 1e3)
            theirs["frame"].append((ended - extracted) * 1e3)  # transformers keeps no features: the same as a pair
    row: dict[str, Any] = {
        "peer": label,
        "precision": precision,
        "max_keypoints": count,
        "matches": matches,
        "our_matches": pair(),
    }
    for work in ("pair", "frame"):
        row[f"{work}_ms"], row[f"our_{work}_ms"] = spread(theirs[work]), spread(ours[work])
        row[f"{work}_ratio"] = round(float(np.median(np.divide(theirs[work], ours[work]))), 2)
    print(f"{label} {precision} {count}: a frame takes {row['frame_ratio']} times as long, a pair {row['pair_ratio']}")
    return row


# Showing


def write(report: Report, folder: Path) -> None:
    """Write gpu.json and gpu.md."""
    (folder / "gpu.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    (folder / "gpu.md").write_text(markdown(report) + "\n")


def markdown(report: Report) -> str:
    """Format all results as Markdown tables."""
    machine = report.machine
    gpu = f"{machine['gpu']}, {machine['memory_gb']} GB, CUDA {machine['cuda']}" if machine["gpu"] else "no GPU"
    lines = [
        f"# {gpu}",
        "",
        f"kpmatch_ros {machine['kpmatch_ros']}, PyTorch {machine['torch']}, Python {machine['python']}, "
        f"{machine['cores']} cores of {machine['processor']}. Milliseconds: median (95th percentile).",
        "",
    ]
    if report.tests:
        lines += [", ".join(f"{count} tests {outcome}" for outcome, count in report.tests.items()) + ".", ""]
    if report.rows:
        head = ("keypoints", "precision", "", "layers", "pair", "matches", "extract", "match", "to matches", "to pose")
        cells = []
        for row in report.rows:
            frame = row["frame_ms"] or {}
            cells.append(
                [
                    row["max_keypoints"],
                    row["precision"],
                    row["mode"],
                    f"{row['layers']} ({'adaptive' if row['adaptive'] else 'all'})",
                    row["pair"],
                    row["matches"],
                    figures(row["extract_ms"]),
                    figures(row["match_ms"]),
                    figures(frame.get("matches")),
                    figures(frame.get("pose")),
                ]
            )
        lines += [
            *table(head, cells),
            "",
            "To matches, to pose: time from the pixels of a frame of the sequence, with the reference's features kept.",
            "",
        ]
    if report.peers:
        head = ("compared with", "precision", "keypoints", "matches", "ours")
        head += ("frame", "ours", "ratio", "pair", "ours", "ratio")
        cells = [
            [
                row["peer"],
                row["precision"],
                row["max_keypoints"],
                row["matches"],
                row["our_matches"],
                figures(row["frame_ms"]),
                figures(row["our_frame_ms"]),
                row["frame_ratio"],
                figures(row["pair_ms"]),
                figures(row["our_pair_ms"]),
                row["pair_ratio"],
            ]
            for row in report.peers
        ]
        lines += [
            *table(head, cells),
            "",
            "Frame: features of one image are extracted and matched with kept features, if the other can keep them. "
            "Pair: features of both images are extracted. All layers, ours captured.",
            "",
        ]
    for title, items in (
        ("Failures", [f"{failure['what']}: {last_line(failure['error'])}" for failure in report.failures]),
        ("Left out", report.left_out),
    ):
        if items:
            lines += [f"## {title}", "", *(f"- {item}" for item in items), ""]
    return "\n".join(lines).rstrip()


def figures(times: dict[str, float] | None) -> str:
    return f"{times['p50']:.2f} ({times['p95']:.2f})" if times else ""


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:300]


def table(head: Sequence[str], cells: Sequence[Sequence[Any]]) -> list[str]:
    rows = [head, ["---"] * len(head), *cells]
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows]


if __name__ == "__main__":
    if "OPENBLAS_NUM_THREADS" not in os.environ:  # NumPy has already read it, so the process has to be restarted
        configure_process()
        os.execv(sys.executable, sys.orig_argv)
    sys.exit(main())
