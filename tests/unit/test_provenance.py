"""What the run folder says about where a run came from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from everstep import provenance
from everstep.config import RunConfig
from everstep.run_folder import RunFolder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    git("init", "-q")
    git("remote", "add", "origin", "https://user:password@example.org/x.git")
    (tmp_path / "a.py").write_text("x = 1\n")
    git("add", "-A")
    git("commit", "-qm", "a")
    return tmp_path


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    code = provenance.code(str(checkout))
    assert code is not None
    assert len(code["commit"]) == 40
    assert code["changed"] is False


def test_the_same_change_has_the_same_digest(checkout: Path) -> None:
    clean = provenance.code(str(checkout))
    (checkout / "a.py").write_text("x = 2\n")
    changed, again = provenance.code(str(checkout)), provenance.code(str(checkout))
    assert clean is not None
    assert changed is not None
    assert changed == again
    assert clean["diff_sha256"] != changed["diff_sha256"]


def test_an_uncommitted_change_is_kept_in_full_unless_it_is_large(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "a.py").write_text("x = 2\n")
    code = provenance.code(str(checkout))
    assert code is not None
    assert "+x = 2" in code["diff"]
    monkeypatch.setattr(provenance, "LARGEST_DIFF", 10)
    large = provenance.code(str(checkout))
    assert large is not None
    assert "diff" not in large
    assert len(large["diff_sha256"]) == 64


def test_no_checkout_is_no_error(tmp_path: Path) -> None:
    assert provenance.code(str(tmp_path)) is None


def test_no_password_of_a_remote_is_copied(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    assert "password" not in json.dumps(provenance.facts(RunConfig(), ["everstep"]))


def test_a_run_that_goes_on_keeps_what_it_began_with(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    provenance.record(folder, RunConfig(), ["everstep", "run", "steps=1"])
    provenance.record(folder, RunConfig(), ["everstep", "run", "steps=2"])
    kept = json.loads(folder.storage.read("provenance.json"))
    assert kept["command"] == ["everstep", "run", "steps=1"]
    assert kept["packages"]["numpy"]
    assert kept["interpreter"] == sys.executable


def test_the_snapshot_of_the_code_is_named(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    provenance.record(folder, RunConfig(), ["everstep"], snapshot="abc")
    assert json.loads(folder.storage.read("provenance.json"))["snapshot"] == "abc"
