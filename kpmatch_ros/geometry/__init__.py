"""Cameras, poses, and the motion between views from matched keypoints."""
