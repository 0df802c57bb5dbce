"""Formats tables as text."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

__all__ = ["format_table"]


def format_table(rows: Iterable[Sequence[str]], right: Container[int] = ()) -> str:
    """Return rows of text as a table with aligned columns. The columns with an index in ``right`` are right-aligned."""
    rows = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if column in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
