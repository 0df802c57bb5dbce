"""Lets `python -m kpmatch_ros.cli` run the kpmatch command."""

import sys

from kpmatch_ros.cli import main

sys.exit(main())
