"""Network interface of the ranks' own connections."""

from __future__ import annotations

import sys
from collections.abc import MutableMapping

LOOPBACK = "lo" if sys.platform.startswith("linux") else "lo0"


def stay_on_this_machine(env: MutableMapping[str, str]) -> None:
    """Set the interface of gloo and NCCL to the loopback, unless the user has chosen one."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        env.setdefault(name, LOOPBACK)
