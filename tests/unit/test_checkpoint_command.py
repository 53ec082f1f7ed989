"""Checkpoints listed, verified and removed from the command line: on a disk and in a store."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest
from blake3 import blake3

from everstep.outcome import Ending, Outcome
from everstep.run_folder import MANIFEST, RunFolder
from everstep.trainer.checkpoint.manifest import SET_ASIDE, TENSORS, FileRecord, Manifest
from everstep.trainer.command import verb

SHARD = "rank-0000.tensors"


@pytest.fixture(params=["disk", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    """A run of one attempt with the checkpoints of steps 4, 8 and 12."""
    url = str(tmp_path / "run") if request.param == "disk" else f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}"
    run = RunFolder(url)
    run.claim({})
    for step in (4, 8, 12):
        commit(run, step)
    return run


def commit(run: RunFolder, step: int, attempt: int = 1, best_step: int = 0) -> str:
    path, files = run.checkpoint(step, attempt), {}
    for name, data in ((TENSORS, b"{}"), (SHARD, f"{step}".encode() * 1000)):
        run.storage.write(f"{path}/{name}", data)
        files[name] = FileRecord(len(data), blake3(data).hexdigest())
    record = Manifest(
        step=step, attempt=attempt, samples=step * 64, world=2, parallel="ddp", time=1e9, config_digest="c",
        data_digest="d", progress={"step": step, "best_step": best_step}, values={}, metric=0.25, files=files,
    )  # fmt: skip
    run.storage.write(f"{path}/{MANIFEST}", record.to_json())
    return path


def orphan(run: RunFolder, step: int, attempt: int) -> str:
    path = run.checkpoint(step, attempt)
    run.storage.write(f"{path}/{SHARD}", b"half")
    return path


def flip(run: RunFolder, step: int, name: str = SHARD) -> None:
    path = f"{run.checkpoint(step, 1)}/{name}"
    data = bytearray(run.storage.read(path))
    data[len(data) // 2] ^= 1
    run.storage.write(path, bytes(data))


def left(run: RunFolder) -> list[int]:
    return [int(name.split("-")[1]) for name in run.storage.names("checkpoints")]


# ------------------------------------------------------------------------------------------------------- verify


def test_every_whole_checkpoint_is_said_to_be_whole(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(["checkpoint", "verify", run.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [run.checkpoint(step, 1) for step in (12, 8, 4)]
    assert all(": whole, 2 files" in line for line in lines)


def test_each_bad_file_is_named_with_what_is_wrong(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run, 12)
    run.storage.delete(f"{run.checkpoint(8, 1)}/{SHARD}")
    run.storage.write(f"{run.checkpoint(8, 1)}/{TENSORS}", b"{} ")
    assert verb(["checkpoint", "verify", run.url]) == 1
    twelve, eight, four = capsys.readouterr().out.splitlines()
    assert twelve.endswith(f"{SHARD} does not match its BLAKE3")
    assert eight.endswith(f": {SHARD} is missing; {TENSORS} has 3 bytes, not 2")
    assert ": whole" in four


def test_a_damaged_manifest_and_one_of_another_version_are_not_whole(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run.storage.write(f"{run.checkpoint(12, 1)}/{MANIFEST}", b"{")
    tree = json.loads(run.storage.read(f"{run.checkpoint(8, 1)}/{MANIFEST}"))
    run.storage.write(f"{run.checkpoint(8, 1)}/{MANIFEST}", json.dumps({**tree, "format": 1}).encode())
    assert verb(["checkpoint", "verify", run.url]) == 1
    twelve, eight, _ = capsys.readouterr().out.splitlines()
    assert "manifest.json is damaged" in twelve
    assert "has format 1, this everstep reads format 3" in eight


def test_one_checkpoint_is_verified_alone(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run, 12)
    assert verb(["checkpoint", "verify", f"{run.url}/{run.checkpoint(8, 1)}"]) == 0
    assert verb(["checkpoint", "verify", f"{run.url}/{run.checkpoint(12, 1)}/"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_what_was_never_committed_is_no_checkpoint_to_verify(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    path = orphan(run, 16, 1)
    assert verb(["checkpoint", "verify", f"{run.url}/{path}"]) == 2
    assert "is not a checkpoint: it has no manifest" in capsys.readouterr().err
    assert verb(["checkpoint", "verify", run.url]) == 0


# ------------------------------------------------------------------------------------------------------------ ls


def test_the_list_says_who_wrote_what_and_what_does_not_count(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run.storage.move(f"{run.checkpoint(12, 1)}/{MANIFEST}", f"{run.checkpoint(12, 1)}/{SET_ASIDE}")
    orphan(run, 16, 1)
    run.claim({})
    run.record_restored(2, 4, 1)
    assert verb(["checkpoint", "ls", run.url]) == 0
    head, sixteen, twelve, eight, four = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "samples", "attempt", "by", "size", "world", "metric", "written", "digest", "state"]
    assert sixteen.split()[0] == "16"
    assert sixteen.split()[-1] == "orphan"
    assert twelve.split()[-2:] == ["set", "aside"]
    assert eight.split()[-1] == "superseded"
    host = json.loads(run.storage.read("attempts/0001/claim.json"))["host"]
    assert four.split()[:4] == ["4", "256", "1", host]
    digest = blake3(run.storage.read(f"{run.checkpoint(4, 1)}/{MANIFEST}")).hexdigest()
    assert four.split()[-2:] == [digest[:12], "committed"]


def test_the_best_is_marked_and_has_a_name(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(["checkpoint", "verify", f"{run.url}/best"]) == 2
    assert "no checkpoint with a held-out metric; set evaluate.every" in capsys.readouterr().err
    commit(run, 16, best_step=8)
    assert verb(["checkpoint", "ls", run.url]) == 0
    states = [line.split()[-2:] for line in capsys.readouterr().out.splitlines()[1:]]
    assert [state[-1] == "best" for state in states] == [False, False, True, False]
    assert verb(["checkpoint", "verify", f"{run.url}/best"]) == 0
    assert capsys.readouterr().out.startswith(f"{run.checkpoint(8, 1)}: whole")
    assert verb(["checkpoint", "rm", f"{run.url}/best"]) == 0
    assert left(run) == [4, 12, 16]
    assert verb(["checkpoint", "verify", f"{run.url}/best"]) == 2
    assert "the best was step 8, of which no checkpoint is left; set checkpoint.keep_best=1" in capsys.readouterr().err


def test_a_run_called_best_is_a_run(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "best"))
    run.claim({})
    commit(run, 4)
    assert verb(["checkpoint", "verify", run.url]) == 0


# ------------------------------------------------------------------------------------------------------------ rm


def test_a_dry_run_says_what_would_go_and_its_size_and_removes_nothing(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb(["checkpoint", "rm", run.url, "--older-than-step", "12", "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("/")[-1].split()[0] for line in printed[:2]] == [
        run.checkpoint(step, 1).split("/")[-1] for step in (8, 4)
    ]
    assert printed[-1] == "would remove 2 in all, 0.0 MiB"
    assert left(run) == [4, 8, 12]


def test_checkpoints_go_by_name_and_by_step(run: RunFolder) -> None:
    assert verb(["checkpoint", "rm", f"{run.url}/{run.checkpoint(8, 1)}"]) == 0
    assert left(run) == [4, 12]
    assert verb(["checkpoint", "rm", run.url, "--older-than-step", "12"]) == 0
    assert left(run) == [12]
    assert run.storage.names(run.checkpoint(8, 1)) == []


def test_the_newest_that_verifies_stays_unless_one_insists(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run, 12)
    names = [f"{run.url}/{run.checkpoint(step, 1)}" for step in (4, 8, 12)]
    assert verb(["checkpoint", "rm", *names]) == 2
    said = capsys.readouterr().err
    assert f"{run.checkpoint(8, 1)} is the newest checkpoint that verifies" in said
    assert said.count("\n") == 1
    assert left(run) == [4, 8, 12]
    assert verb(["checkpoint", "rm", names[2], names[0]]) == 0
    assert left(run) == [8]
    assert verb(["checkpoint", "rm", names[1], "--even-the-newest"]) == 0
    assert left(run) == []


def test_a_rule_keeps_the_newest_that_verifies_and_removes_the_others(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(run, 12)
    for dry in (["--dry-run"], []):
        assert verb(["checkpoint", "rm", run.url, "--older-than-step", "5000", *dry]) == 0
        kept, *removed, total = capsys.readouterr().out.splitlines()
        assert kept.startswith(f"kept {run.url}/{run.checkpoint(8, 1)}: the run goes on from it")
        assert [line.split("/")[-1].split()[0] for line in removed] == [
            run.checkpoint(step, 1).split("/")[-1] for step in (12, 4)
        ]
        assert "2 in all" in total
    assert left(run) == [8]
    assert verb(["checkpoint", "rm", run.url, "--older-than-step", "5000"]) == 0
    assert left(run) == [8]
    assert verb(["checkpoint", "rm", run.url, "--older-than-step", "5000", "--even-the-newest"]) == 0
    assert left(run) == []


def test_orphans_go_but_not_what_the_newest_attempt_may_be_writing(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    orphan(run, 6, 1)
    run.claim({})
    growing = orphan(run, 16, 2)
    assert verb(["checkpoint", "rm", run.url, "--orphans"]) == 0
    assert left(run) == [4, 8, 12, 16]
    assert verb(["checkpoint", "rm", f"{run.url}/{growing}"]) == 2
    assert "attempt 2 has not ended" in capsys.readouterr().err
    run.end(2, Ending(Outcome.crashed))
    assert verb(["checkpoint", "rm", run.url, "--orphans"]) == 0
    assert left(run) == [4, 8, 12]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (("",), "is no checkpoint: give RUN/checkpoints/"),
        (("/config.yaml",), "is no checkpoint"),
        (("/checkpoints",), "is no checkpoint"),
        (("/checkpoints/..",), "is no checkpoint"),
        (("/attempts/step-00000004-attempt-0001",), "is no checkpoint"),
        (("/checkpoints/step-00000005-attempt-0001",), "does not exist"),
        (("/checkpoints/step-00000004-attempt-0001", "/config.yaml"), "is no checkpoint"),
        (("", "", "--orphans"), "take one run, not 2"),
    ],
)
def test_only_a_runs_checkpoints_can_be_removed(
    run: RunFolder, capsys: pytest.CaptureFixture[str], what: tuple[str, ...], said: str
) -> None:
    run.storage.write("config.yaml", b"")
    assert verb(["checkpoint", "rm", *[word if word[:1] == "-" else run.url + word for word in what]]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
    assert left(run) == [4, 8, 12]
    assert run.storage.exists("config.yaml")


def test_a_folder_that_is_no_run_or_only_a_link_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = RunFolder(str(tmp_path / "elsewhere"))
    path = commit(elsewhere, 4)
    assert verb(["checkpoint", "rm", f"{elsewhere.url}/{path}", "--even-the-newest"]) == 2
    assert "is no run folder" in capsys.readouterr().err
    run = RunFolder(str(tmp_path / "run"))
    run.claim({})
    commit(run, 8)
    (tmp_path / "run" / path).symlink_to(tmp_path / "elsewhere" / path)
    assert verb(["checkpoint", "rm", f"{run.url}/{path}"]) == 2
    assert f"{path} is a link to {tmp_path}/elsewhere" in capsys.readouterr().err
    assert elsewhere.storage.exists(f"{path}/{MANIFEST}")


def test_the_manifest_goes_first(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[str] = []
    kind = type(run.storage)
    delete = kind.delete

    def watched(self: object, path: str) -> None:
        gone.append(path)
        delete(self, path)  # type: ignore[arg-type]

    monkeypatch.setattr(kind, "delete", watched)
    path = run.checkpoint(4, 1)
    assert verb(["checkpoint", "rm", f"{run.url}/{path}"]) == 0
    assert gone == [f"{path}/{MANIFEST}", path]
