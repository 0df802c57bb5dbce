"""Tracking of points from frame to frame."""
