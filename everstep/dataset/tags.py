"""Tags of a dataset, such as its licence, and the policy of a run that says which of them are allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from everstep.checked_json import mapping, text
from everstep.errors import ConfigError

TAGS = "tags"
"""Attribute of a dataset's index."""
ANY = "*"
MOST_TAGS, LONGEST_TAG = 64, 1000
_KEY = re.compile(r"[a-z][a-z0-9_-]{0,63}")


def checked_tags(found: object) -> dict[str, str]:
    """Return tags as written; ValueError if they are not names with texts."""
    for name, value in mapping(found, "tags", MOST_TAGS).items():
        if not _KEY.fullmatch(name):
            raise ValueError(f"tags: {name[:64]!r} is no name of small letters, digits, '-' and '_'")
        if not text(value, f"tags.{name}", LONGEST_TAG).strip() or not value.isprintable():
            raise ValueError(f"tags.{name} is empty, or has characters that cannot be printed")
    return dict(mapping(found, "tags"))


def parse_tags(written: str) -> dict[str, str]:
    """Return the tags of a command line, `{license: CC0, source: …}`.

    Raises:
        ConfigError: they cannot be read; the message is one line.
    """
    import yaml

    try:
        found = yaml.load(written, yaml.BaseLoader)  # all values are texts: a licence `1.0` is no number
        return checked_tags(found)
    except (ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"tags={written}: {why}; write tags='{{license: CC0, source: NAME}}'") from error


def policy_fault(allowed: Sequence[str] | None, place: str, tags: Mapping[str, str]) -> str:
    """Return why a run with this policy may not use a dataset; empty if it may.

    Each tag of the dataset has to be allowed, and it has to have a tag of each name that the policy has.

    Args:
        allowed: `policy.allow_tags`; None without a policy.
        place: path or class of the dataset.
    """
    if allowed is None:
        return ""
    listed = f"policy.allow_tags=[{','.join(allowed)}]"
    if not tags:
        return f"{listed}: {place} has no tags; 'everstep data tag {place} NAME=VALUE', or use other data"
    for name in dict.fromkeys(entry.partition(":")[0] for entry in allowed):
        if name not in tags:
            return f"{listed}: {place} has no tag {name!r}; 'everstep data tag {place} {name}=VALUE', or use other data"
    for name, value in tags.items():
        if f"{name}:{value}" not in allowed and f"{name}:{ANY}" not in allowed:
            return f"{listed}: {place} has the tag {name}:{value}, which is not allowed; use other data, or allow it"
    return ""


def tags_of(attributes: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags in the attributes of an index; ValueError if they are damaged."""
    return checked_tags(attributes.get(TAGS, {}))
