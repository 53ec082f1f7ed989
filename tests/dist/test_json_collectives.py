"""Messages between ranks: JSON, whatever arrives, and never a pickle."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from everstep.config import ParallelConfig
from everstep.errors import ConfigError, EverstepError, ShortOfMemoryError
from everstep.rank_env import RankInfo
from everstep.trainer.checkpoint.read import DamagedError
from everstep.trainer.distributed.json_collectives import pack_error, unpack_error
from everstep.trainer.distributed.mesh import Mesh, form, join
from support.ranks import start, train

pytestmark = pytest.mark.dist


def made() -> Mesh:
    place = RankInfo.from_environment()
    return form(place, join(place, 60), ParallelConfig(), 60)


@pytest.mark.parametrize("words", [
    ("parallel=ddp",), ("parallel=fsdp",), ("parallel=hsdp", "parallel.shard=1"),
], ids=lambda words: words[0])  # fmt: skip
def test_no_rank_unpickles_anything_in_a_start_or_a_resume(tmp_path: Path, words: tuple[str, ...]) -> None:
    def refuse(event: str, arguments: tuple[object, ...]) -> None:
        if event == "pickle.find_class":
            raise AssertionError(f"unpickled {arguments}")

    def watched(rank: int) -> None:
        sys.addaudithook(refuse)

    for steps in (2, 4):
        done = train(2, tmp_path, *words, f"steps={steps}", before=watched)
        assert done.codes == [0, 0], done.printed


def test_values_and_errors_arrive_on_all_ranks(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        mesh = made()

        def refuse() -> None:
            raise DamagedError("step-1: short")

        assert mesh.decide(lambda: {"a": [1, None, "ü"], "rank": rank}) == {"a": [1, None, "ü"], "rank": 0}
        assert mesh.gather("x" * rank * 1000) == ["", "x" * 1000, "x" * 2000]
        assert mesh.exchange([rank], lambda all_: [[*each, len(all_)] for each in all_]) == [rank, 3]
        with pytest.raises(DamagedError, match="step-1: short") as raised:
            mesh.decide(refuse)
        assert raised.value.told == (rank != 0)
        with pytest.raises(DamagedError) as raised:
            mesh.together(refuse if rank == 1 else lambda: None)
        assert raised.value.told == (rank != 1)
        return 0

    assert start(3, work, tmp_path / "log").codes == [0, 0, 0], (tmp_path / "log").read_text()


def test_an_error_keeps_its_kind_its_text_and_its_plain_fields() -> None:
    class OnlyHereError(ConfigError):
        pass

    again = unpack_error(pack_error(ShortOfMemoryError("too large", 4)))
    assert isinstance(again, ShortOfMemoryError)
    assert (str(again), again.micro_batch, again.exit_code) == ("too large", 4, 1)
    packed = pack_error(OnlyHereError("steps=0"))
    assert isinstance(unpack_error(packed), OnlyHereError)
    packed["kinds"][0] = "unknown"
    assert type(unpack_error(packed)) is ConfigError
    assert type(unpack_error({"kinds": ["os.system"], "text": "x", "fields": {}})) is EverstepError
