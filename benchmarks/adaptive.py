"""Do early stopping and point pruning save time? Processor time of matching, by precision and number of keypoints.

    OMP_NUM_THREADS=1 tools/with_ros python benchmarks/adaptive.py --bag BAG --keypoints 64 128 256 512 1024

Each pair is matched with all layers, with pruning, with stopping, and with both, in turn, so that other load on the
machine affects all of them equally. The figures are the mean time of the pairs and, in brackets, their mean number of
layers.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kpmatch_ros import FeatureMatcher, Features
from kpmatch_ros.bags import image_topics, read_messages
from kpmatch_ros.bags.demo import DEMO_BAG
from kpmatch_ros.imaging.images import to_array
from kpmatch_ros.runtime.processor import processor_name

MODES = {"all layers": (-1.0, -1.0), "pruning": (-1.0, 0.99), "stopping": (0.95, -1.0), "both": (0.95, 0.99)}


def first(features: Features, count: int) -> Features:
    """Return the first features, which have the highest scores."""
    return replace(
        features,
        keypoints=features.keypoints[:count],
        scores=features.scores[:count],
        descriptors=features.descriptors[:count],
    )


def measure(matcher: FeatureMatcher, pairs: Sequence[tuple[Features, Features]]) -> dict[str, tuple[float, float]]:
    """Return the mean processor time in milliseconds and the mean number of layers of a pair, by mode."""
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    layers: dict[str, list[int]] = {mode: [] for mode in MODES}
    for number, pair in enumerate(pairs):
        for mode, (depth, width) in MODES.items():
            matcher.configure(matcher.parameters.replace({"depth_confidence": depth, "width_confidence": width}))
            if number == 0:
                matcher.match(*pair)  # warm-up: the first call with new shapes takes longer
            started = time.process_time()
            layers[mode].append(matcher.match(*pair).layers)
            times[mode].append(1e3 * (time.process_time() - started))
    return {mode: (float(np.mean(times[mode])), float(np.mean(layers[mode]))) for mode in MODES}


def main(words: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bag", type=Path, default=DEMO_BAG, help="bag whose first image topic is used")
    parser.add_argument("--keypoints", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--apart", type=int, default=1, help="number of frames from one image of a pair to the other")
    options = parser.parse_args(words)
    topic = image_topics(options.bag)[0].name
    records = itertools.islice(read_messages(options.bag, [topic]), options.pairs + options.apart)
    images = [to_array(record.message) for record in records]
    print(f"{processor_name()}; {topic}, {options.pairs} pairs {options.apart} apart; ms of processor time (layers)")
    print(f"{'precision':>10} {'keypoints':>10} " + " ".join(f"{mode:>14}" for mode in MODES))
    for precision in options.precision:
        # A threshold of 0: with the published one, an image may have too few keypoints for the largest numbers.
        matcher = FeatureMatcher(precision=precision, max_keypoints=max(options.keypoints), keypoint_threshold=0.0)
        extracted = [matcher.extract(image) for image in images]
        for count in options.keypoints:
            taken = [first(features, count) for features in extracted]
            found = measure(matcher, list(zip(taken, taken[options.apart :]))[: options.pairs])
            cells = " ".join(f"{f'{milliseconds:.0f} ({layers:.1f})':>14}" for milliseconds, layers in found.values())
            print(f"{precision:>10} {count:>10} {cells}", flush=True)


if __name__ == "__main__":
    main()
