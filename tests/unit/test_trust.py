"""A run folder of another user runs nothing, and the user's own asks nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everstep import frozen_config
from everstep.config import RunConfig
from everstep.errors import ConfigError
from everstep.frozen_config import start_digest
from everstep.launch.config import JobConfig, job_config, job_yaml
from everstep.launch.restart.decide import main as decide
from everstep.launch.schedulers import base
from everstep.launch.schedulers.base import spec_digest
from everstep.launch.submit.array import list_digest, run_of
from everstep.launch.submit.job_spec import JobSpec
from everstep.launch.submit.trust import AUTHOR, Runnable, is_ours, refuse_foreign, sign, state_folder
from everstep.run_folder import RunFolder
from everstep.storage import open_storage

NOTHING = Runnable()
HOSTILE = {"env": {"PYTHONPATH": "/evil"}, "setup": ["touch x"], "flags": ["--export=ALL"], "python": "/evil/python"}


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return state_folder()


def folder(tmp_path: Path, **job: object) -> RunFolder:
    run = RunFolder(str(tmp_path / "run"))
    run.storage.write("job.yaml", job_yaml(job_config(job)).encode())
    return run


@pytest.mark.parametrize("key", HOSTILE)
def test_each_key_that_makes_something_run_is_named_and_refused(tmp_path: Path, key: str) -> None:
    run = folder(tmp_path, **{key: HOSTILE[key]})
    recorded = Runnable.of(job_config({key: HOSTILE[key]}))
    with pytest.raises(ConfigError, match=rf"would run job\.{key}") as refused:
        refuse_foreign(run.storage, recorded, recorded, NOTHING)
    assert "add --trust" in str(refused.value)
    refuse_foreign(run.storage, recorded, recorded, NOTHING, trusted=True)
    refuse_foreign(run.storage, recorded, recorded, said=recorded)
    sign(run.storage, recorded)
    refuse_foreign(run.storage, recorded, recorded, NOTHING)


def test_counts_limits_and_names_need_no_trust(tmp_path: Path) -> None:
    job = job_config({"nodes": 4, "nproc": 8, "time": "2h", "partition": "gpu", "max_restarts": 9, "grace_s": 5})
    assert Runnable.of(job).beyond(NOTHING) == []


def test_code_plugins_and_another_program_are_named() -> None:
    runs = Runnable.of(JobConfig(), ["posix"], "../evil", ["x.py"])
    assert runs.beyond(NOTHING) == ["its own code (../evil)", 'its own program (["x.py"])', "plugins=[posix]"]


def test_a_part_of_a_key_on_the_command_line_does_not_cover_the_rest() -> None:
    used = Runnable.of(job_config({"env": {"PYTHONPATH": "/evil", "A": "1"}}))
    assert used.beyond(Runnable.of(job_config({"env": {"A": "1"}}))) == ['job.env.PYTHONPATH="/evil"']


def test_what_is_signed_binds_the_content(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    sign(storage, Runnable.of(job_config({"setup": ["module load cuda"]}), ["mine"], "digest"))
    assert is_ours(storage, Runnable.of(job_config({"setup": ["module load cuda"]}), ["mine"], "digest"))
    for other in (["rm x"], ["module load cuda", "rm x"]):
        assert not is_ours(storage, Runnable.of(job_config({"setup": other}), ["mine"], "digest"))
    assert not is_ours(storage, Runnable(plugins=("mine", "posix")))
    assert not is_ours(storage, Runnable(code="other"))


def test_another_users_key_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, runs = open_storage(str(tmp_path / "run")), Runnable(code="digest")
    sign(storage, runs)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of another"))
    assert not is_ours(storage, runs)
    sign(storage, runs)
    assert is_ours(storage, runs)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert is_ours(storage, runs)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"code": 5}', '{"code": [5]}', '{"code": null}', "[" * 100_000])
def test_a_damaged_record_is_no_trust(tmp_path: Path, text: str) -> None:
    storage = open_storage(str(tmp_path))
    storage.write(AUTHOR, text.encode())
    assert not is_ours(storage, Runnable(code="digest"))


def test_the_key_is_the_users_alone_and_a_readable_one_is_refused(tmp_path: Path, state: Path) -> None:
    storage = open_storage(str(tmp_path))
    sign(storage, Runnable(code="digest"))
    assert ((state / "key").stat().st_mode & 0o777, state.stat().st_mode & 0o777) == (0o600, 0o700)
    assert list(state.iterdir()) == [state / "key"]
    (state / "key").chmod(0o644)
    with pytest.raises(ConfigError, match="has mode 644, which is open to others; remove it"):
        is_ours(storage, Runnable(code="digest"))


def test_a_state_folder_that_others_can_write_to_is_refused(tmp_path: Path, state: Path) -> None:
    state.mkdir(parents=True)
    state.chmod(0o777)
    with pytest.raises(ConfigError, match="can be written by every user, so others could make your key"):
        sign(open_storage(str(tmp_path)), Runnable(code="digest"))


def test_without_a_state_folder_a_run_starts_and_a_resume_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    storage = open_storage(str(tmp_path / "run"))
    sign(storage, Runnable(code="digest"))
    assert not storage.exists(AUTHOR)
    with pytest.raises(ConfigError, match="add --trust"):
        refuse_foreign(storage, Runnable(code="digest"), Runnable(code="digest"), NOTHING)


def submitted(tmp_path: Path, code: str | None = None) -> tuple[RunFolder, str]:
    """A run that was submitted, and the digest among the arguments of its job."""
    run = folder(tmp_path, scheduler="slurm", nproc=2, setup=["module load cuda"])
    argv = ["-m", "everstep.trainer", "--frozen", run.url]
    facts = {"scheduler": "slurm", "token": "t", "argv": argv, "code": code, "host": "h", "pid": 1, "time": 1.0}
    run.storage.write("submissions/0001.json", json.dumps(facts).encode())
    job = job_config({"scheduler": "slurm", "nproc": 2, "setup": ["module load cuda"]})
    return run, spec_digest(job, argv, code)


def test_nodes_run_what_was_submitted(tmp_path: Path) -> None:
    run, spec = submitted(tmp_path, "code")
    assert JobSpec.submitted(run, spec).code == "code"


@pytest.mark.parametrize("change", ["argv", "code", "job.yaml", "another submission"])
def test_nodes_refuse_a_folder_that_was_changed_after_the_submission(
    tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, spec = submitted(tmp_path)
    facts = json.loads(run.storage.read("submissions/0001.json"))
    if change == "job.yaml":
        run.storage.write("job.yaml", job_yaml(job_config({"env": {"LD_PRELOAD": "/evil.so"}})).encode())
    else:
        number = "0002" if change == "another submission" else "0001"
        evil = {"code": "evil"} if change == "code" else {"argv": ["evil.py"]}
        run.storage.write(f"submissions/{number}.json", json.dumps(facts | evil).encode())
    with pytest.raises(ConfigError, match="is not what was submitted"):
        JobSpec.submitted(run, spec)
    assert decide(["end", run.url, "1", "--code=0", "--spec", spec]) == 2
    assert "is not what was submitted" in capsys.readouterr().err
    assert not run.storage.names("starts")


def test_a_folder_started_by_hand_must_be_the_users_own(tmp_path: Path) -> None:
    run, _ = submitted(tmp_path, "code")
    with pytest.raises(ConfigError, match=r"would run job\.setup=.*its own code \(code\)"):
        JobSpec.submitted(run, None)
    sign(run.storage, Runnable.of(job_config({"setup": ["module load cuda"]}), code="code"))
    assert JobSpec.submitted(run, None).code == "code"


def test_a_list_of_runs_that_was_changed_is_refused(tmp_path: Path) -> None:
    text = b"/runs/a\tdigest-a\n/runs/b\tdigest-b\n"
    (tmp_path / "list").write_bytes(text)
    assert run_of(f"{tmp_path}/list", 1, list_digest(text)) == ("/runs/b", "digest-b")
    assert run_of(f"{tmp_path}/list", 1) == ("/runs/b", None)
    (tmp_path / "list").write_bytes(text.replace(b"/runs/b", b"/evil/b"))
    with pytest.raises(ConfigError, match="is not the list that was submitted"):
        run_of(f"{tmp_path}/list", 1, list_digest(text))


def test_a_later_version_with_more_keys_starts_what_was_queued_before(monkeypatch: pytest.MonkeyPatch) -> None:
    config, job = RunConfig(run="r", steps=7), job_config({"nproc": 2})
    before = (start_digest(config), spec_digest(job, ["x.py"], None))
    plain_run, plain_keys = frozen_config.plain, base.plain_job
    monkeypatch.setattr(frozen_config, "plain", lambda config: {**plain_run(config), "later": {"key": 1}})
    monkeypatch.setattr(base, "plain_job", lambda job: {**plain_keys(job), "later": 1})
    assert (start_digest(config), spec_digest(job, ["x.py"], None)) == before
    assert start_digest(RunConfig(run="r", steps=8)) != before[0]
