"""Texts that can be written as UTF-8."""

from __future__ import annotations

__all__ = ["encodable"]


def encodable(text: str) -> str:
    """The text with everything escaped that UTF-8 cannot hold. File names in it need not be UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
