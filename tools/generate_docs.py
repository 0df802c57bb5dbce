"""Write config/matcher.yaml and the table in docs/parameters.md from kpmatch_ros/parameters.py."""

import re
from pathlib import Path

from kpmatch_ros import parameters

root = Path(__file__).resolve().parent.parent
(root / "config" / "matcher.yaml").write_text(parameters.config_file())
page = root / "docs" / "parameters.md"
text = re.sub(
    r"(<!-- parameters: written by make docs -->\n).*?(<!-- end of parameters -->)",
    lambda found: found[1] + parameters.markdown_table() + found[2],
    page.read_text(),
    flags=re.DOTALL,
)
page.write_text(text)
