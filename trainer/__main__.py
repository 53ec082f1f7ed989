"""`python -m trainer`: what torchrun starts, and the verbs that need torch.

python -m trainer [--config-dir DIR] key=value …       compose, settle the run folder, train
python -m trainer --frozen RUN_URL [--plugins a,b]     train what RUN_URL/config.yaml says
python -m trainer check | checkpoint | data …
"""

from __future__ import annotations

import sys

from trainer.process import keep_freed_memory, raise_file_limit
from trainer.stop import Stop

VERBS = ("check", "checkpoint", "data")


def main() -> int:
    arguments = sys.argv[1:]
    if arguments and arguments[0] in VERBS:
        from trainer.command import verb

        return verb(arguments)
    # Before anything heavy is imported: a signal that comes meanwhile must not be lost.
    stop = Stop()
    stop.listen()
    keep_freed_memory()
    raise_file_limit()
    from trainer.attempt import attempt

    return attempt(arguments, stop)


if __name__ == "__main__":
    sys.exit(main())
