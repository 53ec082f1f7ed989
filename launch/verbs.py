"""What `everstep` can do, in the order of --help."""

from __future__ import annotations

VERBS = {
    "run": ("launch.run", "run", "train here and now, on all devices of this machine; go on if the run exists"),
    "submit": ("launch.submit", "submit", "queue a run on a cluster; go on if the run exists"),
    "sweep": ("launch.sweep.verb", "sweep", "many runs: every one of several values, or what a sampler chooses"),
    "leaderboard": ("launch.sweep.leaderboard", "leaderboard", "the trials of a sweep, the best first"),
    "ls": ("launch.ls", "ls", "all runs: state, step, rate, time left, where"),
    "status": ("launch.status", "status", "where a run stands and why, and where its time went (goodput)"),
    "logs": ("launch.logs", "logs", "what a rank wrote; -f follows across restarts"),
    "cancel": ("launch.cancel", "cancel", "stop runs for good"),
    "resume": ("launch.resume", "resume", "go on with a run as it was started, or with changes"),
    "checkpoint": ("", "", "ls, verify, diff, export, rm: what is saved, whether it is whole or the same"),
    "data": ("", "", "prepare, inspect, verify, trace: datasets and their samples"),
    "check": ("launch.check", "run", "all that can be known before a run starts"),
    "doctor": ("launch.doctor", "doctor", "whether a cluster can take a job, and what hangs there"),
    "completion": ("launch.completion", "completion", "print the completion script for bash, zsh or fish"),
}
"""Verb → module, function, help. Without a module it needs torch, so the trainer does it."""
