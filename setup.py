"""`pip install .`: the Python API and the kpmatch command, on machines without ROS too (see setup.cfg)."""

from setuptools import setup

setup()
