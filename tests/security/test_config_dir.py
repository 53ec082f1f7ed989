"""A folder of configs counts as the user's word only if it is the user's alone (1.12)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from everstep.compose import compose, compose_job
from everstep.config import RunConfig
from everstep.errors import ConfigError
from everstep.launch.__main__ import main
from everstep.launch.submit.override_frozen import amend
from everstep.security.config_trust import reason_for_distrust
from support.other_user import UID, needs_root

NICE = """# @package _global_
defaults:
  - /experiment/breast_cancer
plugins: [posix]
hooks:
  - {_target_: posix.system, command: touch MARK, _partial_: true}
job:
  setup: [touch MARK]
  nodes: 2
  env: {PYTHONPATH: /evil, SAID: "1"}
"""


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose experiment brings a package, a hook, a line of shell and a variable."""
    folder = tmp_path / "conf"
    (folder / "experiment").mkdir(parents=True)
    (folder / "job").mkdir()
    (folder / "experiment" / "nice.yaml").write_text(NICE)
    (folder / "job" / "site.yaml").write_text("scheduler: slurm\nflags: [--export=LD_PRELOAD]\n")
    monkeypatch.chdir(tmp_path)
    return folder


def give_away(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, UID, UID)


def test_a_folder_of_this_user_counts_as_its_word(conf: Path) -> None:
    assert reason_for_distrust(conf) is None
    assert compose(["experiment=nice"], [str(conf)]).run.plugins == ["posix"]


@pytest.mark.parametrize("path", ["", "experiment", "experiment/nice.yaml", "job/site.yaml"])
@pytest.mark.parametrize("mode", [0o002, 0o020])
def test_one_file_or_folder_that_others_may_write_makes_it_a_strangers(
    conf: Path, path: str, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everstep.security.ownership._is_group_of_one", lambda gid: False)
    (conf / path).chmod((conf / path).stat().st_mode | mode)
    with pytest.raises(ConfigError, match=r"can be written by .* and it would run plugins=\[posix\]; job\.setup="):
        compose(["experiment=nice"], [str(conf)])


def test_the_group_that_a_system_makes_for_each_user_is_no_other_user(
    conf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (conf / "experiment").chmod(0o775)
    if os.getuid() == 0:
        assert reason_for_distrust(conf) is None  # root, of the group root
    monkeypatch.setattr("grp.getgrgid", lambda gid: type("Group", (), {"gr_name": "staff", "gr_mem": []}))
    assert "can be written by its group" in str(reason_for_distrust(conf))


def test_a_link_to_a_folder_elsewhere_makes_it_a_strangers(conf: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (conf / "model").symlink_to(tmp_path / "other")
    assert "is a link to another folder" in str(reason_for_distrust(conf))


@needs_root
@pytest.mark.parametrize("verb", ["check", "run", "submit job=slurm", "sweep seed=0,1", "run --cfg"])
def test_1_12_the_config_of_another_user_runs_nothing_by_itself_and_all_is_listed(
    conf: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    give_away(conf)
    assert main([*verb.split(), "--config-dir", str(conf), "experiment=nice", "run=r"]) == 2
    said = capsys.readouterr().err
    for part in ("plugins=[posix]", "job.setup=['touch MARK']", "job.env.PYTHONPATH=/evil", "on the command line"):
        assert part in said
    assert "job.nodes" not in said
    assert len(said.strip().splitlines()) == 1
    assert {path.name for path in conf.parent.iterdir()} == {"conf"}


@needs_root
def test_1_12_what_the_command_line_says_is_taken_and_the_rest_is_listed(conf: Path) -> None:
    give_away(conf)
    words = ["experiment=nice", "plugins=[posix]", "job.setup=[touch MARK]", "job.env.SAID='1'"]
    with pytest.raises(ConfigError, match=r"it would run job\.env\.PYTHONPATH=/evil; say"):
        compose(words, [str(conf)])
    composed = compose([*words, "job.env.PYTHONPATH=/evil"], [str(conf)])
    assert composed.job["nodes"] == 2
    with pytest.raises(ConfigError, match=r"job\.env\.PYTHONPATH=/evil"):  # Hydra merges it with the config's own
        compose([*words, "job.env={A:1}"], [str(conf)])


@needs_root
def test_1_12_a_config_of_another_user_that_makes_nothing_run_is_taken(conf: Path) -> None:
    (conf / "experiment" / "plain.yaml").write_text("# @package _global_\ndefaults: [/experiment/digits]\nsteps: 7\n")
    give_away(conf)
    assert compose(["experiment=plain", "job=slurm", "job.setup=[module load cuda]"], [str(conf)]).run.steps == 7


@needs_root
def test_1_12_a_job_of_another_users_folder_is_refused_on_a_resume_and_for_a_script(conf: Path) -> None:
    give_away(conf)
    with pytest.raises(ConfigError, match=r"it would run job\.flags=\['--export=LD_PRELOAD'\]"):
        compose_job(["job=site"], [str(conf)])
    with pytest.raises(ConfigError, match=r"it would run job\.flags=\['--export=LD_PRELOAD'\]"):
        amend(RunConfig(run="r"), {}, ["job=site"], [str(conf)])
    amend(RunConfig(run="r"), {}, ["job=slurm", "steps=3"], [str(conf)])


@needs_root
def test_1_12_the_sweep_of_another_user_reads_no_variable_and_names_no_package(
    conf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "PLANTED")
    (conf / "sweep").mkdir()
    (conf / "sweep" / "read.yaml").write_text('space: ["init_from=s3://x/${oc.env:AWS_SECRET_ACCESS_KEY},b"]\n')
    (conf / "sweep" / "code.yaml").write_text('space: ["seed=0,1"]\nconstraint: posix.system\n')
    give_away(conf)
    for sweep, said in (("read", "may hold no ${…}"), ("code", "its package is not in plugins")):
        words = ["sweep", "--dry-run", "--config-dir", str(conf), "experiment=digits", f"sweep={sweep}", "run=s"]
        assert main(words) == 2
        out, err = capsys.readouterr()
        assert said in err
        assert "PLANTED" not in out + err


@needs_root
@pytest.mark.parametrize("text", ["${oc.env:AWS_SECRET_ACCESS_KEY}", "${${word}.env:AWS_SECRET_ACCESS_KEY}"])
def test_1_12_a_config_of_another_user_reads_no_variable(
    conf: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "PLANTED")
    (conf / "experiment" / "read.yaml").write_text(
        "# @package _global_\ndefaults: [/experiment/digits]\nrun: oc\n"
        f"init_from: s3://x/{text.replace('word', 'run')}\n"
    )
    assert compose(["experiment=read"], [str(conf)]).run.init_from == "s3://x/PLANTED"  # the user's own
    give_away(conf)
    with pytest.raises(ConfigError, match=r"no config may read \$AWS_SECRET_ACCESS_KEY") as refused:
        compose(["experiment=read"], [str(conf)])
    assert "PLANTED" not in str(refused.value)
    (conf / "experiment" / "read.yaml").unlink()
    monkeypatch.setenv("WHERE", "/x")
    own = compose(["experiment=digits", "init_from='${oc.env:WHERE}'"])
    assert own.run.init_from == "/x"
