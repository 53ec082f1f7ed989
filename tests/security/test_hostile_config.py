"""A config, a run folder or a sweep from elsewhere reads no variable, opens no other URL and names no code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from everstep.config import RunConfig
from everstep.errors import ConfigError
from everstep.frozen_config import freeze, thaw
from everstep.launch.__main__ import main
from everstep.launch.submit.job_spec import JobSpec
from everstep.launch.submit.override_frozen import amend
from everstep.launch.sweep.sweep_folder import RECORDS
from everstep.run_folder import RunFolder
from everstep.storage import LocalStorage, open_storage


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "PLANTED")
    return "PLANTED"


def test_a_frozen_config_reads_no_variable_of_the_environment(secret: str) -> None:
    tree = yaml.safe_load(freeze(RunConfig(run="r")))
    tree["init_from"] = "s3://host/${oc.env:AWS_SECRET_ACCESS_KEY}"
    with pytest.raises(ConfigError, match="has an interpolation") as refused:
        thaw(yaml.safe_dump(tree))
    assert secret not in str(refused.value)


def test_a_frozen_job_reads_no_variable_of_the_environment(tmp_path: Path, secret: str) -> None:
    folder = RunFolder(str(tmp_path))
    folder.storage.write("config.yaml", freeze(RunConfig(run="r")).encode())
    folder.storage.write("job.yaml", b"env: {A: '${oc.env:AWS_SECRET_ACCESS_KEY}'}\n")
    with pytest.raises(ConfigError, match="has an interpolation"):
        JobSpec.read(folder)
    assert main(["resume", str(tmp_path)]) == 2


def test_the_command_line_may_still_name_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/weights")
    changed, _ = amend(RunConfig(run="r"), {}, ["init_from='${oc.env:WHERE}'"])
    assert changed.init_from == "/weights"


@pytest.mark.parametrize(
    "url",
    [
        "reference://::file:///run/refs.json",
        "simplecache::s3://bucket/run",
        "http://169.254.169.254/latest",
        "https://host/x",
        "ssh://host/x",
        "github://a:b@c/x",
        "jupyter://host/x",
        "zip://x.zip::file:///y",
    ],
)
def test_other_schemes_and_chains_of_them_are_refused_and_ask_nobody(url: str) -> None:
    with pytest.raises(ConfigError, match=r"the scheme .* is not one of file, s3"):
        open_storage(url)


def test_a_scheme_may_be_allowed_on_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERSTEP_SCHEMES", "hdfs,dbfs")
    with pytest.raises(ConfigError):
        open_storage("http://host/x")
    assert isinstance(open_storage("file:///tmp"), LocalStorage)


SWEEP = ["sweep", "experiment=breast_cancer", "optimizer.lr=0.1,0.01", "steps=2", "run=sw", "--dry-run"]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep of this user's with two trials, as its driver froze it before any trial."""
    from everstep.launch.sweep.plan import plan, settle
    from everstep.launch.sweep.start import workers

    monkeypatch.chdir(tmp_path)
    made = settle(plan(SWEEP[1:-1]))
    workers(made)
    return tmp_path / "runs" / "sw"


def edit(sweep: Path, which: int, **keys: object) -> None:
    file = sweep / "sweep.yaml"
    tree = yaml.safe_load(file.read_text())
    base = tree["bases"][min(which, len(tree["bases"]) - 1)]
    if which >= len(tree["bases"]):
        base = {**base, "groups": {"model": "other"}}
        tree["bases"].append(base)
    base["config"] = yaml.safe_dump({**yaml.safe_load(base["config"]), **keys})
    file.write_text(yaml.safe_dump(tree))


@pytest.mark.parametrize("which", [0, 1])
def test_no_base_of_a_sweep_names_packages_by_itself(
    sweep: Path, which: int, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(
        sweep,
        which,
        plugins=["posix"],
        hooks=[{"_target_": "posix.system", "command": "touch MARK", "_partial_": True}],
    )
    assert main(["resume", str(sweep)]) == 2
    assert "would run plugins=[posix]" in capsys.readouterr().err


def test_a_package_that_a_sweep_does_not_use_is_refused(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(sweep, 0, plugins=["posix"])
    assert main(["resume", str(sweep), "plugins=[quickstart]"]) == 2
    assert "the sweep does not use this package (it uses posix)" in capsys.readouterr().err


def test_a_copy_of_a_sweep_asks_nothing_and_a_changed_job_is_named(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sweep, copy)
    tree = yaml.safe_load((copy / "sweep.yaml").read_text())
    tree["job"]["env"] = {"LD_PRELOAD": "/evil.so"}
    (copy / "sweep.yaml").write_text(yaml.safe_dump(tree))
    assert main(["resume", str(copy)]) == 2
    assert 'would run job.env.LD_PRELOAD="/evil.so"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"plugins": ["posix"]}, "packages of your own are the same"),
        ({"hooks": [{"_target_": "posix.system"}]}, "would add hooks"),
        ({"job.setup": ["touch MARK"]}, "a job is the same for all trials"),
        ({"job": {"setup": ["touch MARK"]}}, "a job is the same for all trials"),
    ],
)
def test_the_record_of_a_foreign_sweep_adds_no_code_to_a_run(
    sweep: Path, values: dict[str, object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"event": "asked", "identity": "i", "name": "t", "values": {"optimizer.lr": 0.1, **values}, "drawn": {}}
    told = {"event": "told", "trial": 0, "rung": 0, "verdict": "done", "values": [0.5], "step": 2}
    (sweep / RECORDS).mkdir(exist_ok=True)
    for number, record in enumerate((asked, told)):
        (sweep / RECORDS / f"{number:08d}.json").write_text(json.dumps(record))
    assert main(["run", "experiment=breast_cancer", "--from", f"{sweep}/t", "run=x"]) == 2
    assert said in capsys.readouterr().err
    assert not (sweep.parent / "x").exists()
