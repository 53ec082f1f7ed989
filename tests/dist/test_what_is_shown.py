"""What a run tells of itself while it trains, when it ends and when it is resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from everstep.outcome import Outcome
from everstep.trainer.update import Update
from support import kill_points
from support.processes import until
from support.ranks import folder, train

pytestmark = pytest.mark.dist
PREVIEWS = "plugins=[support.toy,support.preview_tasks]"


@pytest.mark.parametrize("world", [1, 2])
def test_a_preview_that_raises_is_a_warning_and_the_run_is_done(tmp_path: Path, world: int) -> None:
    ended = train(
        world, tmp_path, PREVIEWS, "task._target_=support.preview_tasks.Raising", "steps=2", "log.progress=lines"
    )
    assert ended.codes == [0] * world, ended.printed
    last = folder(tmp_path).last_ending()
    assert last is not None
    assert last.outcome is Outcome.done
    said = "warning: the task's preview failed, the run is done all the same: AttributeError: no such thing"
    assert ended.printed.count(said) == 1
    assert "Traceback" in folder(tmp_path).storage.read("attempts/0001/rank-0000.log").decode()


@pytest.mark.parametrize(
    ("text", "shown"), [("\\x1b[2Jx\\x07", "a sample of what it has learnt:\n\\x1b[2Jx\\x07"), (" ", "")]
)
def test_a_preview_cannot_command_the_terminal_and_an_empty_one_is_not_announced(
    tmp_path: Path, text: str, shown: str
) -> None:
    asked = f"task.text='{text.encode().decode('unicode_escape')}'"
    ended = train(
        1, tmp_path, PREVIEWS, "task._target_=support.preview_tasks.Says", asked, "steps=1", "log.progress=lines"
    )
    assert ended.codes == [0], ended.printed
    assert shown in ended.printed
    assert ("a sample of" in ended.printed) == bool(shown)
    assert "\x1b" not in ended.printed
    assert "\x07" not in ended.printed


def test_a_corrected_command_takes_the_name_of_one_that_could_not_run(tmp_path: Path) -> None:
    assert train(1, tmp_path, "evaluate.metric=accuracy").codes == [2]
    ended = train(1, tmp_path, "evaluate.metric=mae", "optimizer.lr=0.02", "steps=2")
    assert ended.codes == [0], ended.printed
    ended = train(1, tmp_path, "evaluate.metric=mae", "optimizer.lr=0.03", "steps=2")
    assert ended.codes == [2]
    assert "was started with another config" in ended.printed


def test_what_does_not_decay_and_what_is_not_trained_stands_in_the_first_lines(tmp_path: Path) -> None:
    ended = train(1, tmp_path, PREVIEWS, "task._target_=support.preview_tasks.Frozen", "steps=1", "log.progress=lines")
    assert ended.codes == [0], ended.printed
    facts = {line[:15].strip(): line[15:] for line in ended.printed.splitlines()}
    assert facts["parameters"] == "115, 61 of them trained"
    assert facts["weight decay"].endswith("; none for *.norm.weight, *.bias")


def test_progress_names_the_metric_that_the_run_goes_by(tmp_path: Path) -> None:
    assert train(1, tmp_path, "evaluate.metric=mae").codes == [0]
    progress = folder(tmp_path).facts("progress.json")
    assert progress["metric"] == "mae"
    assert progress["metrics"]["mae"] != progress["metrics"]["loss"]


def test_tensorboard_has_each_step_of_a_killed_run_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = train(1, tmp_path, "log.tensorboard=true", before=lambda rank: kill_points.in_step(7))
    assert killed.codes == [-9]
    assert train(2, tmp_path, "log.tensorboard=true").codes == [0, 0]
    events = EventAccumulator(str(tmp_path / "toy" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))
    assert [event.step for event in events.Scalars("evaluate/mae")] == [6, 12]
    assert not {"train/time", "train/unit", "evaluate/time"} & set(events.Tags()["scalars"])


def test_figures_of_a_node_survive_a_kill_and_the_next_attempt_has_its_own(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, figures = folder(tmp_path), "nodes/0000.jsonl"

    def in_step_7(attempt: int, dies: bool) -> Callable[[int], None]:
        """Wait there for a record of the node; the training record of a later step then has its figures."""

        def sprung(update: Update, *_: object) -> bool:
            if update.state.progress.step + 1 != 7:
                return False
            until(lambda: any(run.lines(attempt, figures)))
            return dies

        return lambda rank: kill_points.before(Update, "__call__", sprung)

    asked = ("log.node_every_s=0.1", "log.tensorboard=true")
    assert train(1, tmp_path, *asked, before=in_step_7(1, dies=True)).codes == [-9]
    assert train(2, tmp_path, *asked, before=in_step_7(2, dies=False)).codes == [0, 0]
    for attempt in (1, 2):
        assert all(0 <= record["cpu_percent"] <= 100 for record in run.lines(attempt, figures))
        assert run.storage.names(f"attempts/{attempt:04d}/nodes") == ["0000.jsonl"]  # one process of each node writes
    events = EventAccumulator(str(tmp_path / "toy" / "tensorboard")).Reload()
    steps = [event.step for event in events.Scalars("node/cpu_percent")]
    assert steps[:-1] == sorted(set(steps[:-1]))  # a sample may come between the last record and the end
    assert steps[-1] >= 7
