"""Training data in a few files: photographs, and views of rendered rooms with depth, normals and poses.

A shard is an .npz file of plain arrays. Encoded images are concatenated in an array of bytes, with an array of the
offsets of their beginnings. Reading a shard needs only NumPy and OpenCV.

Coordinates: the pixel in column c and row r has its centre at (c, r), so that the top left corner of an image is at
(-0.5, -0.5). A camera looks along +z, x points right, y points down. A world point is ``T_world_camera`` times a
camera point. Depth is the camera's z in metres, not the length of the ray.

A view's image is larger than its maps of depth and normals. A sample of a map is the value at the ray through one
pixel's centre, not a mean. The sample in column c and row r of a map is at the image's pixel (step * c, step * r),
with step = image width / map width (2 in training shards, 1 in the evaluation set).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

Array = np.ndarray

WEBP_QUALITY = 85
NORMALS_QUALITY = 90
DEPTH_STEP = 1e-4  # of inverse depth, in 1/m: 0.05 px with a baseline of 1 m and a focal length of 500 px
LARGEST_CODE = 65535


@dataclass
class Rooms:
    """Views of rooms.

    Attributes:
        images: N grey images (H, W) uint8. In training shards: albedo, that is the surface's colour without any light,
            sRGB-coded (:func:`linear` decodes it). In the evaluation set: lit pictures like a camera's.
        light: N images (H, W) uint8, sRGB-coded, of the light that falls onto what an image shows, including cast
            shadows, in a unit that is the same for all views of a cluster. ``linear(image) * linear(light)`` is a
            picture under the room's lamps, without ambient light. All 255 if it is unknown.
        normals: (N, h, w, 3) uint8, unit vectors in the world frame towards the camera's side, encoded for
            :func:`decode_normals`. They are undefined where the depth is 0.
        depth: (N, h, w) float32, metres along the optical axis; 0 where there is nothing.
        K: (N, 3, 3) float64, in pixels of the image.
        T_world_camera: (N, 4, 4) float64.
        scene: (N,) int64, index into ``scene_names``.
        scene_names: names of the rooms.
        cluster: (N,) int64; views of one cluster look at the same place.
        names: names of the views.
        pairs: (P, 2) int64, indices of views that see some of the same surface.
        overlaps: (P, 2) float32. For a pair (i, j): the share of i's pixels whose surface j sees, and the share of j's
            pixels whose surface i sees.
    """

    images: list[Array]
    light: list[Array]
    normals: Array
    depth: Array
    K: Array
    T_world_camera: Array
    scene: Array
    scene_names: list[str] = field(default_factory=list)
    cluster: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    names: list[str] = field(default_factory=list)
    pairs: Array = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    overlaps: Array = field(default_factory=lambda: np.zeros((0, 2), np.float32))


# --- photographs ------------------------------------------------------------------------------------------------------


def write_photos(path: Path, encoded: Sequence[bytes], names: Sequence[str]) -> None:
    """Write photographs that are already encoded.

    Args:
        encoded: contents of WebP or JPEG files of grey images.
        names: one name for each.
    """
    sizes = [_decode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE).shape[::-1] for content in encoded]
    content, offsets = _joined(encoded)
    _save(
        path,
        content=content,
        offsets=offsets,
        names=np.array(names, dtype=np.str_),
        sizes=np.array(sizes, np.int32).reshape(-1, 2),
    )


def read_photos(path: Path | str) -> list[Array]:
    """Read the grey images (H, W) uint8 of a shard of photographs."""
    with np.load(path, allow_pickle=False) as arrays:
        return [_decode(part, cv2.IMREAD_GRAYSCALE) for part in _parts(arrays["content"], arrays["offsets"])]


def photo_names(path: Path | str) -> list[str]:
    """Read the names of a shard's photographs, in the order of :func:`read_photos`."""
    with np.load(path, allow_pickle=False) as arrays:
        return [str(name) for name in arrays["names"]]


def encode_grey(image: Array, webp_quality: int = WEBP_QUALITY, jpeg_quality: int = 88) -> bytes:
    """Encode an image (H, W) uint8 as WebP, or as JPEG if that is smaller and not less exact."""
    webp = _encode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, webp_quality])
    jpeg = _encode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality])
    if len(jpeg) < len(webp):
        errors = [
            np.mean((_decode(np.frombuffer(coded, np.uint8), cv2.IMREAD_GRAYSCALE).astype(np.float32) - image) ** 2)
            for coded in (jpeg, webp)
        ]
        if errors[0] <= errors[1]:
            return jpeg
    return webp


# --- rooms ------------------------------------------------------------------------------------------------------------


EncodedView = tuple[bytes, bytes, bytes, bytes, Array]


def encode_view(image: Array, light: Array | None, normals: Array, depth: Array) -> EncodedView:
    """Encode a view for :func:`write_rooms`.

    Args:
        image: (H, W) uint8.
        light: (H, W) uint8; None if it is unknown.
        normals: (h, w, 3) unit vectors as float, or encoded as uint8.
        depth: (h, w) float, metres, 0 where there is nothing.

    Returns:
        The encoded image, light, normals and depth, and (2,) float64 offset and step of the coded inverse depth.
    """
    coded_light = _encode(
        ".webp", np.full_like(image, 255) if light is None else light, [cv2.IMWRITE_WEBP_QUALITY, WEBP_QUALITY]
    )
    coded_normals = _encode(
        ".jpg",
        normals if normals.dtype == np.uint8 else encode_normals(normals),
        [
            cv2.IMWRITE_JPEG_QUALITY,
            NORMALS_QUALITY,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
        ],
    )
    codes, scale = encode_depth(depth)
    coded_depth = _encode(".png", codes, [cv2.IMWRITE_PNG_COMPRESSION, 6])
    return encode_grey(image), coded_light, coded_normals, coded_depth, scale


def write_rooms(
    path: Path,
    views: Sequence[EncodedView],
    K: Array,
    T_world_camera: Array,
    scene: Array,
    scene_names: Sequence[str],
    cluster: Array,
    names: Sequence[str],
    pairs: Array,
    overlaps: Array,
) -> None:
    """Write views from :func:`encode_view`; the other arguments are as in :class:`Rooms`."""
    arrays = {}
    for number, what in enumerate(("images", "light", "normals", "depth")):
        arrays[what], arrays[f"{what}_offsets"] = _joined([view[number] for view in views])
    _save(
        path,
        **arrays,
        depth_scale=np.array([view[4] for view in views], np.float64).reshape(-1, 2),
        K=np.asarray(K, np.float64).reshape(-1, 3, 3),
        T_world_camera=np.asarray(T_world_camera, np.float64).reshape(-1, 4, 4),
        scene=np.asarray(scene, np.int64),
        scene_names=np.array(scene_names, dtype=np.str_),
        cluster=np.asarray(cluster, np.int64),
        names=np.array(names, dtype=np.str_),
        pairs=np.asarray(pairs, np.int64).reshape(-1, 2),
        overlaps=np.asarray(overlaps, np.float32).reshape(-1, 2),
    )


def read_rooms(path: Path | str) -> Rooms:
    """Read the views of a shard of rooms, which may be empty."""
    with np.load(path, allow_pickle=False) as arrays:
        codes = [_decode(part, cv2.IMREAD_UNCHANGED) for part in _parts(arrays["depth"], arrays["depth_offsets"])]
        normals = [_decode(part, cv2.IMREAD_COLOR) for part in _parts(arrays["normals"], arrays["normals_offsets"])]
        images = [_decode(part, cv2.IMREAD_GRAYSCALE) for part in _parts(arrays["images"], arrays["images_offsets"])]
        light = [_decode(part, cv2.IMREAD_GRAYSCALE) for part in _parts(arrays["light"], arrays["light_offsets"])]
        depth = [decode_depth(code, scale) for code, scale in zip(codes, arrays["depth_scale"])]
        return Rooms(
            images=images,
            light=light,
            normals=np.stack(normals) if normals else np.zeros((0, 0, 0, 3), np.uint8),
            depth=np.stack(depth) if depth else np.zeros((0, 0, 0), np.float32),
            K=arrays["K"],
            T_world_camera=arrays["T_world_camera"],
            scene=arrays["scene"],
            scene_names=[str(name) for name in arrays["scene_names"]],
            cluster=arrays["cluster"],
            names=[str(name) for name in arrays["names"]],
            pairs=arrays["pairs"],
            overlaps=arrays["overlaps"],
        )


def linear(image: Array) -> Array:
    """Decode sRGB (any shape, uint8) to float32 proportional to light, 0 to 1."""
    x = np.arange(256, dtype=np.float32) / 255
    table = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4).astype(np.float32)
    return table[image]


def srgb(light: Array) -> Array:
    """Encode light as sRGB, the inverse of :func:`linear`: any shape, clipped to 0 to 1, to uint8."""
    x = np.clip(light, 0, 1)
    x = np.where(x <= 0.0031308, 12.92 * x, 1.055 * np.power(x, 1 / 2.4) - 0.055)
    return np.round(x * 255).astype(np.uint8)


def encode_normals(normals: Array) -> Array:
    """Encode unit vectors (..., 3) as uint8."""
    return np.round(np.clip(normals, -1, 1) * 127 + 128).astype(np.uint8)


def decode_normals(coded: Array) -> Array:
    """Decode uint8 (..., 3) to float32 unit vectors."""
    normals = (coded.astype(np.float32) - 128) / 127
    return normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-6)


def encode_depth(depth: Array) -> tuple[Array, Array]:
    """Encode depth (h, w) in metres as codes (h, w) uint16, 0 for nothing, and (2,) float64 offset and step.

    A code c > 0 stands for the inverse depth ``offset + step * (c - 1)``. Inverse depth is linear in the image of a
    plane, and an error of it moves a reprojected point by the same number of pixels, near or far.
    """
    seen = depth > 0
    if not seen.any():
        return np.zeros(depth.shape, np.uint16), np.array([0.0, DEPTH_STEP])
    inverse = np.where(seen, 1 / np.where(seen, depth.astype(np.float64), 1), 0)
    lowest, highest = inverse[seen].min(), inverse[seen].max()
    step = max(DEPTH_STEP, (highest - lowest) / (LARGEST_CODE - 1))
    codes = np.where(seen, 1 + np.round((inverse - lowest) / step), 0)
    return codes.astype(np.uint16), np.array([lowest, step])


def decode_depth(codes: Array, scale: Array) -> Array:
    """Decode depth, the inverse of :func:`encode_depth`: (h, w) float32 metres, 0 for nothing."""
    seen = codes > 0
    inverse = scale[0] + scale[1] * (codes.astype(np.float64) - 1)
    return np.where(seen, 1 / np.where(seen, inverse, 1), 0).astype(np.float32)


# --- bytes ------------------------------------------------------------------------------------------------------------


def _encode(suffix: str, image: Array, options: list[int]) -> bytes:
    return cv2.imencode(suffix, image, options)[1].tobytes()


def _decode(content: Array, flags: int) -> Array:
    image = cv2.imdecode(content, flags)
    if image is None:
        raise ValueError("an image of the shard cannot be decoded: the file is damaged")
    return image


def _joined(parts: Sequence[bytes]) -> tuple[Array, Array]:
    """Concatenate the parts to one array of bytes; also return the offsets (N + 1,) of their beginnings and the end."""
    offsets = np.cumsum([0, *(len(part) for part in parts)]).astype(np.int64)
    return np.frombuffer(b"".join(parts), np.uint8), offsets


def _parts(content: Array, offsets: Array) -> list[Array]:
    return [content[start:end] for start, end in zip(offsets[:-1], offsets[1:])]


def _save(path: Path, **arrays: Array) -> None:
    """Write arrays to a file atomically: the file is complete or does not exist."""
    partial = path.with_suffix(".part.npz")
    np.savez(partial, **arrays)  # type: ignore[arg-type]
    os.replace(partial, path)
