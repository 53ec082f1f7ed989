"""Shell completion: scripts for three shells, and the hidden verb they call (without Hydra: fast).

No library does this: shtab writes static scripts, but keys, options and runs depend on the user's folders; argcomplete
would import all parsers at each key press.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from everstep.errors import ConfigError, nearest
from everstep.launch.parser import VERBS

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
SUBVERBS = {
    "checkpoint": ["diff", "export", "ls", "rm", "verify"],
    "data": ["exclude", "inspect", "prepare", "tag", "trace", "verify"],
}
KEYED = ("run", "submit", "sweep", "check", "doctor", "resume")
"""Verbs with key=value arguments."""
OF_A_RUN = (
    "status",
    "logs",
    "cancel",
    "resume",
    "leaderboard",
    "attach",
    "profile",
    "compare",
    "sync",
    "replay",
    "evidence",
)
"""Verbs whose first argument is a run or a sweep."""
OPTIONS = {
    "run": ["--cfg", "--config-dir", "--from", "--pdb"],
    "sweep": ["--config-dir", "--dry-run", "--quick"],
    "leaderboard": ["--csv", "--goal", "--json", "--metric", "--root"],
    "submit": ["--config-dir", "--dry-run", "--quick"],
    "check": ["--config-dir", "--quick"],
    "doctor": ["--config-dir", "--json", "--out-of-service"],
    "ls": ["--json"],
    "top": ["--every"],
    "ui": ["--open", "--port"],
    "status": ["--follow", "--json", "--root"],
    "logs": ["--attempt", "--follow", "--job", "--rank", "--root", "--tail"],
    "cancel": ["--root"],
    "attach": ["--rank", "--root"],
    "profile": ["--rank", "--root", "--steps"],
    "compare": ["--json", "--root"],
    "sync": ["--root", "--to"],
    "resume": ["--config-dir", "--failed", "--quick", "--root", "--trust"],
}
PLAIN = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._-]*")
MOST = 200
"""Limit of the names that are offered."""
WITH_VALUE = (
    "--attempt",
    "--config-dir",
    "--csv",
    "--from",
    "--goal",
    "--metric",
    "--out-of-service",
    "--rank",
    "--root",
    "--steps",
    "--tail",
    "--to",
)


def completion(arguments: Sequence[str]) -> int:
    """Print the script for a shell: `everstep completion bash`."""
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
    """Run the hidden verb: arguments so far, the last one unfinished; print one candidate per line."""
    with contextlib.suppress(Exception):  # a partial command line may fail anywhere; completion must print no error
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
    if verb in OF_A_RUN and not word.startswith("-") and (verb in ("cancel", "compare") or not _plain(words[1:-1])):
        return _starting(word, _runs(words))
    if word.startswith("-"):
        return _starting(word, [*OPTIONS.get(verb, []), "--help"] if verb in VERBS else [])
    if verb not in KEYED:
        return []
    return _values(word, words) if "=" in word else _keys(word, words)


def _plain(words: Sequence[str]) -> list[str]:
    """Return the words that are neither options nor values of options."""
    before = ["", *words]
    return [word for last, word in zip(before, words, strict=False) if word[:1] != "-" and last not in WITH_VALUE]


def _verbs() -> Iterable[str]:
    return [*VERBS, "--help", "--version"]


def _keys(word: str, words: Sequence[str]) -> list[str]:
    """Return groups and keys; of dotted keys only the next part, like folders, unless the prefix is typed."""
    from everstep.compose import groups
    from everstep.frozen_config import keys
    from everstep.launch.config import JobConfig

    job = [f"job.{field.name}" for field in dataclasses.fields(JobConfig)]
    shown: set[str] = {f"{group}=" for group in groups(_folders(words))}
    sweep = _sweep_keys() if words[0] == "sweep" else []
    for key in [*keys(), *job, *sweep]:
        depth = word.count(".") + 1
        parts = key.split(".")
        shown.add(f"{key}=" if len(parts) <= depth else ".".join(parts[:depth]) + ".")
    return _starting(word, shown)


def _sweep_keys() -> list[str]:
    from everstep.launch.sweep.config import SweepConfig

    return ["sweep", *(f"sweep.{field.name}" for field in dataclasses.fields(SweepConfig))]


def _values(word: str, words: Sequence[str]) -> list[str]:
    from everstep.compose import groups, sweep_files

    key = word.split("=", 1)[0]
    options = groups(_folders(words)).get(key, [])
    if key == "run":
        options = _runs(words)
    if key == "sweep":
        options = sorted(sweep_files(_folders(words)))
    return _starting(word, [f"{key}={option}" for option in options])


def _runs(words: Sequence[str]) -> list[str]:
    """Return the names in the folder of runs given by run_root= or --root."""
    from everstep.launch.runs.lookup import ROOT, is_local, names

    said = [word.removeprefix("run_root=") for word in words if word.startswith("run_root=")]
    said += [word.removeprefix("--root=") for word in words if word.startswith("--root=")]
    said += [words[n + 1] for n, word in enumerate(words[:-1]) if word == "--root"]
    root = said[-1] if said else ROOT
    # Listing a bucket takes too long for completion. The shell inserts names unquoted, so one that it would expand or
    # run is not offered.
    return [name for name in names(root) if PLAIN.fullmatch(name)][:MOST] if is_local(root) else []


def _folders(words: Sequence[str]) -> list[Path]:
    """Return the user's config folders on the command line."""
    given = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--config-dir"]
    given += [word.removeprefix("--config-dir=") for word in words if word.startswith("--config-dir=")]
    return [folder for name in given if (folder := Path(name).expanduser()).is_dir()]


def _starting(word: str, choices: Iterable[str]) -> list[str]:
    return sorted(choice for choice in set(choices) if choice.startswith(word))
