"""Records of a run folder from elsewhere: one odd run is its own line, and costs no time and no memory."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from everstep import frozen_yaml
from everstep.config import RunConfig
from everstep.errors import ConfigError, EverstepError
from everstep.frozen_config import freeze, thaw
from everstep.launch.cli.ls import ls
from everstep.launch.config import job_config
from everstep.launch.config.failure_patterns import is_nested, known_causes
from everstep.launch.job_start import cause_search
from everstep.launch.job_start.cause_search import search, search_in_time
from everstep.launch.job_start.output_capture import find_cause
from everstep.launch.submit.job_spec import read_job
from everstep.launch.sweep.plan import load
from everstep.launch.sweep.sweep_folder import SWEEP, SweepFolder
from everstep.run_folder import RunFolder

CLAIM = {"time": 1.7e9, "host": "elsewhere", "pid": 5, "world": 1}
ODD: dict[str, tuple[str, Any]] = {
    "a time of text": ("attempts/0001/claim.json", {**CLAIM, "time": "x"}),
    "a time that is NaN": ("attempts/0001/claim.json", {**CLAIM, "time": float("nan")}),
    "a time of 400 digits": ("attempts/0001/claim.json", {**CLAIM, "time": 10**400}),
    "a process of text": ("attempts/0001/claim.json", {**CLAIM, "pid": "x"}),
    "a host that is a list": ("attempts/0001/claim.json", {**CLAIM, "host": ["a"]}),
    "hosts that are a number": ("starts/0001/start.json", {"time": 1.7e9, "hosts": 5}),
    "a handle that is a number": ("submissions/0001.handle.json", {"handle": 5}),
    "a handle of no scheduler": ("submissions/0001.handle.json", {"handle": "what://ever/1"}),
    "a step of text": ("progress.json", {"step": "x", "time": 1.7e9}),
    "a rate of text": ("progress.json", {"steps_per_s": "x", "eta_s": [], "time": 1.7e9}),
    "an eta that is NaN": ("progress.json", {"eta_s": float("nan"), "time": 1.7e9}),
    "metrics that are a list": ("progress.json", {"metrics": [1], "metric": "a"}),
    "a decision of text": ("restarts/0001.json", {"time": "now", "go_on": "yes"}),
}


def run_in(root: Path, name: str) -> Path:
    folder = root / name
    (folder / "attempts" / "0001").mkdir(parents=True)
    (folder / "config.yaml").write_text(freeze(RunConfig(run=name)))
    (folder / "attempts" / "0001" / "claim.json").write_text(json.dumps(CLAIM))
    return folder


def listed(root: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    """Names of the listed runs, and the lines about others."""
    assert ls([str(root), "--json"]) == 0
    said = capsys.readouterr()
    names = [each["run"] for each in json.loads(said.out)]
    assert ls([str(root)]) == 0
    capsys.readouterr()
    return names, said.err.splitlines()


@pytest.mark.parametrize("what", ODD)
def test_one_odd_run_is_its_own_line_of_ls_and_the_others_are_listed(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_in(tmp_path, "first")
    path, record = ODD[what]
    odd = run_in(tmp_path, "odd") / path
    odd.parent.mkdir(parents=True, exist_ok=True)
    odd.write_text(json.dumps(record))
    run_in(tmp_path, "last")
    names, said = listed(tmp_path, capsys)
    assert {"first", "last"} <= set(names)
    assert ("odd" in names) == (said == [])
    assert all(line.startswith(f"everstep: left out: {tmp_path}/odd") or "what://" in line for line in said)
    assert len(said) <= 1


def test_a_folder_of_runs_with_a_damaged_run_alone_holds_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_in(tmp_path, "odd") / "attempts/0001/claim.json").write_text(json.dumps({**CLAIM, "time": "x"}))
    assert ls([str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"everstep: left out: {tmp_path}/odd: ")
    assert said.err.count("\n") == 1


def test_brackets_without_end_a_fifo_a_link_and_a_huge_record_are_lines_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("brackets", "fifo", "good", "huge", "link"):
        run_in(tmp_path, name)
    claims = {name: tmp_path / name / "attempts" / "0001" / "claim.json" for name in os.listdir(tmp_path)}
    claims["brackets"].write_text("[" * 200_000)
    claims["fifo"].unlink()
    os.mkfifo(claims["fifo"])
    with claims["huge"].open("wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "link" / "attempts" / "0002").symlink_to(tmp_path / "good")
    names, said = listed(tmp_path, capsys)
    assert "good" in names
    assert not {"fifo", "link"} & set(names)
    assert len(said) == 2


# ----------------------------------------------------------------------------------------------------------- YAML


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


YAML = {
    "a billion items of nine lines": bomb(9),
    "an anchor without an alias": "model: &m {a: 1}",
    "brackets": "model: " + "[" * 3000 + "]" * 3000,
    "brackets that never close": "model: " + "[" * 100_000,
    "indentation": "\n".join("  " * n + "a:" for n in range(500)),
    "a tag": "model: !!python/object/apply:os.system ['true']",
    "a tag of ours": "model: !mine 3",
    "more than 1 MB": "model: '" + "x" * (1 << 20) + "'",
    "an integer of 10^5 digits": "steps: " + "9" * 100_000,
    "a date that is none": "model: 2020-99-99",
}


@pytest.mark.parametrize("what", YAML)
def test_yaml_that_everstep_does_not_write_is_refused_at_once_in_every_file(tmp_path: Path, what: str) -> None:
    folder = RunFolder(str(tmp_path))
    for name in ("job.yaml", SWEEP):
        (tmp_path / name).write_text(YAML[what])
    began = time.process_time()
    for read in (lambda: thaw(YAML[what]), lambda: read_job(folder), lambda: load(SweepFolder(str(tmp_path)))):
        with pytest.raises(EverstepError) as refused:
            read()
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 1000
    assert time.process_time() - began < 10


def test_what_is_written_is_read_and_what_could_not_be_is_not_written() -> None:
    run = RunConfig(model={"_target_": "a.B", "same": [[1, 2]] * 3, "text": "a\nb: &c *d !e"})
    assert thaw(freeze(run)) == run
    with pytest.raises(ConfigError, match=r"the config has \d+ bytes \(limit 1048576\)"):
        freeze(RunConfig(model={"_target_": "a.B", "list": list(range(200_000))}))
    shared = ["x"]
    assert frozen_yaml.read(frozen_yaml.dump({"a": shared, "b": shared}), "it") == {"a": ["x"], "b": ["x"]}


# -------------------------------------------------------------------------------------------------- failure patterns


@pytest.mark.parametrize("pattern", ["(a+)+$", "(?:a*)*b", "(.*,)*x", "((ab)+c?)+", "(a+?)+", "(?:x+x+)+y"])
def test_a_pattern_that_repeats_what_repeats_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="a repeat within a repeat"):
        job_config({"causes": {"mine": {"match": pattern}}})


@pytest.mark.parametrize("pattern", ["a.*b.*c", r"(?:\[\w+\] )?x", r"(\d{1,3}\.){3}\d+", "(?:ab|cd)+", "(a|b)*c"])
def test_usual_patterns_are_taken(pattern: str) -> None:
    assert not is_nested(pattern)
    assert job_config({"causes": {"mine": {"match": pattern}}}).causes["mine"] is not None


def test_our_own_patterns_take_no_time_on_the_longest_lines() -> None:
    patterns = {name: cause.match for name, cause in known_causes().items()}
    lines = [text * 2000 for text in ("[", "error: rank 1", "DataLoader worker ", "NVRM: Xid ", "a", " ", "1", "]: ")]
    began = time.process_time()
    assert search(patterns, lines * 10)[0] is None
    assert time.process_time() - began < 5
    assert not any(map(is_nested, patterns.values()))


def test_a_pattern_that_takes_too_long_counts_as_no_match(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cause_search, "SEARCH_S", 0.5)
    slow = {"slow": "(?:a|a|a)*b", "mine": "needle"}
    assert search_in_time(slow, ["a" * 2000, "a needle"]) == ("mine", "a needle")
    assert "job.causes.slow.match" in capsys.readouterr().err


def test_causes_of_a_job_are_found_before_the_built_in_ones_and_cut_alike() -> None:
    causes = job_config({"causes": {"mine": {"match": "ECC error on rail"}}}).all_causes()
    line = "uncorrectable ECC error; ECC error on rail 7" + "x" * 5000
    assert find_cause(causes, ["before", line]) == ("mine", line[:500])
    assert find_cause(causes, ["x" * 2000 + "ECC error on rail"]) == (None, "")
