"""Renders images of a synthetic courtyard with exactly known geometry.

The scene consists of flat and round surfaces with painted textures, which are all generated from a seed. The camera can
have any pose and lens. Each pixel is traced through the lens to the nearest surface, so depth and motion are exact. Two
views differ as those of a real camera do: by parallax, occlusion and perspective, with a sky at infinity.

The world frame follows REP-103: x forward, y left, z up, in metres; the ground is z = 0. The camera frame is the
optical frame: x right, y down, z forward. Pixel (0, 0) is the centre of the top-left pixel.

    scene = Scene(seed=0)
    views = list(scene.film(camera_path(40), demo_camera()))
    rotation, translation = relative_motion(views[0], views[1])

Modules:
    poses: cameras and their paths.
    painting: tools of the painters, functions that paint textures.
    paints: the painters.
    surfaces: the geometry and textures of surfaces.
    courtyard: the surfaces of the scene and their places.
    tracer: finds the surface that a ray meets.
    light: sun and sky.
    scene: builds the scene and renders images.
    bags: writes bags of rendered or other images.
"""

from simulation.poses import View, camera_path, demo_camera, look, stereo_right
from simulation.scene import Scene

__all__ = ["Scene", "View", "camera_path", "demo_camera", "look", "stereo_right"]
