"""Common code of all trainings: networks and their averages, settings, schedule, log, checkpoints."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from common import log_line
from torch import Tensor, nn
from views import Source, ViewPairs

__all__ = [
    "Batches",
    "Settings",
    "Student",
    "add_options",
    "rate",
    "run",
    "settings_of",
    "subnormals_are_zeros",
    "validation_means",
    "validation_parts",
]

T = TypeVar("T")
PATIENCE = 100  # number of successive steps without a finite loss
PART = 15_000_000  # bytes: larger files are also written in parts
VALIDATION_BATCH = 4  # pairs of views computed at once
AHEAD = 2  # on a processor, number of batches that are prepared in advance


# --- networks --------------------------------------------------------------------------------------------------------


@dataclass
class Student:
    """A network in training, its optimiser, and the moving average of its weights, which is the result.

    Attributes:
        name: its name in files.
        rate: the full learning rate.
        failed: number of successive steps up to now whose loss was not finite.
        taken: number of steps of this call whose loss was finite.
    """

    name: str
    model: Any
    rate: float
    average: Any = field(init=False)
    optimiser: torch.optim.Optimizer = field(init=False)
    failed: int = field(default=0, init=False)
    taken: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.model.requires_grad_(True).train()
        on_gpu = next(self.model.parameters()).is_cuda
        self.optimiser = torch.optim.AdamW(self.model.parameters(), self.rate, weight_decay=1e-4, fused=on_gpu)

    def step(self, loss: Tensor, rate: float, number: int) -> None:
        """Take an optimiser step. A loss that is not finite changes nothing.

        Args:
            rate: share of the full learning rate.
            number: number of the step.

        Raises:
            FloatingPointError: PATIENCE successive losses were not finite.
        """
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * self.rate
        if not torch.isfinite(norm):
            self.failed += 1
            if self.failed == PATIENCE:
                raise FloatingPointError(f"the loss of {self.name} was not finite in {self.failed} steps in a row")
            return
        self.failed, self.taken = 0, self.taken + 1
        self.optimiser.step()
        decay = min(0.999, (1 + number) / (10 + number))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    def state(self) -> dict[str, Any]:
        return {
            "config": self.model.config,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])


# --- settings --------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """Settings of a run. Learning rate and curriculum depend on ``progress``, which goes from 0 to 1."""

    device: torch.device
    batch: int
    size: tuple[int, int]
    seed: int
    precision: torch.dtype | None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision or torch.bfloat16, enabled=self.precision is not None)

    def draw(self, *key: int) -> torch.Generator:
        """Return random numbers for a purpose and a step; a resumed run gets the same ones as an uninterrupted run."""
        value = self.seed
        for part in key:
            value = (value * 1_000_003 + part + 1) % (1 << 62)
        return torch.Generator(self.device).manual_seed(value)


def add_options(parser: argparse.ArgumentParser, batch: int, size: tuple[int, int]) -> None:
    """Add the options that all trainings have; ``batch`` and ``size`` are their defaults."""
    parser.add_argument("--shards", type=Path, required=True, help="folder of photos_*.npz and rooms_*.npz")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument(
        "--minutes", type=float, help="length of the schedule in minutes, at whose end the learning rate is zero"
    )
    length.add_argument("--steps", type=int, help="length of the schedule in steps")
    parser.add_argument("--stop-after", type=int, help="stop after this many steps; a later call resumes")
    parser.add_argument("--batch", type=int, default=batch, help="pairs of views per step (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=size, help="width and height of a view, pixels")
    parser.add_argument(
        "--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of convolutions and matrix products"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50, help="steps between two lines of the log")
    parser.add_argument("--watch-every", type=float, default=60, help="seconds between two validations")
    parser.add_argument("--watch-views", type=int, default=24, help="number of validation pairs of each source")
    parser.add_argument("--save-every", type=float, default=120, help="seconds between two checkpoints")


def validation_parts(
    validation: list[Source], settings: Settings, count: int
) -> Iterator[tuple[str, ViewPairs, torch.Generator]]:
    """Yield ``count`` validation pairs of each source in small groups, with the source's name and random numbers.

    The pairs are the same in all runs with the same size and kind of device, whatever their seed and batch. The choice
    of four pairs changes a figure by more than a training does.
    """
    alike = replace(settings, seed=0)
    for number, source in enumerate(validation):
        for start in range(0, count, VALIDATION_BATCH):
            draw = alike.draw(3, number, start)
            yield type(source).__name__, source.pairs(draw, min(VALIDATION_BATCH, count - start), settings.size), draw


def validation_means(
    validation: list[Source],
    settings: Settings,
    count: int,
    judge: Callable[[str, ViewPairs, torch.Generator], Mapping[str, float]],
) -> dict[str, float]:
    """Return the mean of the figures of ``judge`` over all pairs of :func:`validation_parts`."""
    figures: dict[str, list[float]] = {}
    for name, pairs, draw in validation_parts(validation, settings, count):
        for key, value in judge(name, pairs, draw).items():
            figures.setdefault(key, []).extend([float(value)] * len(pairs.images[0]))
    return {key: sum(values) / len(values) for key, values in figures.items()}


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Return the settings from the options."""
    named = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = True  # not for matrix products: TF32 would move the views' points by half a pixel
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    return Settings(
        torch.device(named if arguments.device == "auto" else arguments.device),
        arguments.batch,
        tuple(arguments.size),
        arguments.seed,
        {"bfloat16": torch.bfloat16, "float32": None}[arguments.precision],
    )


@contextmanager
def subnormals_are_zeros() -> Iterator[None]:
    """Let the processor flush subnormal numbers to zero, in this thread and in those that it starts.

    The gradients of a confident network's assignments are full of subnormal numbers, and products of them take several
    times as long.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


# --- batches ---------------------------------------------------------------------------------------------------------


class Batches(Generic[T]):
    """Batches by number; a number gives the same batch in every run.

    On a processor, another thread prepares the next batches during a training step.

    Args:
        make: creates the batch of a number.
        count: number of different batches, which are kept and used again; 0 creates a new one for each step.
        renewed: number of steps after which a new batch replaces the oldest one that is kept; 0 replaces none.
    """

    def __init__(self, make: Callable[[int], T], count: int, settings: Settings, renewed: int = 0) -> None:
        self.make, self.count, self.renewed, self.seed = make, count, renewed, settings.seed
        self.ahead = AHEAD if settings.device.type == "cpu" else 0
        self.worker = ThreadPoolExecutor(1)
        self.futures: dict[int, Future[T]] = {}

    def of(self, step: int) -> T:
        """The batch for a step."""
        for each in range(step, step + 1 + self.ahead):
            number = self._number(each)
            if number not in self.futures:
                self.futures[number] = self.worker.submit(self.make, number)
        number = self._number(step)
        future = self.futures.pop(number)
        batch = future.result()  # if it raises, for example for lack of memory, the batch is not kept
        if self.count:
            self.futures[number] = future
        oldest = self._oldest(step)
        self.futures = {number: future for number, future in self.futures.items() if number >= oldest}
        return batch

    def _number(self, step: int) -> int:
        if not self.count:
            return step
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return self._oldest(step) + int(torch.randint(self.count, (), generator=draw))

    def _oldest(self, step: int) -> int:
        return step // self.renewed if self.renewed else 0


# --- the loop --------------------------------------------------------------------------------------------------------


def rate(progress: float) -> float:
    """Learning rate schedule: rises over the first 2 %, stays, and falls to zero over the last 40 % like a cosine."""
    fall = max(0.0, (progress - 0.6) / 0.4)
    return min(1.0, (progress + 1e-4) / 0.02) * 0.5 * (1 + math.cos(math.pi * min(fall, 1.0)))


def progresses(arguments: argparse.Namespace, step: int, elapsed: float) -> Iterator[float]:
    """Yield the progress before each step, by the number of steps or by the time spent."""
    started = time.monotonic() - elapsed
    last = math.inf if arguments.stop_after is None else step + arguments.stop_after
    while step < last:
        if arguments.steps is not None:
            progress = step / arguments.steps
        else:
            progress = (time.monotonic() - started) / (60 * arguments.minutes)
        if progress >= 1:
            return
        yield progress
        step += 1


def run(
    arguments: argparse.Namespace,
    settings: Settings,
    students: list[Student],
    learn: Callable[[int, float], Mapping[str, Any]],
    validate: Callable[[], Mapping[str, float]],
) -> None:
    """Train, from the checkpoint in ``--out`` if there is one; write checkpoints, a log and the averaged weights there.

    Args:
        learn: trains the students for one step, given its number and the progress; returns the figures to log.
        validate: returns validation figures of the averaged networks.

    Raises:
        ValueError: the checkpoint's networks are not exactly these: others would be lost, and missing ones would start
            in the middle of the schedule.
        torch.OutOfMemoryError: a single pair of views needs too much memory; a checkpoint is written before.
        FloatingPointError: losses are not finite in PATIENCE successive steps, or in all steps of a run that was not
            resumed. The weights are not written then.
    """
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.out / f"{arguments.kind}.pt"
    first, elapsed = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=settings.device, weights_only=True)
        held = state.keys() - {"step", "elapsed"}
        if held != {student.name for student in students}:
            raise ValueError(
                f"{checkpoint} holds {', '.join(sorted(held))}: continue with exactly these networks, or use another "
                "folder"
            )
        for student in students:
            student.restore(state[student.name])
        first, elapsed = state["step"], state["elapsed"]
        log_line(f"resuming after step {first}")
    log = arguments.out / f"{arguments.kind}.jsonl"

    def write(text: str, line: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
        plain = {key: round(float(value), 4) for key, value in figures.items()}
        with log.open("a") as stream:
            stream.write(json.dumps({**line, **({"validation": plain} if text == "validation" else plain)}) + "\n")
        log_line(f"step {line['step']} {text} " + " ".join(f"{key} {value:.3f}" for key, value in plain.items()))

    started = time.monotonic() - elapsed
    validated_at = saved_at = time.monotonic()
    write("validation", {"step": first}, validate())
    step = first
    for progress in progresses(arguments, first, elapsed):
        step += 1
        try:
            figures = learn(step, progress)
        except torch.OutOfMemoryError:
            if settings.batch == 1:
                save(checkpoint, students, step - 1, time.monotonic() - started)
                raise
            settings.batch = settings.batch * 3 // 4
            torch.cuda.empty_cache()
            log_line(f"out of memory: continuing with {settings.batch} pairs per step")
            continue
        now = time.monotonic()
        if step % arguments.log_every == 0 or step == first + 1:
            line = {"step": step, "seconds": round(now - started, 1), "progress": round(progress, 4)}
            write(f"{progress:.0%} {now - started:.0f} s", line, figures)
        if now - validated_at > arguments.watch_every:
            write("validation", {"step": step}, validate())
            validated_at = time.monotonic()
        if now - saved_at > arguments.save_every:
            save(checkpoint, students, step, now - started)
            saved_at = time.monotonic()
    for student in students:
        if not first and student.failed and not student.taken:
            raise FloatingPointError(f"the loss of {student.name} was not finite in any of {student.failed} steps")
    write("validation", {"step": step}, validate())
    save(checkpoint, students, step, time.monotonic() - started)
    export(arguments, students)


def save(path: Path, students: list[Student], step: int, elapsed: float) -> None:
    """Write a checkpoint atomically: the file is complete or does not exist."""
    partial = path.with_suffix(".part")
    torch.save({student.name: student.state() for student in students} | {"step": step, "elapsed": elapsed}, partial)
    os.replace(partial, path)


def export(arguments: argparse.Namespace, students: list[Student]) -> None:
    """Write the averaged weights to ``KIND.weights.pt``. A file of more than PART bytes is also written in parts."""
    path = arguments.out / f"{arguments.kind}.weights.pt"
    dtype = torch.float32 if arguments.kind == "points" else torch.float16
    torch.save(
        {
            student.name: {
                "config": student.model.config,
                "tensors": {key: value.to(dtype).cpu() for key, value in student.average.state_dict().items()},
            }
            for student in students
        },
        path,
    )
    content = path.read_bytes()
    for old in path.parent.glob(f"{path.name}.*"):  # an earlier file may have had more parts
        old.unlink()
    for number in range(0, len(content), PART):
        path.with_name(f"{path.name}.{number // PART}").write_bytes(content[number : number + PART])
    log_line(f"wrote {path}, {len(content) / 1e6:.1f} MB")
