"""Match two image files with the Python API: python examples/match_images.py A B"""

from __future__ import annotations

import sys

import cv2

from kpmatch_ros import FeatureMatcher


def main(path0: str, path1: str) -> None:
    """Print the five best matches."""
    image0, image1 = (cv2.imread(path, cv2.IMREAD_GRAYSCALE) for path in (path0, path1))
    if image0 is None or image1 is None:
        sys.exit(f"{path0 if image0 is None else path1} is not an image that OpenCV can read")
    matcher = FeatureMatcher(max_keypoints=1024)
    features0, features1 = matcher.extract(image0).numpy(), matcher.extract(image1).numpy()
    matches = matcher.match(features0, features1).numpy()
    print(f"{len(matches)} matches of {len(features0)} and {len(features1)} keypoints")
    for number in matches.scores.argsort()[::-1][:5]:
        index0, index1 = matches.indices[number]
        (x0, y0), (x1, y1) = features0.keypoints[index0], features1.keypoints[index1]
        print(f"({x0:.1f}, {y0:.1f}) -> ({x1:.1f}, {y1:.1f}), score {matches.scores[number]:.2f}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
