"""Draws trajectories, and compares them with the ground truth if it is known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy.spatial.transform import Rotation

__all__ = ["draw", "fit"]


def fit(positions: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Positions (N, 3) after the rotation and translation that align them best with the true positions (N, 3)."""
    centre, true_centre = positions.mean(axis=0), truth.mean(axis=0)
    rotation, _ = Rotation.align_vectors(truth - true_centre, positions - centre)
    return np.asarray(rotation.apply(positions - centre) + true_centre)


def draw(path: Path, trajectories: Mapping[str, np.ndarray], truth: np.ndarray | None = None) -> None:
    """Save a plot of trajectories seen from above, and if the ground truth is given, of the distances from it.

    Args:
        path: of the picture.
        trajectories: by name, (N, 3) each, metres.
        truth: (N, 3), metres; None if not known. The trajectories must have the same rows, and are aligned with it.
    """
    if truth is not None:
        trajectories = {name: fit(positions, truth) for name, positions in trajectories.items()}
    figure, axes = plt.subplots(1, 1 if truth is None else 2, figsize=(6 if truth is None else 12, 5), squeeze=False)
    above = axes[0, 0]
    if truth is not None:
        above.plot(truth[:, 0], truth[:, 1], color="black", linewidth=3, alpha=0.3, label="truth")
    for name, positions in trajectories.items():
        above.plot(positions[:, 0], positions[:, 1], linewidth=1, label=name)
        if truth is not None:
            axes[0, 1].plot(100 * np.linalg.norm(positions - truth, axis=1), linewidth=1, label=name)
    above.set(xlabel="x (m)", ylabel="y (m)", title="Seen from above")
    above.set_aspect("equal")
    above.legend()
    if truth is not None:
        axes[0, 1].set(xlabel="frame", ylabel="cm", title="Distance from the truth", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
