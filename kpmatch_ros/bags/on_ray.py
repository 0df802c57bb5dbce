"""Replays the bags of an archive on Ray workers: Ray places them, retries them, and detects workers that died."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from kpmatch_ros.bags.archive import ATTEMPTS, Job, Settings, replay_one
from kpmatch_ros.bags.archive_table import Row
from kpmatch_ros.bags.recording import BagError
from kpmatch_ros.encodable import encodable

__all__ = ["replay_on_ray"]

_PATIENCE = 5.0  # seconds for a cluster to answer
_OBJECT_STORE = 100_000_000  # bytes. Only paths and figures are transferred; Ray's default is 30 % of the memory.


def replay_on_ray(
    jobs: list[Job], settings: Settings, address: str, cpus: float, gpus: float, say: Callable[[str], None]
) -> Iterator[Row]:
    """Replay bags on Ray, and yield the row of each bag when it is done.

    The workers need the package, the weights, and the folders under the same paths.

    Args:
        jobs: the bags.
        settings: for all bags.
        address: of a cluster, or local for workers on this machine.
        cpus, gpus: number that Ray reserves for one bag.
        say: called with each message that is not an error.

    Raises:
        BagError: Ray is not installed, the cluster cannot be reached, or this machine has too few CPUs or GPUs for one
            bag.
        ParameterError, WeightsError, OSError: see :func:`kpmatch_ros.bags.archive.replay_one`.
    """
    if importlib.util.find_spec("ray") is None:
        raise BagError("--ray: needs Ray, which is not installed: pip install ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_task_oom_retries", str(ATTEMPTS - 1))  # Ray's default is to retry for ever
    import ray
    from ray.exceptions import RayError, RayTaskError

    with _unanswered(jobs) as unanswered, _connected(address):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            largest = " and ".join(f"{max(node.get(kind, 0) for node in nodes):g} {kind}s" for kind in ("CPU", "GPU"))
            text = (
                f"a bag needs {cpus:g} CPUs and {gpus:g} GPUs on one machine, but Ray's machines have at most {largest}"
            )
            if address == "local":
                raise BagError(text)
            say(f"{text}; the bags wait until a large enough machine joins")
        # Without this, Ray leaves the GPUs visible to a task that reserves none.
        environment = {"env_vars": {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}}
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=ATTEMPTS - 1, runtime_env=environment)
        task = remote(replay_one)
        waiting = {task.options(name=f"kpmatch {encodable(job.name)}").remote(job, settings): job for job in jobs}
        for done in ray.util.as_completed(list(waiting), chunk_size=1, yield_obj_refs=True):
            job = waiting[done]
            try:
                row = ray.get(done)
            except RayTaskError as error:
                raise error.cause from None
            except RayError as error:
                row = {"bag": job.name, "state": "failed", "message": f"{job.source}: {_reason(error)}"}
            unanswered.remove(job)
            yield row


@contextmanager
def _unanswered(jobs: list[Job]) -> Iterator[set[Job]]:
    """A set of the jobs, from which the caller removes those that are answered.

    For the jobs left at the end, this run's attempts are not counted: their workers were stopped, they did not die.
    """
    before = {job: job.begun for job in jobs}
    unanswered = set(jobs)
    try:
        yield unanswered
    finally:
        for job in unanswered:
            job.forget_attempts_after(before[job])


def _reason(error: Exception) -> str:
    """Why Ray gave up on a bag, in words."""
    from ray.exceptions import OutOfMemoryError, WorkerCrashedError

    text = f"{' '.join(str(error).split()):.300}"
    if isinstance(error, OutOfMemoryError):
        return f"its machine ran out of memory; with a larger --cpus-per-bag, Ray runs fewer bags at a time: {text}"
    if isinstance(error, WorkerCrashedError):
        return f"its worker died {ATTEMPTS} times: {text}"
    return f"Ray could not run it: {text}"


@contextmanager
def _connected(address: str) -> Iterator[None]:
    import ray

    endpoint = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    try:
        if endpoint:  # checked first, because Ray retries for minutes and logs a line each time
            socket.create_connection((endpoint[1], int(endpoint[2])), _PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise BagError(
            f"--ray {address}: nothing answers at this address: {error}; `ray status` on the cluster shows its address"
        ) from error
    options: dict[str, Any] = (
        {"include_dashboard": False, "object_store_memory": _OBJECT_STORE} if address == "local" else {}
    )
    in_main = threading.current_thread() is threading.main_thread()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        hint = (
            "" if address == "local" else "; if the cluster uses token authentication, set RAY_AUTH_MODE=token here too"
        )
        raise BagError(f"--ray {address}: Ray cannot be reached: {text.rstrip('.'):.300}{hint}") from error
    try:
        if in_main:
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler would exit without a message
        with redirect_stdout(sys.stderr):  # Ray prints to stdout that a worker died, but stdout is for the table
            yield
    finally:
        ray.shutdown()
