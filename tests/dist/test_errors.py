"""What a user gets wrong is one line on all ranks together, and exit code 2; with EVERSTEP_TRACEBACK=1 a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from everstep.outcome import Outcome
from support.ranks import environment, folder, train

pytestmark = pytest.mark.dist

WRONG = [
    (2, ["parallel=single"], "parallel=single on 2 processes: it trains on one; use parallel=ddp, or job.nproc=1"),
    (3, ["parallel=hsdp"], "parallel.shard=2 does not divide the 3 processes; change parallel.shard or job.nproc"),
    (2, ["parallel=hsdp", "parallel.shard=4"], "parallel.shard=4 does not divide the 2 processes"),
    (
        2,
        ["parallel=fsdp", "task._target_=support.toy.EmptyTask"],
        "parallel=fsdp: the model has no parameters to shard",
    ),
    (2, ["task._target_=support.toy.EmptyTask"], "the model has no parameters to train; change model"),
    (
        1,
        ["task._target_=support.toy.EmptyTask"],
        "the model has no parameters to train; change model, task or optimizer.groups",
    ),
    (2, ["parallel.compile=nosuch"], "parallel.compile='nosuch': there is no such backend"),
    (2, ["evaluate.metric=mea"], "evaluate.metric='mea': the task measures loss, mae; choose one"),
    (1, ["evaluate.metric=mea"], "evaluate.metric='mea': the task measures loss, mae; choose one"),
    (2, ["parallel=fsdp", "evaluate.metric=mea"], "evaluate.metric='mea': the task measures loss, mae"),
    (2, ["data._target_=everstep.data.ArrowDataset", "+data.path=/nosuch/data"], "/nosuch/data"),
    (2, ["data.samples=0"], "data: the training set is empty"),
    (2, ["task.dept=3"], "task.dept: support.toy.ToyTask takes no 'dept'; did you mean 'depth'?"),
    (2, ["data.sampels=3"], "data.sampels: support.toy.toy_data takes no 'sampels'; did you mean 'samples'?"),
    (2, ["optimizer.lr=-1"], "optimizer (torch.optim.AdamW): Invalid learning rate: -1"),
    (2, ["plugins=[]"], "name your package with 'plugins=[support]'"),
    (2, ["hooks=[{_target_: os.system, command: x}]"], "hooks[0]._target_='os.system' is in none of the packages"),
    (2, ["hooks=[{_target_: support.toy.jitter}]"], "hooks[0]: support.toy.jitter needs batch, keys"),
    (2, ["global_batch=0"], "global_batch=0: must be ≥ 1; change global_batch"),
    (2, ["stepz=3"], "no key 'stepz'; did you mean 'steps'?"),
    (2, ["optimizer=null"], "optimizer has keys (lr) but no _target_"),
    (2, ["run_root=nosuch://bucket/runs"], "the scheme 'nosuch' is not one of"),
    (2, ["init_from=/nosuch/run"], "/nosuch/run has no checkpoint of Everstep, and is no safetensors"),
    (2, ["log.wandb.enabled=true"], "log asks for W&B, which is not installed: pip install 'everstep[wandb]'"),
]


def without_wandb(_: int) -> None:
    import sys

    sys.modules["wandb"] = None  # type: ignore[assignment]


@pytest.mark.parametrize(("world", "overrides", "said"), WRONG, ids=lambda value: str(value)[:40])
def test_what_the_user_got_wrong_is_one_line_on_all_ranks_together(
    tmp_path: Path, world: int, overrides: list[str], said: str
) -> None:
    (tmp_path / "toy").mkdir()  # where the ledger would be
    ended = train(world, tmp_path, *overrides, before=without_wandb)
    assert ended.codes == [2] * world, ended.printed
    lines = ended.printed.splitlines()
    assert len(lines) == 1, ended.printed
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    last = folder(tmp_path).last_ending()
    assert last is None or last.outcome is Outcome.config_error
    assert not (tmp_path / "toy" / "ledger.jsonl").exists(), "it trained before it looked"


@pytest.mark.parametrize("overrides", [["parallel=single"], ["stepz=3"], ["task.dept=3"]])
def test_who_asks_gets_the_traceback(tmp_path: Path, overrides: list[str]) -> None:
    with environment(EVERSTEP_TRACEBACK="1"):
        ended = train(2, tmp_path, *overrides)
    assert ended.codes == [2, 2], ended.printed
    assert ended.printed.count("Traceback (most recent call last):") >= 1
    assert "everstep.errors.ConfigError: " in ended.printed


def test_the_traceback_of_each_rank_is_in_its_log(tmp_path: Path) -> None:
    assert train(2, tmp_path, "parallel=single").codes == [2, 2]
    store = folder(tmp_path).storage
    for rank in (0, 1):
        assert "Traceback" in store.read(f"attempts/0001/rank-{rank:04d}.log").decode()


def test_an_error_of_one_rank_alone_is_told_with_its_rank(tmp_path: Path) -> None:
    from everstep.errors import DataError
    from everstep.trainer.data.loader import Loader

    def damaged_on_rank_1(rank: int) -> None:
        def fails(self: Loader, *_: object, **__: object) -> None:
            raise DataError("shard 7 is damaged")

        if rank == 1:
            Loader.__init__ = fails  # type: ignore[method-assign]

    ended = train(2, tmp_path, before=damaged_on_rank_1)
    assert ended.codes[1] == 2
    assert "error: shard 7 is damaged (rank 1)" in ended.printed.splitlines()
    last = folder(tmp_path).last_ending()
    assert last is not None
    assert last.reason == "shard 7 is damaged"
