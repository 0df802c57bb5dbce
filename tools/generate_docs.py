"""Write config/matcher.yaml and the README's parameter table from kpmatch_ros/parameters.py."""

import re
from pathlib import Path

from kpmatch_ros import parameters

root = Path(__file__).resolve().parent.parent
(root / "config" / "matcher.yaml").write_text(parameters.config_file())
readme = root / "README.md"
if readme.exists():
    text = re.sub(
        r"(<!-- parameters: written by make docs -->\n).*?(<!-- end of parameters -->)",
        lambda found: found[1] + parameters.markdown_table() + found[2],
        readme.read_text(),
        flags=re.DOTALL,
    )
    readme.write_text(text)
