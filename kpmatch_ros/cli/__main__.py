"""`python -m kpmatch_ros.cli` is the kpmatch command too."""

import sys

from kpmatch_ros.cli import main

sys.exit(main())
