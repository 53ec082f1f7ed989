"""The command and the environment that start the trainer on this machine; pure, so a test can read them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

RENDEZVOUS = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=3,join_timeout=60"
"""Whole seconds. torchrun's own settings let 44 s pass after a lost node before a survivor starts again, these 6."""


def command(url: str, nproc: int, grace_s: int, plugins: Sequence[str] = (), restarts: int = 0) -> list[str]:
    """The argv that trains what `url`/config.yaml says.

    Plug-in packages stand on the command line and not in the folder, so that a run folder from elsewhere cannot run
    code. One process needs no torchrun, which saves its start-up. `restarts` is torchrun's own budget: `everstep run`
    leaves it at 0 and starts again itself, because torchrun would also repeat a run that must not be repeated.
    """
    trainer = ["-m", "trainer", "--frozen", url, *(["--plugins", ",".join(plugins)] if plugins else [])]
    if nproc == 1:
        return [sys.executable, *trainer]
    return [
        sys.executable,
        "-m",
        "trainer.agent",  # torchrun itself, less noisy when a worker fails
        "--nnodes=1",
        f"--nproc-per-node={nproc}",
        "--rdzv-backend=c10d",
        # Port 0: the store takes a free port, so two jobs on one machine never meet.
        "--rdzv-endpoint=127.0.0.1:0",
        f"--rdzv-id={url.rsplit('/', 1)[-1]}",
        f"--rdzv-conf={RENDEZVOUS}",
        "--local-addr=127.0.0.1",
        "--monitor-interval=0.1",
        f"--shutdown-timeout={grace_s}",
        f"--max-restarts={restarts}",
        *trainer,
    ]


def environment(base: Mapping[str, str], threads: int, extra: Mapping[str, str]) -> dict[str, str]:
    """The trainer's environment: the caller's, what torchrun needs, and what the job adds."""
    return {
        **base,
        # torchrun keeps one store for all restarts, and gloo then reads addresses of the dead: a fresh one each time.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # Set in any case: torchrun else sets 1 and says so in a paragraph.
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        **extra,
    }
