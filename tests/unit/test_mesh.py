"""How the processes of a start come to agree, over a real store."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch.distributed as dist

from everstep.errors import ConfigError, MachineError
from everstep.rank_env import WORLD, RankInfo
from everstep.trainer.distributed.mesh import ToldError, agree_on_generation, tell
from support.processes import until


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def together(world: int, work: Callable[[RankInfo], object]) -> list[object]:
    """What `work` gave, or raised, for each rank, in a thread each."""
    found: list[object] = [None] * world

    def take_part(rank: int) -> None:
        try:
            found[rank] = work(RankInfo(rank, world))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=take_part, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_512_processes_agree_on_one_name(store: dist.TCPStore) -> None:
    names = together(512, lambda place: agree_on_generation(store, place, 60))
    assert len(set(names)) == 1
    assert isinstance(names[0], str)


def test_no_key_or_value_grows_with_the_world(store: dist.TCPStore) -> None:
    class Measured:
        longest = 0

        def __getattr__(self, name: str) -> Callable[..., object]:
            def call(*arguments: object) -> object:
                words = [text for each in arguments for text in (each if isinstance(each, list) else [each])]
                Measured.longest = max(Measured.longest, *(len(text) for text in words if isinstance(text, str)))
                return getattr(store, name)(*arguments)

            return call

    together(64, lambda place: agree_on_generation(Measured(), place, 60))  # type: ignore[arg-type]
    assert Measured.longest < 100


def test_a_later_start_over_the_same_store_agrees_on_another_name(store: dist.TCPStore) -> None:
    names = [set(together(4, lambda place: agree_on_generation(store, place, 60))) for _ in range(3)]
    assert [len(found) for found in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3


def test_who_waits_in_vain_says_how_many_were_to_come(store: dist.TCPStore) -> None:
    with pytest.raises(MachineError, match="the 2 processes did not all join within 0 s"):
        agree_on_generation(store, RankInfo(0, 2), 0.05)


def test_rank_0_stays_until_all_have_read_why_it_refuses(store: dist.TCPStore) -> None:
    def refuses() -> str:
        raise ConfigError("steps=0: must be 1 or more")

    ended = threading.Event()

    def rank_0() -> None:
        with pytest.raises(ConfigError):
            tell(store, RankInfo(0, 3), refuses)
        ended.set()

    thread = threading.Thread(target=rank_0)
    thread.start()
    until(lambda: store.check(["told"]))
    for rank in (1, 2):
        assert not ended.is_set()
        with pytest.raises(ToldError, match="steps=0"):
            tell(store, RankInfo(rank, 3), refuses)
    thread.join()
    assert ended.is_set()


@pytest.mark.parametrize(("asked", "met", "fits"), [("2", 2, True), ("2", 1, False), ("2", 3, False), ("", 1, True)])
def test_a_start_of_another_size_than_was_asked_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, asked: str, met: int, fits: bool
) -> None:
    monkeypatch.setenv(WORLD, asked)
    if fits:
        RankInfo(0, met).check_world()
        return
    with pytest.raises(MachineError, match=f"{met} of {asked} processes have met") as raised:
        RankInfo(0, met).check_world()
    assert raised.value.exit_code == 1
