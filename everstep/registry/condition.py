"""Condition of a promotion, such as `accuracy >= prod.accuracy - 0.001`, in a grammar of its own.

either  = both ("or" both)*              both = compare ("and" compare)*
compare = "(" either ")" | sum (">=" | ">" | "<=" | "<" | "==") sum
sum     = product (("+" | "-") product)*   product = atom ("*" atom)*
atom    = NUMBER | NAME | ALIAS.NAME | "-" atom | "(" sum ")"
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from everstep.errors import ConfigError, nearest

TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*(?:[./][A-Za-z_]\w*)*)|(?P<sign>[<>=]=|[-+*()<>]))",
    re.ASCII,
)
COMPARISONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt, "==": operator.eq}
LONGEST, DEEPEST = 500, 20
Figures = Mapping[str, Mapping[str, float] | None]
"""Metrics by alias, of the candidate under ""; None for an alias that has no version yet."""
Number = Callable[[Figures], float | None]
Truth = Callable[[Figures], bool]


@dataclass(frozen=True)
class Condition:
    """A condition that has been parsed.

    Raises:
        ConfigError: a metric that it names was not measured.
    """

    text: str
    aliases: tuple[str, ...]
    """Aliases whose versions have to be measured too, each once."""
    names: tuple[tuple[str, str], ...]
    """Alias (empty for the candidate) and metric of each name, in their order."""
    holds: Truth
    """True if it holds; a comparison with an alias that has no version yet does."""

    def figures(self, found: Figures) -> str:
        """Return the measured value of each name, as a line."""
        each = {f"{alias}.{name}" if alias else name: _look_up(alias, name, found) for alias, name in self.names}
        return ", ".join(f"{name} = {'none yet' if value is None else f'{value:.6g}'}" for name, value in each.items())


def parse(text: str) -> Condition:
    """Return the condition of a text; ConfigError, which shows the place, if it is none."""
    if len(text) > LONGEST:
        raise ConfigError(f"--if: {len(text)} characters (at most {LONGEST}); write a shorter condition")
    reader = _Reader(text)
    holds = reader.either()
    if reader.token:
        raise reader.error("and, or, or the end")
    names = tuple(dict.fromkeys(reader.names))
    return Condition(text, tuple(dict.fromkeys(alias for alias, _ in names if alias)), names, holds)


class _Reader:
    """Recursive descent; `token` is the next word, empty at the end."""

    def __init__(self, text: str) -> None:
        self.text, self.end, self.depth = text, 0, 0
        self.names: list[tuple[str, str]] = []
        self.kind, self.token = "", ""
        self.next()

    def next(self) -> str:
        """Return the current word, and go to the next one."""
        token, self.start = self.token, self.end
        found = TOKEN.match(self.text, self.end)
        if found is None and self.text[self.end :].strip():
            raise self.error("a number, a metric, a comparison, + - * ( )")
        self.kind, self.token = (str(found.lastgroup), found[str(found.lastgroup)]) if found else ("", "")
        self.end = found.end() if found else len(self.text)
        return token

    def error(self, wanted: str) -> ConfigError:
        at = self.text[self.start :].strip() or "its end"
        return ConfigError(f"--if {self.text!r}: {wanted} is expected at {at[:40]!r}; as in a >= prod.a")

    def either(self) -> Truth:
        first = self.both()
        while self.token == "or":
            self.next()
            first = _any(first, self.both())
        return first

    def both(self) -> Truth:
        first = self.compare()
        while self.token == "and":
            self.next()
            first = _all(first, self.compare())
        return first

    def compare(self) -> Truth:
        if self.token == "(":
            # A parenthesis may hold a condition or a sum: only what follows it tells them apart.
            kept = self.end, self.start, self.kind, self.token, self.depth
            known = len(self.names)
            try:
                self.enter()
                inner = self.either()
                self.leave()
                return inner
            except ConfigError:
                self.end, self.start, self.kind, self.token, self.depth = kept
                del self.names[known:]
        left = self.sum()
        if self.token not in COMPARISONS:
            raise self.error("one of >= > <= < ==")
        compared = COMPARISONS[self.next()]
        right = self.sum()

        def holds(found: Figures) -> bool:
            one, other = left(found), right(found)
            return one is None or other is None or bool(compared(one, other))

        return holds

    def sum(self) -> Number:
        first = self.product()
        while self.token in ("+", "-"):
            combined = operator.add if self.next() == "+" else operator.sub
            first = _combined(combined, first, self.product())
        return first

    def product(self) -> Number:
        first = self.atom()
        while self.token == "*":
            self.next()
            first = _combined(operator.mul, first, self.atom())
        return first

    def atom(self) -> Number:
        if self.token == "(":
            self.enter()
            inner = self.sum()
            self.leave()
            return inner
        if self.token == "-":
            self.enter()
            value = self.atom()
            self.depth -= 1
            return _combined(operator.mul, lambda _: -1.0, value)
        if self.kind == "number":
            number = float(self.next())
            return lambda _: number
        if self.kind != "name" or self.token in ("and", "or"):
            raise self.error("a number or a metric")
        alias, _, name = self.next().rpartition(".")
        self.names.append((alias, name))
        return lambda found: _look_up(alias, name, found)

    def enter(self) -> None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise self.error(f"at most {DEEPEST} levels")
        self.next()

    def leave(self) -> None:
        if self.token != ")":
            raise self.error("')'")
        self.depth -= 1
        self.next()


def _look_up(alias: str, name: str, found: Figures) -> float | None:
    figures = found[alias]
    if figures is None:
        return None
    if name not in figures:
        whose = f" of {alias}" if alias else ""
        raise ConfigError(f"--if: {name}{whose} is no metric ({', '.join(figures)}){nearest(name, figures)}")
    return figures[name]


def _combined(call: Callable[[float, float], float], left: Number, right: Number) -> Number:
    def value(found: Figures) -> float | None:
        one, other = left(found), right(found)
        return None if one is None or other is None else call(one, other)

    return value


def _any(left: Truth, right: Truth) -> Truth:
    return lambda found: left(found) | right(found)


def _all(left: Truth, right: Truth) -> Truth:
    return lambda found: left(found) & right(found)
