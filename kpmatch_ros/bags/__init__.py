"""Bags: reading and writing them, and running the matcher over one, without ROS."""
