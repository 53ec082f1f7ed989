"""YAML of a run folder, checked before it is built: everstep writes small files without anchors.

Nine lines of anchors expand to a billion items, and thousands of brackets exceed Python's stack. A scan of the parser's
events finds both before any value is built.
"""

from __future__ import annotations

from typing import Any

import yaml

MOST_BYTES = 1 << 20
DEEPEST = 64
"""Levels of nesting."""
Text = bytes | str
FIX = "restore the file from a copy, or start another run"


def checked(data: Text, place: str, most: int = MOST_BYTES) -> str:
    """Return the text of a document that is safe to build.

    Raises:
        ValueError: it is too large, nested too deeply, is no YAML, or has anchors, aliases, tags or interpolations.
    """
    if len(data) > most:
        raise ValueError(f"{place}: it has {len(data)} bytes (limit {most}); {FIX}")
    try:
        text = data.decode() if isinstance(data, bytes) else data
    except UnicodeDecodeError:
        raise ValueError(f"{place}: it is no text in UTF-8; {FIX}") from None
    depth = 0
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            _check(event, place)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"{place}: it is nested too deeply (limit {DEEPEST} levels); {FIX}")
    except yaml.YAMLError as error:
        raise ValueError(f"{place}: it is damaged ({' '.join(str(error).split())}); {FIX}") from error
    except RecursionError:
        raise ValueError(f"{place}: it is nested too deeply (limit {DEEPEST} levels); {FIX}") from None
    return text


def _check(event: Any, place: str) -> None:
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
        raise ValueError(f"{place}: it has an anchor or alias (&{event.anchor}), and everstep writes none; {FIX}")
    if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
        # OmegaConf would resolve it from the reader's environment: ${oc.env:AWS_SECRET_ACCESS_KEY}.
        raise ValueError(
            f"{place}: it has an interpolation ({event.value[:60]!r}), and everstep writes resolved values only; {FIX}"
        )
    if getattr(event, "tag", None) is not None:
        raise ValueError(f"{place}: it has a tag ({event.tag[:40]}), and everstep writes none; {FIX}")


def read(data: Text, place: str, most: int = MOST_BYTES) -> Any:
    """Return the value of a document; ValueError in one line if it is not safe to build, or cannot be."""
    text = checked(data, place, most)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise ValueError(f"{place}: it is damaged ({' '.join(str(error).split())}); {FIX}") from error


def dump(tree: Any) -> str:
    """Return readable text: texts of several lines in blocks, no aliases, keys in their order."""
    text: str = yaml.dump(tree, Dumper=_Readable, sort_keys=False, allow_unicode=True)
    return text


class _Readable(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Readable.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)
