"""A table in Markdown."""

from __future__ import annotations


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others figures."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *lines))
