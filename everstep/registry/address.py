"""Address of a version in a registry, as a start of a run: registry://URL/MODEL@7."""

from __future__ import annotations

from everstep.errors import ConfigError
from everstep.registry.records import Version
from everstep.registry.registry import Registry

SCHEME = "registry://"
WITH_WEIGHTS = ("safetensors", "hf")
"""Formats that hold weights by name."""


def is_address(url: str) -> bool:
    return url.startswith(SCHEME)


def version_at(url: str) -> tuple[Registry, Version]:
    """Return the registry and the version that `init_from` names.

    Raises:
        ConfigError: it names an alias, which may move between two starts of a run, or a version without weights.
        DataError: the record is damaged, or not signed by a trusted key.
    """
    place, _, word = url.removeprefix(SCHEME).rpartition("/")
    if not place or not word:
        raise ConfigError(f"init_from={url}: write {SCHEME}URL/MODEL@7, where URL is the folder of the registry")
    models = Registry(place)
    version = models.find(word)
    if not word.partition("@")[2].isdigit():
        raise ConfigError(
            f"init_from={url}: an alias may move between two starts of the run; it is version {version.number} now: "
            f"write init_from={SCHEME}{place}/{version.model}@{version.number}"
        )
    form = version.facts.get("format")
    if form not in WITH_WEIGHTS:
        raise ConfigError(
            f"init_from={url}: it was exported as {form}, which has no weights by name; "
            "add an export made with --format safetensors"
        )
    return models, version
