"""What both trainings share: pictures, views of them, checkpoints that survive a kill at any moment, a log.

Everything random is drawn from (seed, what it is for, step), not from a generator that has to be carried along: a run
that was killed and resumed sees the same data as one that was not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor, nn

Array = np.ndarray
T = TypeVar("T")

DEFAULT_DATA = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kpmatch_training"


# --- files ----------------------------------------------------------------------------------------------------------


def add_data_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="pictures and teachers (default: %(default)s)")


def log_line(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def write_json(path: Path, content: Any) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def kept(path: Path, make: Callable[[], dict[str, Array]]) -> dict[str, Array]:
    """The arrays of an .npz file; where it is not there they are made, and written whole or not at all."""
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.part.npz")
        np.savez(partial, **make())  # type: ignore[arg-type]
        os.replace(partial, path)
    # Read back even when just made, so that the first time is no different from the others.
    with np.load(path) as arrays:
        return dict(arrays)


def weights_of(model: nn.Module) -> bytes:
    """What tells a network's weights from others', to be hashed."""
    return b"".join(tensor.cpu().numpy().tobytes() for tensor in model.state_dict().values())


def read_manifest(data: Path) -> dict[str, Any]:
    """What prepare.py wrote.

    Raises:
        SystemExit: when it has not been run.
    """
    path = data / "manifest.json"
    if not path.exists():
        sys.exit(f"{path} is not there: run training/prepare.py --data {data} first")
    return json.loads(path.read_text())


def pictures(data: Path, split: str) -> list[Path]:
    """The pictures of a split, ``train`` or ``held-out``."""
    return [data / picture["file"] for picture in read_manifest(data)["pictures"] if picture["split"] == split]


def read_rgb(path: Path) -> Array:
    """An image file as (H, W, 3) uint8.

    Raises:
        OSError: when it is missing or damaged.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise OSError(f"{path} is missing or no image; training/prepare.py fetches pictures again that are deleted")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def versions() -> dict[str, str]:
    """What a result depends on besides the code and the seed."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "processor": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


class Run:
    """The folder of a training: ``checkpoint.pt``, the one before it, ``log.jsonl`` and ``run.json``.

    Args:
        settings: what decides the result; resuming with others is refused.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.checkpoint = folder / "checkpoint.pt"
        self._log = folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / "run.json"
        if kept.exists():
            before = json.loads(kept.read_text())["settings"]
            changed = [
                f"{key}: {before.get(key)} then, {value} now"
                for key, value in settings.items()
                if before.get(key) != value
            ]
            if changed:
                sys.exit(f"{folder} holds another run ({'; '.join(changed)}): give those or another folder")
        else:
            write_json(kept, {"settings": settings, "versions": versions()})

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The last checkpoint, or the one before it where the last is damaged; None at the start."""
        for path in (self.checkpoint, self.checkpoint.with_suffix(".previous.pt")):
            if not path.exists():
                continue
            try:
                state = torch.load(path, map_location=device, weights_only=True)
            except Exception as error:  # noqa: BLE001 - a damaged archive raises whatever its damage leads to
                log_line(f"{path} cannot be read ({error}); trying the one before")
                continue
            self._forget_after(state["step"])
            return state
        return None

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint: at every moment there is a whole one under its name or under the previous one's."""
        partial = self.checkpoint.with_suffix(".part")
        torch.save(state, partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        if self.checkpoint.exists():
            os.replace(self.checkpoint, self.checkpoint.with_suffix(".previous.pt"))
        os.replace(partial, self.checkpoint)

    def log(self, **values: Any) -> None:
        """Append a line to the log."""
        rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in values.items()}
        with self._log.open("a") as stream:
            stream.write(json.dumps(rounded) + "\n")

    def _forget_after(self, step: int) -> None:
        """Steps after the checkpoint will be done and logged again."""
        if self._log.exists():
            lines = self._log.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            partial = self._log.with_suffix(".part")
            partial.write_text("".join(f"{line}\n" for line in kept))
            os.replace(partial, self._log)


class Average:
    """The exponential moving average of a model's parameters and buffers: what is exported."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(0.999, (1 + step) / (10 + step))  # at the start the average is over what there is
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                self.tensors[name].lerp_(tensor, 1 - decay)
            else:
                self.tensors[name].copy_(tensor)


def learning_rate(step: int, steps: int, warm_up: int = 200) -> float:
    """Rises over the first steps, stays, and falls to zero over the last fifth: as a share of the full rate."""
    return min(1.0, (step + 1) / warm_up, max(0.0, (steps - step) / (0.2 * steps)))


def ahead(make: Callable[[int], T], numbers: range, workers: int) -> Iterator[T]:
    """``make`` of each number in order, worked out by threads while the caller uses the ones before."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[Future[T]] = []
        try:
            for number in numbers:
                waiting.append(pool.submit(make, number))
                if len(waiting) > workers:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


# --- training ---------------------------------------------------------------------------------------------------------


def add_run_options(parser: argparse.ArgumentParser, steps: int, rate: float, examine_every: int, what: str) -> None:
    """What every training takes; ``what`` is what of held-out pictures it is examined on."""
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoints and the log")
    parser.add_argument("--steps", type=int, default=steps, help="until the learning rate is down to zero")
    parser.add_argument("--learning-rate", type=float, default=rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--workers", type=int, default=1, help="threads that make a step's data")
    parser.add_argument("--save-every", type=float, default=120, help="seconds")
    parser.add_argument("--examine-every", type=int, default=examine_every, help="steps")
    parser.add_argument("--held-out", type=int, default=16, help=f"{what} of held-out pictures to examine")
    parser.add_argument("--stop-after", type=int, help="steps of this call, to come back later")


def fit(
    model: nn.Module,
    config: dict[str, Any],
    run: Run,
    state: dict[str, Any] | None,
    arguments: argparse.Namespace,
    make: Callable[[int], T],
    losses: Callable[[T], dict[str, Tensor]],
    examine: Callable[[dict[str, Tensor]], dict[str, float]],
    largest_gradient: float,
) -> None:
    """Train a model, for as many steps as ``arguments`` say.

    Args:
        config: what the network to export is made from; kept in the checkpoint.
        state: the run's last checkpoint, to go on from; None at the start.
        make: a step's data, by its number from 0 on; worked out by threads while the step before runs.
        losses: of these data, by name; ``total`` is what is to fall, the others are logged.
        examine: figures of the averaged weights, on pictures that are not trained on.
        largest_gradient: the norm that it is cut down to.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=1e-4)
    average = Average(model)
    first = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        average.tensors = state["average"]
        first = state["step"]
        log_line(f"going on after step {first}")

    def report(step: int) -> None:
        figures = examine(average.tensors)
        run.log(step=step, held_out=True, **figures)
        log_line(f"step {step}, held out: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))

    if first == 0:
        report(0)
    last = min(arguments.steps, first + (arguments.stop_after or arguments.steps))
    saved = started = time.monotonic()
    for step, data in enumerate(ahead(make, range(first, last), arguments.workers), start=first + 1):
        for group in optimiser.param_groups:
            group["lr"] = arguments.learning_rate * learning_rate(step - 1, arguments.steps)
        model.train()
        parts = losses(data)
        optimiser.zero_grad(set_to_none=True)
        parts["total"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), largest_gradient)
        optimiser.step()
        average.update(model, step)
        figures = {name: float(part.detach()) for name, part in parts.items()}
        run.log(step=step, seconds=time.monotonic() - started, **figures)
        if step % arguments.examine_every == 0:
            report(step)
        if time.monotonic() - saved > arguments.save_every or step == last:
            run.save(
                {
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "average": average.tensors,
                    "step": step,
                    "config": config,
                }
            )
            saved = time.monotonic()
    log_line(f"stopped after step {last} of {arguments.steps}; checkpoint {run.checkpoint}")


# --- views of a picture ----------------------------------------------------------------------------------------------


def generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def random_crop(rng: np.random.Generator, image: Array, width: int, height: int) -> Array:
    """A part of an image, scaled down to width x height: anything from a tight crop to nearly the whole image."""
    rows, columns = image.shape[:2]
    largest = min(columns / width, rows / height)
    scale = np.exp(rng.uniform(np.log(min(0.75, largest)), np.log(largest)))
    w, h = int(width * scale), int(height * scale)
    x, y = rng.integers(0, columns - w + 1), rng.integers(0, rows - h + 1)
    mode = cv2.INTER_AREA if scale > 1 else cv2.INTER_CUBIC
    part = cv2.resize(image[y : y + h, x : x + w], (width, height), interpolation=mode)
    return part[:, ::-1].copy() if rng.random() < 0.5 else part


def random_homography(
    rng: np.random.Generator, source: tuple[int, int], target: tuple[int, int], strength: float
) -> Array:
    """(3, 3) homography from an image of size ``source`` to a view of size ``target`` (width, height) that it fills.

    Args:
        strength: 0 for the middle of the image as it is, 1 for strong turns, tilts and changes of scale.
    """
    angle = rng.normal() * 0.35 * strength
    scale = np.exp(rng.normal() * 0.28 * strength)
    aspect = np.exp(rng.normal() * 0.08 * strength)
    tilt = rng.normal(size=2) * 0.30 * strength / np.array(target)  # perspective
    cos, sin = np.cos(angle), np.sin(angle)
    centre_source = np.array([[1, 0, -(source[0] - 1) / 2], [0, 1, -(source[1] - 1) / 2], [0, 0, 1]])
    turn = np.array([[cos * scale * aspect, -sin * scale, 0], [sin * scale * aspect, cos * scale, 0], [*tilt, 1]])
    shift = rng.uniform(-0.5, 0.5, 2) * (np.array(source) - np.array(target)) * min(1.0, strength + 0.3)
    shift = shift + rng.normal(size=2) * 0.05 * strength * np.array(target)
    centre_target = np.array(
        [[1, 0, (target[0] - 1) / 2 + shift[0]], [0, 1, (target[1] - 1) / 2 + shift[1]], [0, 0, 1]]
    )
    return centre_target @ turn @ centre_source


def project(homography: Array, points: Array) -> Array:
    """(N, 2) points through a homography; NaN for what comes to lie behind the camera."""
    mapped = np.c_[points, np.ones(len(points))] @ homography.T
    return np.where(mapped[:, 2:] > 1e-6, mapped[:, :2] / np.maximum(mapped[:, 2:], 1e-6), np.nan)


def inside(points: Array, size: tuple[int, int], margin: float = 0.0) -> Array:
    """(N,) which points lie in an image of that width and height; NaN does not."""
    with np.errstate(invalid="ignore"):
        return ((points >= margin) & (points <= np.array(size) - 1 - margin)).all(axis=1)


def warp(image: Array, homography: Array, size: tuple[int, int]) -> Array:
    """The view of an image through a homography. Beyond the image is its mirror image: no edge that is not there."""
    return cv2.warpPerspective(image, homography, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def degrade(rng: np.random.Generator, image: Array, strength: float) -> Array:
    """What light, lens, sensor and compression of a robot's camera may make of a grey image.

    Args:
        image: (H, W) uint8.
        strength: 0 leaves it as it is; 1 goes up to images that people find hard to read.

    Returns:
        (H, W) uint8.
    """

    def chance(probability: float) -> bool:
        return rng.random() < probability * min(1.0, strength)

    height, width = image.shape
    x = image.astype(np.float32) / 255
    if chance(0.4):  # light that changes over the image: lamps, shadows, vignetting
        coarse = rng.uniform(-1, 1, (3, 4)).astype(np.float32) * 0.5 * strength
        x *= np.exp(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
    if chance(0.8):
        x = np.clip(x, 0, 1) ** np.float32(np.exp(rng.normal() * 0.35 * strength))  # gamma
    if chance(0.8):  # contrast, and veiling light
        mean = x.mean()
        x = (x - mean) * np.float32(np.exp(rng.normal() * 0.35 * strength)) + mean
        x += np.float32(rng.normal() * 0.08 * strength)
    if chance(0.25):  # as a camera of less resolution would give it
        small = rng.uniform(1 - 0.55 * strength, 1.0)
        x = cv2.resize(
            cv2.resize(x, None, fx=small, fy=small, interpolation=cv2.INTER_AREA),
            (width, height),
            interpolation=cv2.INTER_LINEAR,
        )
    if chance(0.3):
        x = cv2.GaussianBlur(x, (0, 0), 0.3 + abs(rng.normal()) * 0.9 * strength)
    elif chance(0.25):
        x = cv2.filter2D(x, -1, _motion(rng, 3 + int(rng.integers(0, 7) * strength)), borderType=cv2.BORDER_REFLECT_101)
    exposure = np.float32(1.0)
    if chance(0.25):  # low light: few photons, then gain
        exposure = np.float32(np.exp(-abs(rng.normal()) * 1.2 * strength))
    elif chance(0.2):  # overexposed
        exposure = np.float32(np.exp(abs(rng.normal()) * 0.35 * strength))
    x = np.clip(x * exposure, 0, 1)
    if chance(0.7):
        noise = rng.standard_normal(x.shape, np.float32)
        read, shot = 0.012 * strength * abs(rng.normal()), 0.03 * strength * abs(rng.normal())
        x = x + noise * np.sqrt(np.float32(read**2) + np.float32(shot**2) * x)
    if exposure < 1:
        x = x * exposure ** -np.float32(rng.uniform(0, 1))
    result = np.round(np.clip(x, 0, 1) * 255).astype(np.uint8)
    if chance(0.4):
        quality = int(rng.uniform(95 - 75 * min(1.0, strength), 95))
        coded = cv2.imencode(".jpg", result, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        result = cv2.imdecode(coded, cv2.IMREAD_GRAYSCALE)
    return result


def _motion(rng: np.random.Generator, length: int) -> Array:
    """The kernel of a camera that moves during the exposure."""
    kernel = np.zeros((length, length), np.float32)
    angle, middle = rng.uniform(0, np.pi), (length - 1) / 2
    reach = np.array([np.cos(angle), np.sin(angle)]) * middle
    ends = [tuple(int(v) for v in np.round(middle + sign * reach)) for sign in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], 1.0)
    return kernel / kernel.sum()


def to_tensor(images: list[Array], device: torch.device) -> Tensor:
    """uint8 (H, W) images to (B, 1, H, W) in [0, 1]."""
    return torch.from_numpy(np.stack(images)).to(device)[:, None].float() / 255
