"""kpmatch archive: replays all bags below a folder, and writes the node's messages for each bag and one table."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpmatch_ros.cli.bag import add_replay_options, chosen_topics, replay_parameters
from kpmatch_ros.cli.common import CommandError, add_command, check_outputs, option_of
from kpmatch_ros.tables import format_table

if TYPE_CHECKING:
    from kpmatch_ros.bags.archive import Job, Settings
    from kpmatch_ros.bags.archive_table import Row

__all__ = ["add_archive"]


def add_archive(commands: Any) -> None:
    parser = add_command(
        commands,
        "archive",
        _archive,
        "run the matcher on all bags below a folder, on this machine or on Ray, and write one table",
        "Replay every bag below a folder as `kpmatch bag` does. Finished bags are skipped. Bags that cannot be used "
        "are reported and left out. The options for topics, parameters and outputs are those of `kpmatch bag`, and "
        "apply to all bags.",
        "kpmatch archive recordings matched",
        "kpmatch archive recordings matched --ray local --cpus-per-bag 2",
        "kpmatch archive /data/recordings /data/matched --ray 10.0.0.1:6379 --gpus-per-bag 0.25",
    )
    parser.add_argument("source", metavar="IN", type=Path, help="folder with bags, at any depth")
    parser.add_argument("target", metavar="OUT", type=Path, help="output folder, new or of an earlier run")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="replay several bags at a time on Ray's workers: the address of a cluster, as ray.init takes it, or local "
        "for this machine (needs ray). Without it, this machine replays one bag after the other",
    )
    for kind, default in (("cpu", 1.0), ("gpu", 0.0)):
        parser.add_argument(
            f"--{kind}s-per-bag",
            metavar="X",
            type=_share,
            help=f"{kind.upper()}s that Ray reserves for each bag; with 0.25, four bags share one "
            f"(default {default:g})",
        )
    parser.add_argument(
        "--poses", action="store_true", help="also write the chained poses of each bag to poses.txt in its folder"
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="also write an HTML page for each bag to report.html in its folder (needs plotly)",
    )
    add_replay_options(parser)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1024 or (value > 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a fraction from 0 to 1 nor a whole number up to 1024")
    return value


def _archive(options: argparse.Namespace) -> int:
    from kpmatch_ros.bags import BagError
    from kpmatch_ros.bags.archive import WRITTEN, Settings, claimed, find_bags, finished_row, jobs_for
    from kpmatch_ros.bags.archive_table import write_tables

    source, out = options.source.resolve(), options.target.resolve()
    if not source.is_dir():
        raise CommandError(f"{options.source}: there is no such folder")
    if source == out or source in out.parents:
        raise CommandError(f"{options.target}: is inside {options.source}, and would be read too; choose another place")
    for name in ("cpus_per_bag", "gpus_per_bag"):
        if options.ray is None and vars(options)[name] is not None:
            raise CommandError(f"{option_of(name)}: applies only with --ray; give --ray too")
    if options.cpus_per_bag == 0 and not options.gpus_per_bag:
        raise CommandError(
            "--cpus-per-bag 0: Ray would start all bags at once; give a larger number, or --gpus-per-bag too"
        )
    parameters = replay_parameters(options)
    for name in WRITTEN:
        check_outputs({"": out / name}, [options.params], parameters)
    topics = chosen_topics(options, parameters)
    settings = Settings(
        parameters, topics, options.features, options.match_image, options.landmarks, options.poses, options.report
    ).with_whole_paths()
    started = time.perf_counter()
    try:
        bags = find_bags(source, out)
        with claimed(out, settings) as unfinished:
            jobs = jobs_for(bags, source, out, unfinished)
            rows = {job.name: row for job in jobs if (row := finished_row(job)) is not None}
            before = len(rows)
            # Bags that killed a process come last: if one kills the process again, the others are done.
            to_do = sorted((job for job in jobs if job.name not in rows), key=lambda job: job.begun)

            def write() -> list[Path]:
                return write_tables([rows[job.name] for job in jobs if job.name in rows], out, unfinished)

            try:
                _run(options, to_do, settings, rows)
            except BaseException as error:  # Ctrl-C too
                if len(rows) == before:
                    raise
                note = _end_early(f"{len(jobs) - len(rows)} of {len(jobs)} bags", write)
                if isinstance(error, BagError):
                    raise CommandError(f"{error}; {note}") from error
                print(f"{options.name}: {note}", file=sys.stderr)
                raise
            written = write()
    except BagError as error:
        raise CommandError(str(error)) from error
    print(format_table(_summary(list(rows.values()), before, time.perf_counter() - started, written)))
    failed = [row for row in rows.values() if row["state"] == "failed"]
    if failed:
        raise CommandError(f"{len(failed)} of {len(rows)} bags failed; the same command tries them again")
    if all(row["state"] in ("broken", "unsuitable") for row in rows.values()):
        raise CommandError(f"none of the {len(rows)} bags can be used")
    return 0


def _end_early(waiting: str, write: Callable[[], list[Path]]) -> str:
    """Write the table of a run that is stopped early. Returns a text that says what the table lacks."""
    try:
        text = f"they are missing in {' and '.join(map(str, write()))}"
    except OSError as error:  # for example a full disk, which may be why the run stops
        text = f"the table cannot be written: {error.strerror or error}; the table of an earlier run may still be there"
    return f"{waiting} are not done yet; {text}; the same command continues with them"


def _run(options: argparse.Namespace, jobs: list[Job], settings: Settings, rows: dict[str, Row]) -> None:
    """Replay bags, add their rows to `rows`, and print the message of each bag that is not done."""
    from tqdm import tqdm

    def say(text: str) -> None:
        tqdm.write(f"{options.name}: {text}", file=sys.stderr)

    total = len(rows) + len(jobs)
    # disable=None: no progress bar if stderr is not a terminal
    with (
        tqdm(total=total, initial=len(rows), desc="bags", unit="bag", disable=None, leave=False) as bar,
        closing(_replayed(options, jobs, settings, say)) as results,
    ):
        for row in results:
            rows[row["bag"]] = row
            if row["state"] != "done":
                say(row["message"])
            bar.update()


def _replayed(options: argparse.Namespace, jobs: list[Job], settings: Settings, say: Any) -> Generator[Row, None, None]:
    from kpmatch_ros.bags.archive import replay_one
    from kpmatch_ros.bags.on_ray import replay_on_ray

    if not jobs:
        return
    if options.ray is None:
        for job in jobs:
            yield replay_one(job, settings)
        return
    cpus = 1.0 if options.cpus_per_bag is None else options.cpus_per_bag
    yield from replay_on_ray(jobs, settings, options.ray, cpus, options.gpus_per_bag or 0.0, say)


def _summary(rows: list[Row], before: int, seconds: float, tables: list[Path]) -> list[tuple[str, str]]:
    states = Counter(row["state"] for row in rows)
    poses: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    for row in rows:
        poses.update(row.get("poses", {}))
        rejected.update(row.get("rejected", {}))

    def counts(counter: Counter[str]) -> str:
        return ", ".join(f"{name} {count}" for name, count in sorted(counter.items())) or "none"

    earlier = f" ({before} of them in an earlier run)" if before else ""
    others = "".join(f", {states[state]} {state}" for state in ("broken", "unsuitable", "failed") if states[state])
    no_parquet = "" if len(tables) > 1 else " (archive.parquet needs pyarrow, which is not installed)"
    return [
        ("bags", f"{states['done']} done{earlier}{others}"),
        ("frames", f"{sum(row.get('frames', 0) for row in rows)}"),
        ("poses", counts(poses)),
        ("rejected", counts(rejected)),
        ("seconds", f"{seconds:.1f}"),
        ("table", " and ".join(map(str, tables)) + no_parquet),
    ]
