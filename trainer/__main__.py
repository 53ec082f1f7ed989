"""Entry point of `python -m everstep.trainer`: the process of a rank, and the verbs that need torch.

python -m everstep.trainer [--config-dir DIR] key=value …       compose, freeze the config in the run folder, train
python -m everstep.trainer --frozen RUN_URL [--plugins a,b]     train with the config of RUN_URL/config.yaml
python -m everstep.trainer check | checkpoint | data | evaluate | explain | export | predict | replay …
"""

from __future__ import annotations

import os
import sys

from everstep.import_path import forget_safe_environment
from everstep.rank_env import AGENT_PID, die_with_parent, fix_hash_seed

VERBS = ("check", "checkpoint", "data", "evaluate", "explain", "export", "predict", "replay", "sync")


def main() -> int:
    forget_safe_environment()
    if sys.argv[1:2] == ["--fork-server"]:  # by the launcher alone
        from everstep.trainer.fork_server import serve

        sys.argv[1:] = serve(sys.argv[2:])  # returns in each rank that it forks
    if "TORCHELASTIC_RUN_ID" in os.environ or AGENT_PID in os.environ:
        die_with_parent()  # first of all: the imports take seconds on a busy node, and the agent may die meanwhile
    arguments = sys.argv[1:]
    if arguments and arguments[0] in VERBS:
        from everstep.trainer.command import verb

        return verb(arguments)
    fix_hash_seed()  # the launcher has set it; torchrun by hand has not
    from everstep.process_setup import (
        keep_freed_memory,
        keep_printing,
        quieten,
        raise_file_limit,
        without_collections,
    )
    from everstep.trainer.stop import Stop

    # Before any heavy import: a signal that arrives during the imports must not be lost.
    stop = Stop()
    stop.listen()
    keep_printing()
    keep_freed_memory()
    raise_file_limit()
    quieten()
    with without_collections():
        from everstep.trainer.worker import attempt

    return attempt(arguments, stop)


if __name__ == "__main__":
    sys.exit(main())
