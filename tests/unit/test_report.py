"""`everstep report`: the same figures as `status --json` and the records, bounded in size, safe to open."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from everstep.launch.__main__ import main
from everstep.launch.report.curves import BUCKETS, reduced
from everstep.launch.report.facts import collect
from everstep.launch.report.page import page
from everstep.launch.report.text import clean
from everstep.run_folder import METRICS, RunFolder
from support.run_records import Records

RECORDED = Path(__file__).parents[1] / "recorded" / "run-killed-twice"
"""Records of a run of two processes, whose rank 0 was killed twice."""


@pytest.fixture
def killed_twice(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RECORDED, tmp_path / "killed_twice"))


def facts_of(run: Path | str) -> dict[str, Any]:
    return dict(clean(collect(RunFolder(str(run)))))


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(argv) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_the_figures_of_a_report_are_those_of_status(killed_twice: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = printed(capsys, "status", str(killed_twice), "--json")
    told = printed(capsys, "report", str(killed_twice), "--json")["status"]
    assert {**told, "age_s": 0} == {**status, "age_s": 0}
    figures = {each["name"]: each["value"] for each in facts_of(killed_twice)["figures"]}
    assert figures["state"] == "done"
    assert figures["steps"] == f"{status['step']:,}"
    assert figures["goodput"] == f"{status['goodput']['fraction']:.1%}"
    assert figures["steps replayed"] == f"{status['goodput']['replayed_steps']:,}" != "0"


def test_the_sentence_tells_state_restarts_and_the_best_metric(killed_twice: Path) -> None:
    records = [
        json.loads(line) for path in sorted(killed_twice.glob("attempts/*/metrics.jsonl")) for line in path.open()
    ]
    best = max((each["accuracy"], -each["step"]) for each in records if each["kind"] == "evaluate")
    said = facts_of(killed_twice)["sentence"]
    assert said.startswith("Done at step 1,500 in ")
    assert "started again twice: 2 × rank 0 was killed by SIGKILL" in said
    assert f"best accuracy {best[0]:.4g} at step {-best[1]:,}" in said


def test_curves_hold_the_last_record_of_each_step_and_replayed_steps_apart(killed_twice: Path) -> None:
    last: dict[int, float] = {}
    before: list[tuple[int, float]] = []
    for path in sorted(killed_twice.glob("attempts/*/metrics.jsonl")):
        for record in map(json.loads, path.open()):
            if record["kind"] == "train":
                before += [(record["step"], last[record["step"]])] if record["step"] in last else []
                last[record["step"]] = record["loss"]
    [train] = [each for chart in facts_of(killed_twice)["curves"]["charts"] if chart["name"] == "loss"
               for each in chart["curves"] if each["source"] == "train"]  # fmt: skip
    assert [step for step, _ in train["points"]] == sorted(last)
    assert [value for _, value in train["points"]] == pytest.approx([last[step] for step in sorted(last)], rel=1e-5)
    assert [step for step, _ in train["replayed"]] == [step for step, _ in sorted(before)]
    assert before
    assert train["count"] == len(last)


def test_the_time_line_covers_each_second_once_and_sums_to_the_goodput(killed_twice: Path) -> None:
    facts = facts_of(killed_twice)
    bars, parts = facts["timeline"]["bars"], facts["status"]["goodput"]["parts_s"]
    pauses = ("checkpoint", "evaluation", "stalled")
    whole = sorted((each for each in bars if each["part"] not in pauses), key=lambda each: each["since"])
    assert all(one["until"] == other["since"] for one, other in itertools.pairwise(whole))
    assert whole[-1]["until"] - whole[0]["since"] == pytest.approx(facts["status"]["goodput"]["wall_s"], abs=0.1)
    for part in ("start", "replayed", "down"):
        told = sum(each["until"] - each["since"] for each in whole if each["part"] == part)
        assert told == pytest.approx(parts[part], abs=0.02), part
    assert [each["outcome"] for each in facts["timeline"]["attempts"]] == ["crashed", "crashed", "done"]
    assert {each["attempt"] for each in bars if each["part"] == "start"} == {1, 2, 3}
    assert facts["timeline"]["rows"][0] == "n01"


def test_each_checkpoint_says_why_it_is_kept(killed_twice: Path) -> None:
    kept = {each["step"]: each["why"] for each in facts_of(killed_twice)["checkpoints"]}
    assert kept == {1500: "the newest", 1350: "one of the 2 newest, the best"}


def test_a_lost_node_and_a_rollback_are_told(tmp_path: Path) -> None:
    records = Records(str(tmp_path / "r"), ago_s=5000)
    records.attempt(1, 0, host="n07")
    records.events(1, (10, "first_step", {"step": 1}))
    records.steps(1, (500, 490), (1000, 990))
    records.decide(1, 1100, True, "node n07 lost; starting again")
    records.attempt(2, 1500, host="n08", restored=400)
    records.events(2, (1510, "first_step", {"step": 401}), (1550, "saved", {"step": 490, "seconds": 30.0}))
    records.steps(2, (1600, 490), (2100, 990), (2200, 1000))
    records.end(2, 2200, "done", 1000)
    facts = facts_of(tmp_path / "r")
    assert "started again once: node n07 lost" in facts["sentence"]
    assert facts["status"]["goodput"]["replayed_steps"] == 590
    assert facts["curves"]["marks"] == {"saved": [490], "evaluated": [], "restarted": [400]}
    assert facts["timeline"]["rows"] == ["n07", "n08", "no node"]
    [down] = [each for each in facts["timeline"]["bars"] if each["part"] == "down"]
    assert (down["row"], down["until"] - down["since"]) == (2, pytest.approx(500))
    assert facts["advice"][0]["do"].startswith("Save more often: ")
    assert "26." in facts["advice"][0]["because"]


def test_nan_is_a_gap_that_is_counted_and_told(tmp_path: Path) -> None:
    records = Records(str(tmp_path / "r"))
    records.attempt(1, 0)
    records.write(records.folder.attempt(1, METRICS), *(
        {"kind": "train", "step": step, "time": records.began + step, "loss": math.nan if step in (4, 5) else 1.0}
        for step in range(1, 9)))  # fmt: skip
    records.end(1, 9, "diverged", 8, "3 steps gave NaN")
    facts = facts_of(tmp_path / "r")
    [curve] = facts["curves"]["charts"][0]["curves"]
    assert (curve["nonfinite"], curve["nonfinite_steps"], len(curve["points"])) == (2, [4, 5], 6)
    assert "train loss was NaN or Inf in 2 of 8 records, first at step 4" in [e["because"] for e in facts["advice"]]
    assert "NaN" not in json.dumps(facts, allow_nan=False).replace("NaN or Inf", "").replace("gave NaN", "")


def test_advice_of_a_failed_run_names_the_reason_and_at_most_three_lines(tmp_path: Path) -> None:
    records = Records(str(tmp_path / "r"))
    records.attempt(1, 0)
    records.steps(1, (400, 100), (800, 200), data_wait=0.9, rate=0.25)
    records.end(1, 900, "crashed", 200, "ValueError: boom")
    told = facts_of(tmp_path / "r")["advice"]
    assert len(told) <= 3
    assert "boom" in told[0]["because"]
    assert any("loader.workers" in each["do"] and "data wait" in each["because"] for each in told)


def test_fewer_points_keep_the_ends_and_every_peak() -> None:
    points = [(step, 1.0) for step in range(100_000)]
    points[77_777] = (77_777, 9.0)
    points[33_333] = (33_333, -9.0)
    found = reduced(points, BUCKETS)
    assert len(found) <= 2 * BUCKETS + 2
    assert {(0, 1.0), (99_999, 1.0), (77_777, 9.0), (33_333, -9.0)} <= set(found)
    assert found == sorted(found)


def test_a_run_of_100_000_steps_and_20_attempts_is_less_than_2_mb(tmp_path: Path) -> None:
    records = Records(str(tmp_path / "r"), ago_s=200_000)
    for attempt in range(1, 21):
        first = (attempt - 1) * 5000
        records.attempt(attempt, first, restored=max(0, first - 200))
        at = range(max(1, first - 200), first + 5001)
        records.write(records.folder.attempt(attempt, METRICS), *(
            {"kind": "train", "step": n, "time": records.began + n, "loss": 1 / n, "lr": n * 1e-7,
             "norm": 1.0 + math.sin(n), "items": 64, "items_per_s": 1e4 + n % 977, "steps_per_s": 1.0,
             "data_wait": (n % 13) / 100, "memory_mb": 4e4 + n, "aux/a": math.cos(n)} for n in at))  # fmt: skip
        records.events(attempt, *((n, "saved", {"step": n, "seconds": 0.1}) for n in at if n % 100 == 0))
        records.end(attempt, first + 5000, "done" if attempt == 20 else "crashed", first + 5000, "killed")
    made = page(facts_of(tmp_path / "r"), "run.html.j2")
    assert len(made.encode()) < 2_000_000
    assert "100,000" in made


def test_markdown_has_at_most_60_lines_and_no_live_links(
    killed_twice: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decision = json.loads((killed_twice / "restarts" / "0003.json").read_text())
    hostile = {**decision, "reason": "<img src=x> [a](https://evil.test) @everyone | ![p](x)"}
    (killed_twice / "restarts" / "0003.json").write_text(json.dumps(hostile))
    assert main(["report", str(killed_twice), "--md"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 60
    assert "### Run killed\\_twice" in text
    assert "evil.test" in text
    assert not re.search(r"<img|(?<!\\)\]\(|://|@\w", text)


def test_the_report_goes_where_it_is_told_and_only_its_owner_reads_it(
    killed_twice: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(killed_twice)]) == 0
    written = tmp_path / "killed_twice.report.html"
    assert written.stat().st_mode & 0o077 == 0
    assert capsys.readouterr().out.startswith("killed_twice.report.html: Done at step 1,500")
    assert main(["report", str(killed_twice), "--out", str(tmp_path / "no" / "x.html")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_echarts_is_the_file_of_the_npm_package() -> None:
    import hashlib
    from importlib.resources import files

    vendor = files("everstep.launch.report").joinpath("vendor")
    digest = hashlib.sha256(vendor.joinpath("echarts.min.js").read_bytes()).hexdigest()
    assert f"SHA-256 of `echarts.min.js`: `{digest}`" in vendor.joinpath("README.md").read_text()


def test_against_another_run_shows_the_differences_that_compare_finds(
    killed_twice: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(RECORDED, tmp_path / "other"))
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("warmup_steps: 20", "warmup_steps: 7"))
    found = printed(capsys, "compare", str(killed_twice), str(other), "--json")
    told = printed(capsys, "report", str(killed_twice), "--against", str(other), "--json")["against"]
    assert told == found
    assert told["config"] == {"schedule.warmup_steps": [20, 7]}
    made = page(dict(clean(collect(RunFolder(str(killed_twice)), RunFolder(str(other))))), "run.html.j2")
    assert "<caption>config: what differs</caption>" in made
    assert "<p>code: the same</p>" in made
    assert main(["report", str(killed_twice), "--against", str(other), "--md"]) == 0
    text = capsys.readouterr().out
    assert "| config | schedule.warmup\\_steps | 20 | 7 |" in text
    assert len(text.splitlines()) <= 60


def test_a_sweep_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "sweep.yaml").write_text("{}")
    assert main(["report", str(tmp_path / "s")]) == 2
    assert "it is a sweep, and a report is of one run; give SWEEP/trials/NAME" in capsys.readouterr().err


@pytest.mark.parametrize("root", ["{tmp}", "memory://report/{name}"])
def test_a_run_that_has_not_begun_or_is_going_has_a_report_too(tmp_path: Path, root: str) -> None:
    records = Records(f"{root.format(tmp=tmp_path, name=tmp_path.name)}/r", ago_s=60)
    new = facts_of(records.folder.url)
    assert new["sentence"] == "New."
    assert "No training record is there yet" in page(new, "run.html.j2")
    records.attempt(1, 0)
    records.events(1, (5, "first_step", {"step": 1}))
    records.steps(1, (10, 5), (50, 45))
    records.progress(50, 45, 100, loss=1.0, steps_per_s=1.0)
    going = facts_of(records.folder.url)
    assert going["sentence"].startswith("Training at step 45 of 100 in 1 min")
    assert "<caption>Attempts, and why each ended</caption>" in page(going, "run.html.j2")


def test_damaged_records_are_one_line_and_no_page(killed_twice: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (killed_twice / "attempts" / "0002" / "claim.json").write_text('{"time": "yesterday"}')
    assert main(["report", str(killed_twice), "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "its records are not what everstep writes" in err
    assert len(err.splitlines()) == 1
