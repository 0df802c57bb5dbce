"""A synthetic camera in a synthetic courtyard: images whose geometry is known exactly.

The scene is made of flat and round surfaces with painted textures, all drawn here from a seed; the camera has any pose
and lens. Every pixel is traced through the lens to the nearest surface, so depth and motion are exact, and two views
differ as those of a real camera do: parallax, occlusion, perspective, a sky at infinity.

The world frame is REP-103's: x forward, y left, z up, metres; the ground is z = 0. The camera frame is the optical one:
x right, y down, z forward. Pixel (0, 0) is the centre of the top-left pixel.

    scene = Scene(seed=0)
    views = list(scene.film(camera_path(40), demo_camera()))
    rotation, translation = relative_motion(views[0], views[1])

poses: cameras and how they move. painting: what painters paint with; paints: the painters. surfaces: what is painted;
courtyard: where it stands. tracer: which surface a ray meets. light: sun and sky. scene: all of it, made into images.
"""

from simulation.poses import View, camera_path, demo_camera, look, stereo_right
from simulation.scene import Scene

__all__ = ["Scene", "View", "camera_path", "demo_camera", "look", "stereo_right"]
