"""What `check` says of a model at the real number of processes, against what a real one has."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from everstep.compose import compose
from everstep.config import Dtype, ParallelConfig, ParallelKind, PrecisionConfig, RunConfig
from everstep.rank_env import RankInfo
from everstep.trainer.command import verb
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.optim import build_optimizer
from everstep.trainer.preflight.check import examine
from everstep.trainer.preflight.memory_estimate import Footprint, footprint, pretended
from everstep.trainer.tasks.classification import ImageClassifier
from support.toy import ToyModel

ADAMW = {"_target_": "torch.optim.AdamW", "lr": 0.1}


def toy() -> nn.Module:
    return ToyModel(depth=2, dropout=0.1)


def seen(world: int, kind: ParallelKind, shard: int | None = None, **more: object) -> Footprint:
    parallel = ParallelConfig(kind=kind, shard=shard)
    run = RunConfig(parallel=parallel, optimizer=ADAMW, **more)  # type: ignore[arg-type]
    with pretended(parallel, world) as mesh:
        return footprint(run, toy, mesh)


def test_on_one_process_it_is_what_a_model_and_its_optimizer_really_take() -> None:
    model = toy()
    optimizer = build_optimizer(ADAMW, model, ())
    model(torch.zeros(3, 6)).sum().backward()
    optimizer.step()
    state = [value for each in optimizer.state.values() for value in each.values()]
    found = seen(1, ParallelKind.ddp, ema=0.9)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert (found.weights, found.gradients, found.average) == (whole, whole, whole)
    assert found.optimizer == sum(value.numel() * value.element_size() for value in state)
    assert found.buffers == 4
    assert found.gathered == 0


@pytest.mark.parametrize("world", [2, 64, 4096])
def test_replicas_hold_all_and_shards_a_part_at_any_number_of_processes(world: int) -> None:
    replica, shard = seen(world, ParallelKind.ddp), seen(world, ParallelKind.fsdp)
    assert replica.weights == seen(1, ParallelKind.ddp).weights
    assert shard.parameters == replica.parameters
    # Each parameter is split by rows, so one row of each is the least that the first process has.
    least = sum(4 * max(1, p.numel() // p.shape[0]) for p in toy().parameters())
    assert max(least, replica.weights // world) <= shard.weights < replica.weights
    assert shard.gradients == shard.weights


def test_a_sharded_copy_is_as_large_as_its_share() -> None:
    assert seen(8, ParallelKind.hsdp, shard=2).weights == seen(2, ParallelKind.fsdp).weights


def test_fsdp_holds_its_largest_units_whole_in_the_type_that_it_computes_in() -> None:
    model = toy()
    blocks = sorted(sum(p.numel() for p in block.parameters()) for block in model.blocks)  # type: ignore[union-attr]
    assert seen(4, ParallelKind.fsdp).gathered == 4 * sum(blocks)
    half = seen(4, ParallelKind.fsdp, precision=PrecisionConfig(dtype=Dtype.bf16))
    assert half.gathered == 2 * sum(blocks)
    assert half.weights == seen(4, ParallelKind.fsdp).weights


def test_double_precision_takes_twice_as_much() -> None:
    for kind in (ParallelKind.ddp, ParallelKind.fsdp):
        double = seen(2, kind, precision=PrecisionConfig(dtype=Dtype.fp64))
        assert double.weights == 2 * seen(2, kind).weights


class Peeking(torch.optim.SGD):
    """Looks at values, which are not there on the meta device."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad.sum().item() > 0:
                    raise RuntimeError


def test_an_optimizer_that_looks_at_values_is_not_known_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peeking", type(sys)("peeking"))
    Peeking.__module__ = "peeking"
    sys.modules["peeking"].Peeking = Peeking  # type: ignore[attr-defined]
    run = RunConfig(optimizer={"_target_": "peeking.Peeking", "lr": 0.1}, plugins=["peeking"])
    found = footprint(run, toy, Mesh(RankInfo(), torch.device("cpu")))
    assert found.optimizer is None
    assert any("optimizer" in line and "not known" in line for line in found.table(1, "ddp"))


def test_the_pretended_group_is_gone_afterwards() -> None:
    with pretended(ParallelConfig(), 7) as mesh:
        assert (mesh.world, dist.get_world_size()) == (7, 7)
    assert not dist.is_initialized()
    with pytest.raises(ZeroDivisionError), pretended(ParallelConfig(), 7):
        raise ZeroDivisionError
    assert not dist.is_initialized()


def examined(*words: str, worlds: tuple[int, ...] = (1,)) -> list[str]:
    return examine(compose(["experiment=digits", *words]).run, *worlds).problems


def test_every_part_that_does_not_fit_is_told() -> None:
    found = examined("model.widht=3", "data.held_out=3", "hooks=[{_target_: torch.nn.Linear, a: 1}]")
    assert len(found) == 3
    assert [line.split("=")[0].split(":")[0] for line in found] == ["model.widht", "hooks[0].a", "data.held_out"]


def test_data_and_task_that_do_not_go_together_are_told() -> None:
    (found,) = examined("task=language")
    said = "a batch has image, label, baseline, and the task asks for 'tokens': choose data= and task= that go together"
    assert found == said


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_the_first_step_is_tried_with_values(dtype: str) -> None:
    found = examine(compose(["experiment=digits", f"precision.dtype={dtype}"]).run, 1)
    assert (found.problems, found.notes) == ([], [])


def test_a_large_model_is_tried_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everstep.trainer.preflight.first_step.LARGEST_BYTES", 0)
    monkeypatch.setattr(ImageClassifier, "loss", lambda self, model, batch: batch["image"].sum().item())
    found = examine(compose(["experiment=digits"]).run, 1)
    assert found.problems == []
    (note,) = found.notes
    assert note.startswith("note: the loss of the first microbatch, tried without values, ended in RuntimeError: ")


def test_a_step_that_takes_too_long_is_given_up_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everstep.trainer.preflight.first_step.LONGEST_S", 0.05)
    monkeypatch.setattr(ImageClassifier, "loss", lambda self, model, batch: [None for _ in iter(int, 1)])
    found = examine(compose(["experiment=digits"]).run, 1)
    assert found.problems == []
    assert "not through in 0.05 s" in found.notes[0]


def test_a_target_that_is_not_allowed_is_told_before_anything_is_imported() -> None:
    (found,) = examined("task._target_=nosuch.module.Task")
    assert "is in none of the packages that this run may use" in found


def test_what_is_wrong_on_every_number_of_processes_is_told_once() -> None:
    assert len(examined("model.width=-1", worlds=(1, 2, 4))) == 1


def test_the_fewest_and_the_most_processes_each_have_their_memory(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "experiment=digits", "parallel=fsdp", "--world", "2", "--world", "8"]
    assert verb(words) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("memory of each")] == [
        f"memory of each of {world} processes (fsdp), without activations:" for world in (2, 8)
    ]
    assert verb([*words, "--brief"]) == 0
    brief = capsys.readouterr().out.splitlines()
    assert [line.split(" take ")[0] for line in brief[:2]] == ["19,338 parameters"] * 2
    assert all("of 2" in few or "of 8" in few for few in brief[:2])


def test_a_world_that_does_not_divide_is_told_and_the_data_is_looked_at_all_the_same() -> None:
    found = examined("parallel=hsdp", "parallel.shard=3", "data.held_out=3", worlds=(4,))
    assert [line.split("=")[0] for line in found] == ["parallel.shard", "data.held_out"]


def test_an_error_of_somebodys_own_model_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mine", type(sys)("mine"))

    def broken(**_: object) -> nn.Module:
        raise KeyError("a\nb")

    broken.__module__ = "mine"
    sys.modules["mine"].broken = broken  # type: ignore[attr-defined]
    (found,) = examined("model._target_=mine.broken", "plugins=[mine]")
    assert found == "model: KeyError: 'a\\nb' (EVERSTEP_TRACEBACK=1 shows where)"


def test_processes_without_work_are_a_note_and_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(["check", "experiment=digits", "--world", "16"]) == 0
    shown = capsys.readouterr().out
    assert "a step has 4 microbatches for 16 processes, so 12 are idle" in shown
    assert "the first microbatch is image [16, 1, 8, 8] float32, label [16] int64" in shown


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert examined(worlds=(4,)) == []
    assert list(tmp_path.iterdir()) == []
