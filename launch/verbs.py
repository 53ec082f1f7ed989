"""Verbs of `everstep`, in the order of --help."""

from __future__ import annotations

VERBS = {
    "run": (
        "everstep.launch.cli.run",
        "run",
        "train here and now, on all devices of this machine; go on if the run exists",
    ),
    "submit": ("everstep.launch.cli.submit", "submit", "queue a run on a cluster; go on if the run exists"),
    "sweep": (
        "everstep.launch.cli.sweep",
        "sweep",
        "many runs: every one of several values, or what a sampler chooses",
    ),
    "leaderboard": ("everstep.launch.cli.leaderboard", "leaderboard", "the trials of a sweep, the best first"),
    "ls": ("everstep.launch.cli.ls", "ls", "all runs: state, step, rate, time left, where"),
    "status": ("everstep.launch.cli.status", "status", "where a run stands and why, and where its time went (goodput)"),
    "logs": ("everstep.launch.cli.logs", "logs", "what a rank wrote; -f follows across restarts"),
    "cancel": ("everstep.launch.cli.cancel", "cancel", "stop runs for good"),
    "resume": ("everstep.launch.cli.resume", "resume", "go on with a run as it was started, or with changes"),
    "checkpoint": ("", "", "ls, verify, diff, export, rm: what is saved, whether it is whole or the same"),
    "data": ("", "", "prepare, inspect, verify, trace: datasets and their samples"),
    "check": ("everstep.launch.cli.check", "run", "all that can be known before a run starts"),
    "doctor": ("everstep.launch.cli.doctor", "doctor", "whether a cluster can take a job, and what hangs there"),
    "completion": ("everstep.launch.cli.completion", "completion", "print the completion script for bash, zsh or fish"),
}
"""Verb → module, function, help. Verbs without a module need torch and run in the trainer."""
