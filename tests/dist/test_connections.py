"""The ranks' own connections: closed to others once they are made, and proved by both ends."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from everstep.config import ParallelConfig
from everstep.errors import MachineError
from everstep.rank_env import RankInfo
from everstep.trainer.distributed import gloo_peers
from everstep.trainer.distributed.mesh import Mesh, form, join
from support.ranks import start

pytestmark = pytest.mark.dist


def made() -> Mesh:
    place = RankInfo.from_environment()
    return form(place, join(place, 60), ParallelConfig(), 60)


def test_groups_do_not_listen_once_they_are_made_and_work_on(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        mesh = made()
        groups = [dist.group.WORLD, mesh.new_gloo_group()]
        assert gloo_peers._listening() == set()
        for group in groups:
            total = torch.ones(1)
            dist.all_reduce(total, group=group)
            assert total.item() == 3
        return 0

    assert start(3, work, tmp_path / "log").codes == [0, 0, 0], (tmp_path / "log").read_text()


def test_a_peer_that_does_not_know_the_secret_is_refused(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        made()
        assert dist.group.WORLD is not None
        with pytest.raises(MachineError, match=r"the connection of rank . does not know the secret of this start"):
            gloo_peers.prove(dist.group.WORLD, bytes([rank]))
        return 0

    assert start(2, work, tmp_path / "log").codes == [0, 0], (tmp_path / "log").read_text()


def test_a_port_that_was_closed_refuses_and_its_descriptor_says_try_again() -> None:
    with gloo_peers.closed_afterwards():
        listener = socket.create_server(("127.0.0.1", 0))
        address, descriptor = listener.getsockname(), listener.detach()
        socket.create_connection(address).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    with socket.socket(fileno=descriptor) as left, pytest.raises(BlockingIOError):
        left.accept()
    assert not os.path.exists(f"/proc/self/fd/{descriptor}")
