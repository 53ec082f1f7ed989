"""Who may write to a run's folder, and what stands in it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from everstep.errors import SupersededError
from everstep.outcome import Ending, Outcome
from everstep.run_folder import MANIFEST, STARTER, RunFolder, meant


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.of(str(tmp_path), "demo")


def test_starts_by_many_processes_get_numbers_of_their_own(folder: RunFolder) -> None:
    pids = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(max(RunFolder(folder.url).claim({}) for _ in range(3)) and 0)
            finally:
                os._exit(1)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 8
    assert folder.attempts() == list(range(1, 25))
    claims = [json.loads(folder.storage.read(folder.attempt(n, "claim.json"))) for n in folder.attempts()]
    assert [claim["attempt"] for claim in claims] == folder.attempts()
    assert sorted(claim["pid"] for claim in claims) == sorted(pids * 3)


def test_a_claim_says_who_started_it(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STARTER, "me")
    assert folder.starter(folder.claim({"world": 2})) == "me"
    monkeypatch.delenv(STARTER)
    assert folder.starter(folder.claim({})) is None
    assert folder.starter(99) is None


def test_an_older_attempt_may_not_commit_any_more(folder: RunFolder) -> None:
    first = folder.claim({})
    folder.check_newest(first)
    second = folder.claim({})
    folder.check_newest(second)
    with pytest.raises(SupersededError, match=r"attempt 2 has taken over .*demo; attempt 1 stops and commits nothing"):
        folder.check_newest(first)


def test_numbers_beyond_four_digits_are_still_in_order(folder: RunFolder) -> None:
    for number in (2, 9999, 10000):
        folder.storage.write(folder.attempt(number, "claim.json"), b"{}")
    folder.storage.write("attempts/notes.txt", b"")
    assert max(folder.attempts()) == 10000
    assert folder.claim({}) == 10001
    folder.end(10001, Ending(Outcome.done))
    assert folder.last_ending() == Ending(Outcome.done)


def test_the_first_word_on_how_an_attempt_ended_stands(folder: RunFolder) -> None:
    attempt = folder.claim({})
    assert folder.ending(attempt) is None
    cause = Ending(Outcome.out_of_memory, 7, "does not fit", 4)
    folder.end(attempt, cause)
    folder.end(attempt, Ending(Outcome.crashed, reason="a peer left"))
    assert folder.ending(attempt) == cause
    assert folder.last_ending() == cause


def test_a_run_has_never_trained_while_all_that_was_started_ended_before_its_first_step(folder: RunFolder) -> None:
    assert not folder.never_trained()  # another may be about to claim it
    first = folder.claim({})
    assert not folder.never_trained()  # it may be training
    folder.end(first, Ending(Outcome.config_error))
    assert folder.never_trained()
    folder.storage.write("submissions/0001.json", b'{"token": "t"}')
    assert not folder.never_trained()  # its job may be in the queue
    folder.storage.write("submissions/0001.json", b'{"token": "t", "time": 1.0}')
    folder.storage.write("submissions/0001.handle.json", b'{"handle": "slurm://c/1", "time": 1.0}')
    assert folder.never_trained()
    folder.end(folder.claim({}), Ending(Outcome.crashed, 3))
    assert not folder.never_trained()


def test_a_checkpoint_means_that_a_run_has_trained(folder: RunFolder) -> None:
    folder.end(folder.claim({}), Ending(Outcome.config_error))
    folder.storage.write(f"{folder.checkpoint(4, 1)}/{MANIFEST}", b"{}")
    assert not folder.never_trained()


def test_the_last_ending_is_the_newest_attempts_even_when_it_has_none(folder: RunFolder) -> None:
    assert folder.last_ending() is None
    folder.end(folder.claim({}), Ending(Outcome.done))
    folder.claim({})
    assert folder.last_ending() is None


@pytest.mark.parametrize(
    ("outcome", "code"),
    [("done", 0), ("preempted", 75), ("config_error", 2), ("diverged", 3), ("superseded", 4), ("crashed", 1),
     ("out_of_memory", 1), ("stalled", 1)],
)  # fmt: skip
def test_every_outcome_has_its_exit_code_and_reads_back(outcome: str, code: int) -> None:
    ending = Ending(Outcome(outcome), 5, "why", 2)
    assert ending.outcome.exit_code == code
    assert Ending.from_json(ending.to_json()) == ending


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"outcome": "odd"}', b'{"step": 1}', b'{"outcome":"done","x":1}'])
def test_an_ending_that_cannot_be_read_counts_as_none(folder: RunFolder, text: bytes) -> None:
    folder.storage.write(folder.attempt(folder.claim({}), "outcome.json"), text)
    assert folder.last_ending() is None


def test_a_run_has_come_as_far_as_an_attempt_went_on_from_though_nothing_lies_in_its_folder(folder: RunFolder) -> None:
    """Checkpoints on the nodes are progress too: a run that has them is not given up for making none."""
    assert folder.reached_step() == 0
    folder.record_restored(folder.claim({}), 0, 0)
    folder.record_restored(folder.claim({}), 90, 1)
    assert (folder.newest_step(), folder.reached_step()) == (None, 90)
    folder.storage.write(f"{folder.checkpoint(200, 2)}/{MANIFEST}", b"{}")
    assert folder.reached_step() == 200


def test_the_newest_step_is_that_of_a_committed_checkpoint(folder: RunFolder) -> None:
    assert folder.newest_step() is None
    for step, attempt, commit in ((4, 1, True), (8, 2, True), (10, 2, False)):
        folder.storage.write(f"{folder.checkpoint(step, attempt)}/{MANIFEST if commit else 'half'}", b"{}")
    assert folder.newest_step() == 8


def test_decisions_to_restart_are_kept_one_by_one(folder: RunFolder) -> None:
    for number in (1, 2, 3):
        folder.record_restart({"restarts": number})
    names = folder.storage.names("restarts")
    assert names == ["0001.json", "0002.json", "0003.json"]
    assert [json.loads(folder.storage.read(f"restarts/{name}"))["restarts"] for name in names] == [1, 2, 3]


def test_the_name_of_a_run_where_its_folder_is_asked_for_is_answered_with_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert meant("mine") == "; did you mean 'runs/mine'?"
    assert [meant(word) for word in ("other", "s3://bucket/mine", str(tmp_path), ".", "..", "runs/mine")] == [""] * 6
