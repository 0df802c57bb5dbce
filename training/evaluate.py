"""Compare matchers on the same pairs of images, with the same number of keypoints and the same geometry.

    python training/evaluate.py --data DATA --weights new=runs/export --out results --cache CACHE
    python training/evaluate.py --validation SHARDS --weights new=runs/export --nms-radius 1 2 3 --subpixel both ...

``results.json`` and ``results.md`` hold the numbers of matches and of correct matches, precision, shares within 1, 2
and 3 px, cells with correct matches, AUC of poses and calibration, with 90 % intervals over places and paired
differences to ALIKED+LightGlue. The results of each matcher for each pair are cached by the code that computed them, so
that only missing results are computed.

Do not tune on the held-out groups: choose radius, thresholds and checkpoints with ``--validation``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from common import add_data_option, log_line
from evaluation_figures import Result, describe, markdown
from evaluation_matchers import PEERS, Found, Matcher, Ours, Refined, load_ours, load_peer, missing_files
from evaluation_pairs import GROUPS, Pair, groups, validation_pairs
from evaluation_truth import Motion, pose_errors

import kpmatch_ros
from benchmarks.code_hash import hash_of_code, versions

__all__ = ["evaluate", "main"]

ORDERS = 10  # number of random orders of the matches, for each pose
REFERENCE = PEERS["aliked"]


# --- the cache -------------------------------------------------------------------------------------------------------


def save(path: Path, **arrays: Any) -> None:
    """Write arrays to a file atomically: the file is complete or does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part.npz")
    np.savez(partial, **arrays)
    os.replace(partial, path)


def read(path: Path) -> dict[str, Any] | None:
    """Read the arrays of a file; None if it does not exist."""
    if not path.exists():
        return None
    with np.load(path) as arrays:
        return dict(arrays)


def start_process() -> None:
    """Initialise a process that estimates poses: it has a low priority and uses one core."""
    os.nice(5)
    cv2.setNumThreads(1)


def find_pose(path: Path, motion: Motion, found: Found, resolution: float, orders: int) -> None:
    """Estimate a pair's poses and save their errors."""
    matches = found.points0, found.points1
    save(path, poses=pose_errors(motion, *matches, resolution, orders, found.refined, found.sigmas))


def code_hashes(package: Path, scripts: Path) -> dict[str, str]:
    """Return a hash of the code for each kind of result.

    ``matches`` depend on the networks; ``refined`` matches and ``poses`` also depend on the geometry.

    Args:
        package: folder of ``kpmatch_ros``, with the libraries compiled by its build, if any.
        scripts: folder of the evaluation's modules.
    """
    files: list[Path] = []
    hashes = {}
    parts = {
        "matches": [*package.glob("models/*"), *package.glob("runtime/*"), scripts / "evaluation_matchers.py"],
        "refined": [*package.glob("geometry/*"), *package.glob("imaging/*"), *package.glob("tracking/*")],
        "poses": [scripts / "evaluation_truth.py"],
    }
    for kind, paths in parts.items():
        files += paths
        hashes[kind] = hash_of_code(files)  # of this part and the parts before it
    return hashes


class Cache:
    """Cache of the matchers' results, by ``matcher.key``, ``pair.key`` and the code that computed them.

    Args:
        processes: number of processes that estimate poses while the networks run.

    Attributes:
        code: see :func:`code_hashes`.
    """

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder = folder
        self.code = code_hashes(Path(kpmatch_ros.__file__).parent, Path(__file__).parent)
        self.pool = ProcessPoolExecutor(processes, get_context("spawn"), start_process)
        self.waiting: dict[Path, Future[None]] = {}

    def path(self, matcher: Matcher, pair: Pair, kind: str) -> Path:
        """The file of a pair's ``matches`` or ``poses``."""
        part = "refined" if kind == "matches" and isinstance(matcher, Refined) else kind
        orders = f"-{ORDERS}" if kind == "poses" else ""
        return self.folder / matcher.key / f"{pair.key}.{kind}{orders}-{self.code[part]}.npz"

    def holds(self, matcher: Matcher, pair: Pair) -> bool:
        """Whether all results of a pair are cached."""
        kinds = ["matches"] if pair.motion is None else ["matches", "poses"]
        return all(self.path(matcher, pair, kind).exists() for kind in kinds)

    def fill(self, matcher: Matcher, pair: Pair) -> None:
        """Match a pair and start the estimation of its poses, unless the results are cached."""
        found = self.matches(matcher, pair)
        poses = self.path(matcher, pair, "poses")
        if pair.motion is not None and not poses.exists() and poses not in self.waiting:
            self.waiting[poses] = self.pool.submit(find_pose, poses, pair.motion, found, matcher.resolution, ORDERS)

    def matches(self, matcher: Matcher, pair: Pair) -> Found:
        """Return the matches of a pair. Matches that another matcher refines are computed only once."""
        path = self.path(matcher, pair, "matches")
        kept = read(path)
        if kept is not None:
            counts = tuple(kept.pop("keypoints").tolist())
            return Found(**kept, keypoints=counts)  # type: ignore[arg-type]
        if isinstance(matcher, Refined):
            found = matcher.refine(*pair.images, self.matches(matcher.matcher, pair))
        else:
            found = matcher(*pair.images)
        arrays = {name: np.array(array) for name, array in found._asdict().items() if array is not None}
        save(path, **arrays)
        return found

    def result(self, matcher: Matcher, pair: Pair) -> Result:
        """Return the result of a matcher for a pair."""
        path = self.path(matcher, pair, "poses")
        if path in self.waiting:
            self.waiting[path].result()
        found, poses = self.matches(matcher, pair), read(path)
        return Result(
            found.points0,
            found.scores,
            pair.truth.errors(found.points0, found.points1),
            pair.max_error,
            found.keypoints,
            None if pair.motion is None or poses is None else poses["poses"],
            pair.place or pair.name,
        )


# --- the comparison --------------------------------------------------------------------------------------------------


def evaluate(matchers: list[Matcher], pairs: Iterator[Pair], cache: Cache, known: bool = False) -> dict[str, Any]:
    """Return the figures for each group of pairs and each matcher, see :func:`evaluation_figures.describe`.

    Args:
        known: use only pairs whose results are all cached.
    """
    used: dict[str, list[Pair]] = {}
    for number, pair in enumerate(pairs):
        if known and not all(cache.holds(matcher, pair) for matcher in matchers):
            continue
        for matcher in matchers:
            cache.fill(matcher, pair)
        used.setdefault(pair.group, []).append(pair)
        if number % 10 == 0:
            log_line(f"{pair.group}: {pair.name}")
    return {
        group: describe({m.name: [cache.result(m, pair) for pair in of_group] for m in matchers}, REFERENCE)
        for group, of_group in used.items()
    }


def make_matchers(arguments: argparse.Namespace, device: torch.device) -> list[Matcher]:
    """Create all matchers that the arguments name, the peers first.

    Raises:
        FileNotFoundError: files of a named peer are missing; without named peers, a peer without files is left out.
        ValueError: two matchers have the same name, or there is none.
    """
    teachers = arguments.teachers or arguments.data / "teachers"
    numbers = (arguments.keypoints, arguments.filter_threshold)
    matchers = []
    for name in PEERS if arguments.peers is None else arguments.peers:
        missing = missing_files(name, teachers)
        if not missing:
            matchers.append(load_peer(name, teachers, *numbers, device))
        elif arguments.peers is None:
            log_line(f"{PEERS[name]} is left out: {', '.join(map(str, missing))} missing")
        else:
            raise FileNotFoundError(f"{', '.join(map(str, missing))} missing: {PEERS[name]} needs them")
    readings = {"on": [True], "off": [False], "both": [False, True]}[arguments.subpixel]
    for text in arguments.weights:
        name, _, source = text.rpartition("=")
        weights = load_ours(name or Path(source).name, source, device, getattr(torch, arguments.precision))
        for radius, subpixel, threshold in itertools.product(
            arguments.nms_radius or [weights.extractor.nms_radius], readings, arguments.keypoint_threshold
        ):
            settings = (arguments.keypoints, radius, subpixel, threshold, arguments.filter_threshold)
            matchers.append(Ours(weights, *settings))
    if not matchers:
        raise ValueError("nothing to compare: set --weights or --peers")
    for name, count in Counter(matcher.name for matcher in matchers).items():
        if count > 1:
            raise ValueError(f"{count} matchers are called {name}: give them different names, --weights NAME=FOLDER")
    if arguments.refined:
        matchers += [Refined(matcher) for matcher in matchers]
    return matchers


def main(words: list[str] | None = None) -> None:
    """Evaluate according to the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser)  # the groups are in its folder eval/, see evaluation_pairs.py
    parser.add_argument("--teachers", type=Path, help="folder of the peers' files (default: teachers/ in --data)")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, help="only these groups")
    parser.add_argument(
        "--validation",
        type=Path,
        metavar="SHARDS",
        help="compare on the validation views of the training's shards instead",
    )
    parser.add_argument("--validation-pairs", type=int, default=60, help="number of pairs of photographs, and of rooms")
    parser.add_argument("--weights", nargs="*", default=[], metavar="NAME=FOLDER", help="our networks to compare")
    parser.add_argument("--nms-radius", nargs="+", type=int, help="pixels (default: as published with the weights)")
    parser.add_argument("--subpixel", choices=("on", "off", "both"), default="on")
    parser.add_argument("--keypoint-threshold", nargs="+", type=float, default=[0.0])
    parser.add_argument(
        "--filter-threshold", type=float, default=0.1, help="lowest score of a match, for every LightGlue"
    )
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, help="other networks to compare (default: all whose files exist)"
    )
    parser.add_argument("--refined", action="store_true", help="also evaluate each matcher with refined matches")
    parser.add_argument("--keypoints", type=int, default=1024)
    parser.add_argument("--cache", type=Path, default=Path("evaluation_cache"))
    parser.add_argument("--known", action="store_true", help="use only pairs whose results are all cached")
    parser.add_argument(
        "--out", type=Path, default=Path("evaluation"), help="path without suffix; .json and .md are added"
    )
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of our networks")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the networks")
    parser.add_argument("--processes", type=int, default=1, help="number of processes that estimate poses")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    cv2.setNumThreads(1)
    try:
        matchers = make_matchers(arguments, torch.device(arguments.device))
        if arguments.validation:
            pairs = iter(validation_pairs(arguments.validation, arguments.validation_pairs))
        else:
            pairs = groups(arguments.data / "eval", arguments.groups)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    cache = Cache(arguments.cache, arguments.processes)
    figures = evaluate(matchers, pairs, cache, arguments.known)
    if not figures:
        parser.error(f"no pair to compare in {'the cache' if arguments.known else 'the groups'}")
    content = {
        "versions": versions(),
        "code": cache.code,
        "orders": ORDERS,
        "keys": {m.name: m.key for m in matchers},
        "groups": figures,
    }
    table = markdown(figures, REFERENCE)
    # with_suffix() would cut a name such as new_0.1.
    arguments.out.with_name(f"{arguments.out.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    arguments.out.with_name(f"{arguments.out.name}.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
