"""Tests that training data is read from a shard as it was written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import training_scripts  # noqa: F401

# isort: split
import pack
import shards

Texture = Callable[[int, int, int], np.ndarray]


def test_photographs_are_read_back_almost_unchanged(texture: Texture, tmp_path: Path) -> None:
    photos = [texture(90, 120, seed) for seed in range(3)] + [texture(64, 200, 3)]
    shards.write_photos(tmp_path / "photos_0.npz", [shards.encode_grey(photo) for photo in photos], list("abcd"))
    read = shards.read_photos(tmp_path / "photos_0.npz")
    for before, after in zip(photos, read):
        assert after.shape == before.shape and after.dtype == np.uint8
        assert np.abs(after.astype(float) - before).mean() < 8


def test_room_views_are_read_back_with_exact_poses_and_almost_exact_depth(texture: Texture, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tilt = np.linspace(-0.5, 0.5, 40)[None, :].repeat(30, 0)
    normals = np.stack([np.sin(tilt), np.zeros_like(tilt), -np.cos(tilt)], -1)
    depth = [1 / (0.2 + i + 0.01 * rng.random((30, 40))) for i in range(3)]
    depth[0][:5] = 0
    views = [
        shards.encode_view(texture(60, 80, i), texture(60, 80, 9) if i else None, normals, depth[i]) for i in range(3)
    ]
    K = rng.random((3, 3, 3))
    poses = rng.random((3, 4, 4))
    shards.write_rooms(
        tmp_path / "rooms_0.npz",
        views,
        K,
        poses,
        np.array([0, 0, 1]),
        ["hall", "attic"],
        np.array([0, 0, 1]),
        list("abc"),
        np.array([[0, 1]]),
        np.array([[0.4, 0.6]]),
    )
    rooms = shards.read_rooms(tmp_path / "rooms_0.npz")
    np.testing.assert_array_equal(rooms.K, K)
    np.testing.assert_array_equal(rooms.T_world_camera, poses)
    assert rooms.scene_names == ["hall", "attic"] and rooms.names == list("abc")
    assert rooms.pairs.tolist() == [[0, 1]] and rooms.overlaps.shape == (1, 2)
    assert rooms.depth.dtype == np.float32 and (rooms.depth[0, :5] == 0).all()
    for before, after in zip(depth, rooms.depth):
        seen = before > 0
        np.testing.assert_allclose(1 / after[seen], 1 / before[seen], atol=0.6 * shards.DEPTH_STEP)
    assert rooms.light[0].min() == 255 and np.abs(rooms.light[1].astype(float) - texture(60, 80, 9)).mean() < 8
    cosines = (shards.decode_normals(rooms.normals) * normals).sum(-1)
    assert rooms.normals.shape == (3, 30, 40, 3) and cosines.min() > 0.99


def test_a_shard_without_views_can_be_written_and_read(tmp_path: Path) -> None:
    (tmp_path / "views").mkdir()
    pack.pack_evaluation(tmp_path / "views", tmp_path / "rooms_heldout.npz")
    rooms = shards.read_rooms(tmp_path / "rooms_heldout.npz")
    assert (rooms.images, len(rooms.depth), len(rooms.normals), len(rooms.pairs)) == ([], 0, 0, 0)


def test_srgb_is_the_inverse_of_linear_for_all_8_bit_values() -> None:
    values = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(shards.srgb(shards.linear(values)), values)


def test_views_rendered_later_go_into_new_shards(
    texture: Texture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "SHARD_BYTES", 30_000)
    views = tmp_path / "views"
    views.mkdir()

    def render(number: int) -> None:
        names = [f"hall_{number:04d}_{i}" for i in range(2)]
        for name in names:
            np.savez(
                views / f"{name}.npz",
                grey=texture(60, 80, number),
                light=texture(60, 80, number + 1),
                normals=np.full((60, 80, 3), 200, np.uint8),
                depth=np.full((60, 80), 2.0, np.float32),
                K=np.eye(3),
                T_world_camera=np.eye(4),
            )
        note = {
            "scene": "hall",
            "cluster": number,
            "held_out": number == 3,
            "views": names,
            "pairs": [[0, 1]],
            "overlaps": [[0.1 if number == 1 else 0.5, 0.6]],
        }
        (views / f"hall_{number:04d}.json").write_text(json.dumps(note))

    for number in range(8):
        render(number)
    pack.pack_training(views, tmp_path)
    first = (tmp_path / "rooms_0.npz").read_bytes()
    for number in range(8, 16):
        render(number)
    pack.pack_training(views, tmp_path)
    assert (tmp_path / "rooms_0.npz").read_bytes() == first
    rooms = [shards.read_rooms(path) for path in sorted(tmp_path.glob("rooms_*.npz"))]
    assert len(rooms) > 1 and len(first) < 60_000
    names = [name for room in rooms for name in room.names]
    assert len(names) == len(set(names)) == 30 and not any("_0003_" in name for name in names)
    assert sum(len(room.pairs) for room in rooms) == 14  # one view has too little in common with the others
    for room in rooms:
        assert (room.cluster[room.pairs[:, 0]] == room.cluster[room.pairs[:, 1]]).all()
    pack.pack_evaluation(views, tmp_path / "rooms_heldout.npz")
    held_out = shards.read_rooms(tmp_path / "rooms_heldout.npz")
    assert held_out.depth.shape == (2, 60, 80)
    assert np.abs(held_out.images[0].astype(float) - held_out.images[1]).max() > 5  # the light differs


def test_the_order_of_clusters_does_not_depend_on_file_times(tmp_path: Path) -> None:
    places = [("bathroom", 0), ("hall", 0), ("bathroom", 1), ("hall", 1), ("hall", 2)]
    for age, (scene, cluster) in enumerate(places):
        path = tmp_path / f"{scene}_{cluster:04d}.json"
        path.write_text(json.dumps({"scene": scene, "cluster": cluster, "held_out": True, "views": ["view"]}))
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    assert [(note["scene"], note["cluster"]) for note in pack.clusters(tmp_path, held_out=True)] == places


SCENE = """<scene version="3.0.0">
    <sensor type="perspective"><transform name="toWorld"><translate x="0" y="1" z="0"/></transform></sensor>
    <bsdf type="twosided" id="wall"><bsdf type="diffuse"><rgb name="reflectance" value="0.2, 0.2, 0.2"/></bsdf></bsdf>
    <shape type="cube">
        <transform name="toWorld"><matrix value="4 0 0 0 0 1.5 0 1.5 0 0 6 0 0 0 0 1"/></transform><ref id="wall"/>
    </shape>
    <shape type="obj"><string name="filename" value="is_not_there.obj"/><ref id="wall"/></shape>
</scene>"""


def test_a_rendered_box_has_the_expected_depth_normals_and_colours(texture: Texture, tmp_path: Path) -> None:
    try:
        import render
    except ImportError as error:
        pytest.skip(f"Mitsuba is not there: {error}")
    (tmp_path / "scene.xml").write_text(SCENE)
    scene = render.Scene(tmp_path, scale=0.5)  # 4 m wide, 1.5 m high, 6 m long
    assert scene.missing == ["is_not_there.obj"]
    pose = render.look(np.array([0.5, 0.6, 1.0]), np.array([0.0, 0.0, 1.0]), 0.0, 500.0)
    view = render.render(scene, pose, np.random.default_rng(0))
    assert view["depth"][240, 320] == pytest.approx(2.0, abs=1e-3)  # from z = 1 to the wall at 3
    assert view["depth"][479, 320] == pytest.approx(0.6 / ((479 - 239.5) / 500), rel=1e-3)  # the floor is below
    np.testing.assert_allclose(shards.decode_normals(view["normals"])[240, 320], [0, 0, -1], atol=0.01)
    assert np.unique(view["grey"]).tolist() == [int(shards.srgb(np.array(0.2)))]
    # Two cameras see the same colours at the same place, with or without wallpaper.
    scene.paper(np.random.default_rng(1), [texture(64, 64, 0)])
    scene.illuminate(np.random.default_rng(2))
    other = render.look(np.array([0.2, 0.7, 0.8]), np.array([0.1, 0.05, 1.0]), 0.2, 450.0)
    views = [render.render(scene, camera, np.random.default_rng(0)) for camera in (pose, other)]
    ray = render.pixel_rays(pose, np.array([[330.0, 200.0]]))[0]
    spot = pose.T_world_camera[:3, 3] + ray * views[0]["depth"][200, 330]
    there = np.linalg.inv(other.T_world_camera) @ [*spot, 1]
    column, row, _ = other.K @ there[:3] / there[2]
    assert views[1]["depth"][round(row), round(column)] == pytest.approx(there[2], rel=0.01)
    assert abs(int(views[1]["grey"][round(row), round(column)]) - int(views[0]["grey"][200, 330])) < 12
