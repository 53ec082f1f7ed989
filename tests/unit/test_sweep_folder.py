"""A sweep's folder: one order of records, one driver at a time, one frozen plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from everstep.errors import ConfigError, SupersededError
from everstep.frozen_config import freeze, thaw
from everstep.launch.sweep import lease
from everstep.launch.sweep.lease import take
from everstep.launch.sweep.plan import Plan, amended, load, plan, settle
from everstep.launch.sweep.state import SweepState
from everstep.launch.sweep.suggest import Suggester
from everstep.launch.sweep.sweep_folder import SweepFolder, find_sweep

ASKED = {"event": "asked", "identity": "i", "name": "n", "values": {"seed": 1}, "drawn": {"seed": 1}}


def test_of_two_drivers_that_write_the_same_record_one_is_told_to_stop(tmp_path: Path) -> None:
    folder = SweepFolder(str(tmp_path))
    ours, theirs = SweepState(), SweepState()
    folder.append(ours, ASKED)
    with pytest.raises(SupersededError):
        folder.append(theirs, {**ASKED, "identity": "j"})
    assert [trial.identity for trial in folder.story().trials] == ["i"]
    assert theirs.trials == []


def test_records_keep_nan_as_json_can(tmp_path: Path) -> None:
    folder, story = SweepFolder(str(tmp_path)), SweepState()
    folder.append(story, ASKED)
    folder.append(story, {"event": "told", "trial": 0, "rung": 0, "verdict": "done", "values": [float("nan")],
                          "step": 1})  # fmt: skip
    assert json.loads((tmp_path / "records/00000001.json").read_text())["values"] == [None]
    (read,) = folder.story().trials
    assert str(read.told[0].values) == "(nan,)"


def elsewhere(tmp_path: Path, counter: int = 0, number: int = 1) -> None:
    """A lease of a driver on another machine."""
    (tmp_path / "leases").mkdir(exist_ok=True)
    facts = {"machine": "another", "host": "far", "pid": 7, "began": 1, "counter": counter, "renew_s": 0.01}
    (tmp_path / f"leases/{number:04d}.json").write_text(json.dumps(facts))


def test_a_lease_that_is_counted_up_is_respected(tmp_path: Path) -> None:
    elsewhere(tmp_path)
    counts = iter(range(1, 100))
    with pytest.raises(ConfigError, match="driven by process 7 on far"):
        take(SweepFolder(str(tmp_path)).storage, patience_s=5, wait=lambda _: elsewhere(tmp_path, next(counts)))


def test_a_lease_that_stands_still_is_taken_over_and_its_holder_finds_out(tmp_path: Path) -> None:
    storage = SweepFolder(str(tmp_path)).storage
    elsewhere(tmp_path)
    mine = take(storage, patience_s=0.02)
    assert mine.number == 2
    mine.check()
    elsewhere(tmp_path, number=3)
    with pytest.raises(SupersededError):
        mine.check()
    mine.release()


def test_a_driver_that_lives_on_this_machine_is_respected_at_once_and_a_dead_one_followed_at_once(
    tmp_path: Path,
) -> None:
    storage = SweepFolder(str(tmp_path)).storage
    code = "import sys, time; from everstep.launch.sweep.lease import take; from everstep.storage import open_storage; "
    code += "take(open_storage(sys.argv[1])); print('taken', flush=True); time.sleep(100)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "taken\n"
    with pytest.raises(ConfigError, match=f"process {holder.pid}"):
        take(storage)
    assert lease.holder(storage) is not None
    holder.kill()
    holder.wait()
    assert lease.holder(storage) is None
    mine = take(storage, patience_s=1000)
    mine.release()
    assert lease.holder(storage) is None


def test_of_many_that_take_a_free_lease_one_gets_it(tmp_path: Path) -> None:
    storage = SweepFolder(str(tmp_path)).storage
    elsewhere(tmp_path)
    barrier, taken, refused = threading.Barrier(8), [], []

    def one() -> None:
        barrier.wait()
        try:
            taken.append(take(storage, patience_s=0.05))
        except ConfigError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 7)
    taken[0].release()


def made(tmp_path: Path, *words: str, conf: Path | None = None) -> Plan:
    dirs = [] if conf is None else [str(conf)]
    return plan(["experiment=digits", f"run_root={tmp_path}", *words], dirs)


def test_groups_are_composed_once_for_each_choice_and_values_applied_to_it(tmp_path: Path) -> None:
    found = made(tmp_path, "optimizer=adamw,sgd", "optimizer.lr=0.1,0.2", "optimizer.weight_decay=0.5")
    assert len(found.bases) == 2
    configs = [found.config({"optimizer": name, "optimizer.lr": 0.2}, "n", 0) for name in ("adamw", "sgd")]
    targets = [str((config.optimizer or {})["_target_"]) for config in configs]
    assert [target.rsplit(".", 1)[-1] for target in targets] == ["AdamW", "SGD"]
    assert [(config.optimizer or {})["weight_decay"] for config in configs] == [0.5, 0.5]


def test_asha_fixes_the_curve_to_the_last_rung(tmp_path: Path) -> None:
    found = made(tmp_path, "optimizer.lr=0.1,0.2", "sweep.pruner=asha", "steps=90")
    configs = [found.config({"optimizer.lr": 0.1}, "n", rung) for rung in range(3)]
    assert [(config.steps, config.schedule.over_steps) for config in configs] == [(10, 90), (30, 90), (90, 90)]
    assert {config.log.wandb.group for config in configs} == {found.folder.name}


def test_a_trial_is_told_what_is_tried_in_it_for_those_who_look_at_its_metrics(tmp_path: Path) -> None:
    found = made(tmp_path, "optimizer.lr=0.1,0.2", "seed=0,1")
    config = found.config({"optimizer.lr": 0.1, "seed": 1}, "n", 0)
    assert config.log.hparams == {"optimizer.lr": 0.1, "seed": 1}
    assert thaw(freeze(config)) == config


def test_a_constraint_of_the_users_leaves_trials_out_and_makes_two_that_differ_in_nothing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "narrowing.py").write_text("""
def allowed(values):
    if values["seed"] == 0:
        values.pop("clip")
    return values if values["seed"] < 2 else None
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = made(tmp_path, "seed=0,1,2", "clip=1,2", "sweep.constraint=narrowing.allowed", "plugins=[narrowing]")
    asking, story = Suggester(found, SweepState()), SweepState()
    while (asked := asking.next(story)) is not None:
        story.apply(asked[0])
    assert [trial.values for trial in story.trials] == [{"seed": 0}, {"seed": 1, "clip": 1}, {"seed": 1, "clip": 2}]


def test_the_same_command_names_the_same_sweep_and_a_wider_one_too(tmp_path: Path) -> None:
    narrow, wide = made(tmp_path, "seed=0,1"), made(tmp_path, "seed=0,1,2")
    other = made(tmp_path, "seed=0,1", "clip=2")
    assert narrow.folder.name == wide.folder.name != other.folder.name
    assert narrow.identity({"seed": 1}) == wide.identity({"seed": 1}) != other.identity({"seed": 1})


def test_editing_conf_changes_nothing_in_a_sweep_that_is_there(tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    (conf / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /task: images\n  - override /model: convnet\n"
    text += "  - override /data: digits\nclip: 5.0\n"
    (conf / "experiment/mine.yaml").write_text(text)
    words = ["experiment=mine", "seed=0,1", "run=s"]
    first = settle(made(tmp_path, *words, conf=conf))
    (conf / "experiment/mine.yaml").write_text(text.replace("5.0", "7.0"))
    assert load(first.folder).config({"seed": 1}, "n", 0) == first.config({"seed": 1}, "n", 0)
    with pytest.raises(ConfigError, match=r"clip: 5.0 → 7.0"):
        settle(made(tmp_path, *words, conf=conf))


def test_what_may_change_changes_and_what_may_not_is_told(tmp_path: Path) -> None:
    words = ["optimizer.lr=interval(0.1,0.2)", "sweep.sampler=random", "sweep.trials=3", "run=s"]
    first = settle(made(tmp_path, *words))
    settle(amended(first, ["sweep.trials=9", "job.max_parallel=4"]))
    assert (load(first.folder).sweep.trials, load(first.folder).job.max_parallel) == (9, 4)
    with pytest.raises(ConfigError, match=r"only sweep.trials"):
        amended(first, ["sweep.seed=1"])
    with pytest.raises(ConfigError, match=r"sweep.sampler: random → qmc"):
        settle(made(tmp_path, *words[:1], "sweep.sampler=qmc", *words[2:]))
    with pytest.raises(ConfigError, match="swept keys"):
        settle(made(tmp_path, "seed=1,2", *words[1:]))


@pytest.mark.parametrize(("words", "said"), [
    (["clip=1"], "nothing is swept"),
    (["sede=1,2"], "did you mean 'seed'"),
    (["job.nodes=1,2"], "the same for all trials"),
    (["optimizer=adamw,adam"], "there is no such optimizer"),
    (["sweep=ahsa"], "did you mean 'asha'"),
    (["seed=1,2", "sweep.constraint=no.where"], "not in plugins"),
])  # fmt: skip
def test_a_mistake_on_the_command_line_is_told_before_anything_is_written(
    tmp_path: Path, words: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        made(tmp_path, *words).constraint()
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_of_conf_gives_the_space_and_the_command_line_changes_it(tmp_path: Path) -> None:
    found = made(tmp_path, "sweep=asha", "sweep.trials=4", "optimizer.lr=0.1,0.2")
    assert {axis.key for axis in found.axes} == {"optimizer.lr", "optimizer.weight_decay"}
    assert found.sweep.trials == 4
    assert next(axis for axis in found.axes if axis.key == "optimizer.lr").choices == (0.1, 0.2)


def test_a_run_that_is_taken_for_a_sweep_is_said_to_be_a_run(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.yaml").touch()
    with pytest.raises(ConfigError, match=r"^mine is a run and no sweep; 'everstep status mine' shows it$"):
        find_sweep("mine", str(tmp_path))
    with pytest.raises(ConfigError, match="did you mean 'mine'"):
        find_sweep("mina", str(tmp_path))
