"""Tab: scripts for three shells, and the hidden verb that they ask. It answers without Hydra, so at once."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from launch.verbs import VERBS
from trainer.errors import ConfigError, nearest

BASH = r"""_everstep() {
    local line="${COMP_LINE:0:COMP_POINT}" i
    local -a words
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    local word="${words[${#words[@]}-1]}" IFS=$'\n'
    COMPREPLY=($(everstep __complete "${words[@]:1}" 2>/dev/null))
    for i in "${!COMPREPLY[@]}"; do
        [[ ${COMPREPLY[i]} == *[=./] ]] || COMPREPLY[i]+=' '
        # Readline takes '=' for the end of a word and wants only what follows.
        [[ $word == *=* && $COMP_WORDBREAKS == *=* ]] && COMPREPLY[i]="${COMPREPLY[i]#*=}"
    done
}
complete -o nospace -F _everstep everstep
"""

ZSH = r"""#compdef everstep
_everstep() {
    local -a found
    found=("${(@f)$(everstep __complete "${(@)words[2,CURRENT-1]}" "$PREFIX" 2>/dev/null)}")
    compadd -Q -S '' -- ${(M)found:#*[=./]}
    compadd -Q -- ${found:#*[=./]}
}
compdef _everstep everstep
"""

FISH = r"""complete -c everstep -f -a '(everstep __complete (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
SUBVERBS = {"checkpoint": ["diff", "ls", "rm", "verify"], "data": ["inspect", "prepare", "verify"]}
KEYED = ("run", "submit", "check")
"""Verbs whose words are key=value."""
OPTIONS = {
    "run": ["--cfg", "--config-dir", "--help"],
    "submit": ["--config-dir", "--dry-run", "--help"],
    "check": ["--help"],
}


def completion(arguments: Sequence[str]) -> int:
    """`everstep completion bash`: the script on stdout."""
    shell = arguments[0] if arguments else ""
    if shell in ("-h", "--help"):
        print("usage: everstep completion bash|zsh|fish\n\nbash, zsh: source <(everstep completion bash)")
        print("fish: everstep completion fish > ~/.config/fish/completions/everstep.fish")
        return 0
    if shell not in SCRIPTS:
        raise ConfigError(f"completion {shell!r}: write bash, zsh or fish{nearest(shell, SCRIPTS)}")
    print(SCRIPTS[shell], end="")
    return 0


def complete(words: Sequence[str]) -> int:
    """The hidden verb: words of the command line so far, the last one unfinished; one candidate a line."""
    with contextlib.suppress(Exception):  # half a command line may be anything; Tab must stay silent
        for candidate in candidates(words):
            print(candidate)
    return 0


def candidates(words: Sequence[str]) -> list[str]:
    word = words[-1] if words else ""
    if len(words) <= 1:
        return _starting(word, _verbs())
    verb = words[0]
    if verb == "completion":
        return _starting(word, SCRIPTS)
    if verb in SUBVERBS and len(words) == 2:
        return _starting(word, SUBVERBS[verb])
    if verb not in KEYED:
        return []
    if word.startswith("-"):
        return _starting(word, OPTIONS[verb])
    return _values(word, words) if "=" in word else _keys(word, words)


def _verbs() -> Iterable[str]:
    return [*VERBS, "--help", "--version"]


def _keys(word: str, words: Sequence[str]) -> list[str]:
    """Groups and keys; of dotted keys only the next part, as files in folders, unless the prefix is typed."""
    from launch.config import JobConfig
    from trainer.compose import groups, keys

    job = [f"job.{field.name}" for field in dataclasses.fields(JobConfig)]
    shown: set[str] = {f"{group}=" for group in groups(_folders(words))}
    for key in [*keys(), *job]:
        depth = word.count(".") + 1
        parts = key.split(".")
        shown.add(f"{key}=" if len(parts) <= depth else ".".join(parts[:depth]) + ".")
    return _starting(word, shown)


def _values(word: str, words: Sequence[str]) -> list[str]:
    from trainer.compose import groups

    key = word.split("=", 1)[0]
    options = groups(_folders(words)).get(key, [])
    if key == "run":
        from trainer.storage import open_storage

        root = next((w.removeprefix("run_root=") for w in reversed(words) if w.startswith("run_root=")), "runs")
        # A bucket takes longer to list than anybody waits after Tab.
        options = [] if "://" in root else [name for name in open_storage(root).names() if not name.startswith(".")]
    return _starting(word, [f"{key}={option}" for option in options])


def _folders(words: Sequence[str]) -> list[Path]:
    """The user's config folders that stand on the command line."""
    given = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--config-dir"]
    given += [word.removeprefix("--config-dir=") for word in words if word.startswith("--config-dir=")]
    return [folder for name in given if (folder := Path(name).expanduser()).is_dir()]


def _starting(word: str, choices: Iterable[str]) -> list[str]:
    return sorted(choice for choice in set(choices) if choice.startswith(word))
