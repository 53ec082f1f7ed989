"""Docstrings are plain technical English (docs/glossary.md): they begin with a verb or a noun and name who acts."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import everstep

ROOT = Path(everstep.__file__).parent.parent
FILES = [file for folder in ("everstep", "trainer", "launch") for file in sorted((ROOT / folder).rglob("*.py"))]
OPENINGS = re.compile(r"(What|Who|Whose|Whoever|Whether|How|Which|Where|Why|When|All that|Everything that)\b")
WORDS = re.compile(
    r"\b(whoever|nobody|somebody|is told|are told|hears?|says? a word|without a word|slip)\b", re.IGNORECASE
)
LONGEST = 100


def docstrings(file: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(file.read_text())):
        body = getattr(node, "body", None)
        for part in body if isinstance(body, list) else []:
            if (
                isinstance(part, ast.Expr)
                and isinstance(part.value, ast.Constant)
                and isinstance(part.value.value, str)
            ):
                yield part.lineno, part.value.value.strip()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings_are_plain_english(file: Path) -> None:
    for line, text in docstrings(file):
        first = text.split("\n")[0]
        assert not OPENINGS.match(text), f"line {line} opens with a question word: {first}"
        assert (found := WORDS.search(text)) is None, f"line {line} has {found and found[0]!r}: {first}"
        assert len(first) <= LONGEST, f"line {line} is {len(first)} characters long: {first}"
