"""The kpmatch command."""

from kpmatch_ros.cli.main import main

__all__ = ["main"]
