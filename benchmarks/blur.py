"""Is the covariance of one camera's pose consistent if the blur changes from frame to frame?

    tools/with_ros python benchmarks/blur.py                 # 320x240 pixels, three courtyards
    tools/with_ros python benchmarks/blur.py --full          # 640x480

The front end processes a walk through the synthetic courtyard with the default parameters and 400 keypoints (1,024 with
--full). Frames have motion blur along a line, like those of a camera that rotates during the exposure. The lengths in
pixels are used in turn, along the rows, along the columns, or in a random direction for each frame. The blur is
symmetric, so that it does not move points. It is created by this script, not by geometry/blur.py, which has to detect
it.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator

import cv2
import numpy as np
from scipy.stats import chi2

from benchmarks.overconfidence import Outcome, judge
from kpmatch_ros.feature_matcher import FeatureMatcher
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import PoseStatus, relative_motion
from kpmatch_ros.parameters import Parameters
from simulation import Scene, View, camera_path, demo_camera

BLURS = {
    "sharp": ((1,), 0.0),
    "9, along rows": ((9,), 0.0),
    "1 3 5, along rows": ((1, 3, 5), 0.0),
    "1 3 5, along columns": ((1, 3, 5), math.pi / 2),
    "1 5, any direction": ((1, 5), None),
    "1 9, along rows": ((1, 9), 0.0),
    "1 9 17, along rows": ((1, 9, 17), 0.0),
    "1 33, along rows": ((1, 33), 0.0),
    "1 61, along rows": ((1, 61), 0.0),
    "1 41, any direction": ((1, 41), None),
    "1 1 41 45, any direction": ((1, 1, 41, 45), None),
}
_NOISE = 2.0  # grey levels


def line(length: int, angle: float) -> np.ndarray:
    """The blur kernel of a point that moves by a length (pixels) in a direction (radians): a square array of sum 1."""
    side = 2 * (length // 2) + 3
    blur, middle = np.zeros((side, side)), side // 2
    for along in np.linspace(-(length - 1) / 2, (length - 1) / 2, 20 * length):
        x, y = middle + along * math.cos(angle), middle + along * math.sin(angle)
        column, row = math.floor(x), math.floor(y)
        for i in (0, 1):
            for j in (0, 1):
                blur[row + j, column + i] += (1 - abs(x - column - i)) * (1 - abs(y - row - j))
    return np.asarray(blur / blur.sum())


def halved(camera: Camera) -> Camera:
    """Return the camera of an image of half the size."""
    matrix = camera.matrix.copy()
    matrix[:2] *= 0.5
    matrix[:2, 2] -= 0.25  # the centre of the first pixel is (0, 0)
    return Camera(camera.width // 2, camera.height // 2, matrix)


def judged(
    front_end: FrontEnd, views: list[View], camera: Camera, lengths: tuple[int, ...], angle: float | None, seed: int
) -> Iterator[Outcome]:
    """Yield the outcomes of the pairs of frames."""
    random = np.random.default_rng(seed)
    front_end.reset()
    for number, view in enumerate(views):
        image = cv2.cvtColor(view.image, cv2.COLOR_RGB2GRAY).astype(np.float32)
        if image.shape[1] != camera.width:
            image = cv2.resize(image, (camera.width, camera.height), interpolation=cv2.INTER_AREA)
        direction = random.uniform(0, math.pi) if angle is None else angle
        image = cv2.filter2D(image, -1, line(lengths[number % len(lengths)], direction))
        image += random.normal(0, _NOISE, image.shape)
        grey = np.clip(np.round(image), 0, 255).astype(np.uint8)
        pair = front_end.register([grey], [(number + 1) * 10**8], camera).pair
        if pair is not None:
            yield judge(pair.pose, relative_motion(views[pair.reference.stamp // 10**8 - 1], view))


def main() -> None:
    """Print the NEES for each kind of blur."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[21, 22, 23], help="courtyards")
    parser.add_argument("--frames", type=int, default=17, help="number of frames in each courtyard")
    parser.add_argument(
        "--only", nargs="+", choices=BLURS, default=list(BLURS), metavar="BLUR", help="only these kinds of blur"
    )
    parser.add_argument("--full", action="store_true", help="640x480 pixels instead of 320x240")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    eye = demo_camera(distorted=False)
    camera = eye if options.full else halved(eye)
    parameters = Parameters(device=options.device, precision="float32", rectified=True)
    if not options.full:
        parameters = parameters.replace({"max_keypoints": 400})
    front_end = FrontEnd(parameters, FeatureMatcher(parameters))
    walks = []
    for seed in options.seeds:
        path = camera_path(7 * seed + options.frames)[7 * seed :]
        walks.append(list(Scene(seed).film(path, eye)))
    for name in options.only:
        lengths, angle = BLURS[name]
        found = [
            outcome
            for seed, views in zip(options.seeds, walks)
            for outcome in judged(front_end, views, camera, lengths, angle, seed)
        ]
        nees = np.array([outcome.nees for outcome in found if outcome.status is PoseStatus.OK])
        others = Counter(outcome.status.name for outcome in found if outcome.status is not PoseStatus.OK)
        print(
            f"{name:22} {len(nees):3d} pairs  NEES mean {nees.mean():6.1f} of 5, median {np.median(nees):5.1f}, "
            f"{np.mean(nees < chi2.ppf(0.95, 5)):4.0%} below the 95 % point  {dict(others) or ''}",
            flush=True,
        )


if __name__ == "__main__":
    main()
