"""`everstep doctor` of this machine: each check is ok, warn or fail, with what to do."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from everstep.launch.finding import Finding
from everstep.launch.node import checks, machine
from support import TESTS


def shown(findings: object) -> list[str]:
    return [str(finding) for finding in findings]  # type: ignore[attr-defined]


def test_the_doctor_of_this_machine_looks_at_all_and_leaves_nothing(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "everstep.launch", "doctor", "--json", "run_root=runs"]
    env = {
        **os.environ,
        "PYTHONPATH": str(TESTS.parent),
        "WANDB_MODE": "offline",
        "EVERSTEP_CACHE": str(tmp_path / "c"),
    }
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    found = {finding["about"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    assert set(found) >= {
        "versions",
        "capacity",
        "open files",
        "/dev/shm",
        "address",
        "run_root",
        "cache",
        "all-reduce",
    }
    assert found["all-reduce"]["state"] == "ok"
    assert "GB/s between two processes over gloo" in found["all-reduce"]["text"]
    assert list(tmp_path.iterdir()) == []


def test_a_low_limit_of_open_files_fails_here_and_on_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    (files, *_) = machine.limits()
    assert files.fine is False
    assert "a process may open 1024 files; raise it to 4096" in files.text
    with pytest.raises(checks.BadNode, match="may open 1024 files"):
        checks.open_files()


def test_variables_of_another_start_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert any(
        line.startswith("warn  environment  WORLD_SIZE, MASTER_ADDR set in this shell")
        for line in shown(machine.names(None))
    )


def test_an_interface_that_is_not_there_fails() -> None:
    (found,) = [each for each in machine.names("ib9") if each.about == "address"]
    assert found.fine is False
    assert "change job.interface" in found.text


def test_a_run_root_that_cannot_be_written_fails_and_says_what_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    (found,) = machine.run_folder(str(tmp_path / "file/runs"))
    assert found.fine is False
    assert "choose another run_root" in found.text


def test_a_clock_that_differs_from_the_file_servers_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = machine.time.time()
    monkeypatch.setattr(machine.time, "time", lambda: began - 60)
    found = {each.about: each for each in machine.run_folder(str(tmp_path / "runs"))}
    assert found["clock"].fine is None
    assert "clock is +60 s from this machine's" in found["clock"].text


def test_wandb_that_cannot_be_reached_is_a_warning_without_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "secret" * 7)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (found,) = machine.wandb()
    assert found.fine is None
    assert "log.wandb.mode=offline" in found.text
    assert "secret" not in found.text


def test_torch_without_the_gpus_of_the_driver_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: 8)
    facts = {"torch": "2.13.0+cpu", "devices": 0, "name": "", "backend": "gloo", "gb_per_s": 1.0}
    devices, reduce = machine._linked(facts)
    assert devices == Finding(
        "devices", "the driver lists 8 GPUs and torch 2.13.0+cpu sees none; install a torch built for CUDA", False
    )
    assert reduce.fine


def test_a_group_that_cannot_be_formed_fails_with_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no route to host\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    (found,) = machine.link(machine.JobConfig())
    assert (found.fine, "no route to host" in found.text) == (False, True)
