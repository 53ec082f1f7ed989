"""Ranks of a fork server: the exit code of a start, the rank that is named, and how long the others live."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from everstep.launch.job_start.other_nodes import OtherNodes
from everstep.launch.job_start.rank_group import LAST_WORDS_S, RankGroup, rank_environments
from everstep.launch.node.agent import free_port
from everstep.rank_env import LOST_PEER, STALLED
from everstep.rendezvous.store_server import StoreServer
from everstep.trainer.distributed.store_client import RunStore
from support.processes import until

KEY = bytes(32)


class Server:
    """A fork server that says what a test makes it say."""

    pid, unfit, gone, reads = 1, "", False, False

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []
        self.forked: list[dict[str, str]] = []

    def fork(self, changes: dict[str, str], output: int | None) -> None:
        self.forked.append(changes)
        self.said.append({"forked": 100 + len(self.forked) - 1, "pidfd": None})

    def messages(self) -> list[dict[str, Any]]:
        said, self.said = self.said, []
        return said

    def descriptors(self) -> list[int]:
        return []


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Signals that were sent: rank and number."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(RankGroup, "_signal", lambda group, pid, number: sent.append((pid - 100, number)))
    return sent


def group(server: Server, nproc: int = 2, grace_s: float = 60, others: OtherNodes | None = None) -> RankGroup:
    environments = rank_environments(nproc) if nproc > 1 else [{}]
    made = RankGroup(server, environments, None, grace_s, others)  # type: ignore[arg-type]
    assert made.poll() is None
    return made


def end(server: Server, **codes: int) -> None:
    server.said += [{"ended": 100 + int(rank[1:]), "code": code} for rank, code in codes.items()]


@pytest.mark.parametrize(("codes", "code", "named"), [
    ({"r0": 0, "r1": 0}, 0, None),
    ({"r0": LOST_PEER, "r1": -9}, 1, "rank 1 was killed by SIGKILL"),
    ({"r1": -11, "r0": LOST_PEER}, 1, "rank 1 was killed by SIGSEGV"),
    ({"r0": LOST_PEER, "r1": 3}, 3, None),
    ({"r0": 75, "r1": 75}, 0, None),
    ({"r0": LOST_PEER, "r1": LOST_PEER}, LOST_PEER, None),
    ({"r0": STALLED, "r1": -9}, 1, None),
])  # fmt: skip
def test_the_rank_that_failed_by_itself_gives_the_code_and_the_reason(
    codes: dict[str, int], code: int, named: str | None, killed: list[tuple[int, int]]
) -> None:
    server = Server()
    ranks = group(server)
    end(server, **codes)
    assert ranks.poll() == code
    death = ranks.death(0)
    assert (death.reason if death else None) == named


def test_one_process_has_no_variables_of_torchrun_and_its_signal_is_its_code(killed: list[tuple[int, int]]) -> None:
    server = Server()
    ranks = group(server, nproc=1)
    assert server.forked == [{}]
    end(server, r0=-9)
    assert ranks.poll() == 137
    assert ranks.death(0) is None


def test_after_a_kill_the_others_have_a_moment_and_after_an_error_the_grace_period(
    killed: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    for code, wait_s in ((-9, LAST_WORDS_S), (LOST_PEER, LAST_WORDS_S), (1, 60.0)):
        server = Server()
        ranks = group(server)
        monkeypatch.setattr(time, "monotonic", lambda: now)
        end(server, r1=code)
        assert ranks.poll() is None
        monkeypatch.setattr(time, "monotonic", lambda wait_s=wait_s: now + wait_s - 0.01)
        assert ranks.poll() is None
        assert killed == []
        monkeypatch.setattr(time, "monotonic", lambda wait_s=wait_s: now + wait_s + 0.01)
        assert ranks.poll() is None
        assert killed == [(0, 9)]
        killed.clear()


def test_a_stop_reaches_ranks_that_were_forked_meanwhile(killed: list[tuple[int, int]]) -> None:
    server = Server()
    ranks = group(server)
    ranks.stop()
    ranks.poll()
    assert killed == [(0, 15), (1, 15)]


def test_a_failure_on_one_node_ends_the_ranks_of_the_other_and_is_not_blamed_on_them(
    killed: list[tuple[int, int]],
) -> None:
    store = StoreServer("tcp:127.0.0.1:0", KEY)
    nodes = [OtherNodes(store.address, KEY, node, 2, 10) for node in range(2)]
    servers = [Server(), Server()]
    groups = [group(server, others=node) for server, node in zip(servers, nodes, strict=True)]
    try:
        groups[1].poll()
        end(servers[1], r0=-9)
        assert groups[1].poll() is None
        until(lambda: os.read(nodes[0].descriptor, 1) == b".")
        until(lambda: groups[0].poll() is None and (0, 9) in killed)
        end(servers[0], r0=-9, r1=-9)
        assert groups[0].poll() == LOST_PEER
        assert groups[0].death(0) is None
    finally:
        began = time.monotonic()
        nodes[1].leave()
        nodes[0].leave()
        assert time.monotonic() - began < 4, "the head has waited although all had left"
        store.close()


def test_a_store_that_was_away_for_a_moment_is_no_failure_and_is_asked_again() -> None:
    # Not one of the ports of clients: a client that tries a closed one of these may connect to itself.
    store = StoreServer(f"tcp:127.0.0.1:{free_port(str(os.getpid()), '127.0.0.1')}", KEY)
    node = OtherNodes(store.address, KEY, 1, 2, 10)
    again = None
    try:
        assert RunStore(store.address, KEY, 10).num_keys() == 0
        store.close()
        again = StoreServer(store.address, KEY)
        assert node.wait_s is None
        RunStore(again.address, KEY, 10).set("nodes/failed", "7")
        assert os.read(node.descriptor, 1) == b"."
        assert node.wait_s == 7
    finally:
        node.leave()
        if again is not None:
            again.close()
