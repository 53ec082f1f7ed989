"""Elements of a file that is one JSON array of objects, read some megabytes at a time."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from everstep.dataset.readers.base import LONGEST_BYTES, File
from everstep.dataset.readers.json_values import DECODER, as_row, loaded
from everstep.dataset.readers.streams import CutShortError, open_text, text_head

HEAD = 1 << 16
BLOCK = 1 << 20
BLANKS = " \t\r\n"
NEAR = 32
"""Distance in characters from the end of the read text in which a truncated value may cause an error.

An example of such a value is `fal`.
"""


def is_array(file: File) -> bool:
    """True if the file is one array; False for lines of which the first is an array by mistake."""
    try:
        head = text_head(file, HEAD).lstrip()
    except CutShortError:
        return False
    line, _, rest = head.partition("\n")
    return head.startswith("[") and not (rest.strip() and loaded(line.encode()) == "is no JSON object")


def elements(file: File) -> Iterator[tuple[int, Any, int]]:
    """Yield (number from 0, object or the reason why it is none, its bytes) of each element.

    Raises:
        CutShortError: the array is truncated or damaged.
    """
    with open_text(file) as stream:
        text = _Text(stream)
        text.skip("[")
        number = 0
        while text.next() != "]":
            if number and not text.skip(","):
                raise CutShortError(f"{file.url} is no JSON array after element {number}")
            try:
                value, size = text.value()
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
                raise CutShortError(f"{file.url} is no JSON array after element {number}: {reason}") from error
            yield number, as_row(value), size
            number += 1
        text.skip("]")
        if text.next():
            raise CutShortError(f"{file.url} goes on after its JSON array of {number} elements")


class _Text:
    """Text that was read and not yet parsed."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._text, self._at, self._ended = stream, "", 0, False
        # Bytes that are not UTF-8 become halves of surrogate pairs, which no text may have: only this element is bad.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def next(self) -> str:
        """Return the next character that is not blank; an empty string at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in BLANKS:
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._more()

    def skip(self, character: str) -> bool:
        """Skip the next character if it is this one; return True if it is."""
        found = self.next() == character
        self._at += found
        return found

    def value(self) -> tuple[Any, int]:
        """Return the next value and its length in characters."""
        self.next()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
                if end < len(self._text) or self._ended:
                    size, self._at = end - self._at, end
                    return value, size
            except json.JSONDecodeError as error:
                may_be_cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - NEAR
                if self._ended or not may_be_cut:
                    raise
            self._more()

    def _more(self) -> None:
        """Double the text that is not parsed yet, so that a long value is parsed only a few times."""
        if len(self._text) - self._at > LONGEST_BYTES:
            raise CutShortError(f"has a value of more than {LONGEST_BYTES} characters, the limit")
        data = self._stream.read(max(BLOCK, len(self._text) - self._at))
        self._ended = not data
        self._text = self._text[self._at :] + self._decoder.decode(data, final=self._ended)
        self._at = 0
