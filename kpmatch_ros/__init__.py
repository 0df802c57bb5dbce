"""Learned feature matching for ROS 2."""
