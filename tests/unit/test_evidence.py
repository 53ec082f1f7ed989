"""Evidence of a run: one archive of its records, the same bytes each time, without secrets, and checked by itself."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from everstep.config import RunConfig
from everstep.frozen_config import freeze
from everstep.launch.__main__ import main
from everstep.run_folder import CONFIG, RunFolder

TOKEN = "ghp_" + "a" * 36


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run of two attempts with a checkpoint, an exclusion and a replay."""
    monkeypatch.chdir(tmp_path)
    folder = RunFolder("runs/mine")
    files: dict[str, object] = {
        "provenance.json": {"user": "ann", "code": {"commit": "abc", "changed": True, "diff": f"+token {TOKEN}"}},
        "data.json": {"sources": [{"place": "set", "digest": "d", "share": "1", "tags": {"license": "CC0"}}]},
        "attempts/0001/claim.json": {"host": "one", "world": 2, "time": 1.0},
        "attempts/0001/restored.json": {"step": 0},
        "attempts/0002/claim.json": {"host": "two", "world": 1, "time": 2.0},
        "attempts/0002/outcome.json": {"outcome": "done", "step": 12},
        "attempts/0002/metrics.jsonl": {"loss": 1.0},
        "checkpoints/step-00000012-attempt-0002/manifest.json": {"step": 12, "attempt": 2, "world": 1},
        "checkpoints/step-00000012-attempt-0002/__0_0.distcp": "tensors",
        "exclusions/0001.json": {"from_step": 5, "samples": [1]},
        "replays/0001.json": {"proved": True, "problems": []},
        "code/aa.tar.gz": "code",
    }
    folder.storage.write(CONFIG, freeze(RunConfig(run="mine")).encode())
    for path, content in files.items():
        folder.storage.write(path, json.dumps(content).encode())
    return folder


def names(path: str) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_archive_has_the_records_and_neither_tensors_nor_secrets(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evidence", "mine"]) == 0
    found = names("mine.evidence.zip")
    assert {"config.yaml", "attempts/0002/outcome.json", "exclusions/0001.json", "replays/0001.json"} <= found.keys()
    assert not [name for name in found if name.endswith((".distcp", ".tar.gz", "metrics.jsonl"))]
    assert TOKEN.encode() not in b"".join(found.values())
    assert list(json.loads(found["index.json"])["redacted"]) == ["provenance.json"]
    facts = json.loads(found["evidence.json"])
    assert [(each["attempt"], each["outcome"]) for each in facts["attempts"]] == [
        ("0001", "no outcome recorded"),
        ("0002", "done"),
    ]
    assert facts["data"][0]["tags"] == {"license": "CC0"}
    assert "license:CC0" in found["README.md"].decode()
    assert main(["evidence", "--verify", "mine.evidence.zip"]) == 0
    assert "is whole" in capsys.readouterr().out


def test_the_same_records_are_the_same_bytes_and_no_archive_is_overwritten(run: RunFolder) -> None:
    for name in ("a.zip", "b.zip"):
        assert main(["evidence", "runs/mine", "--out", name]) == 0
    assert Path("a.zip").read_bytes() == Path("b.zip").read_bytes()
    assert main(["evidence", "mine", "--out", "a.zip"]) == 2
    assert sorted(path.name for path in Path().iterdir()) == ["a.zip", "b.zip", "runs"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"replays/0001.json": b'{"proved": true, "problems": [1]}'}, "replays/0001.json has 33 bytes, not"),
        (
            {"exclusions/0001.json": b'{"from_step": 6, "samples": [1]}'},
            "exclusions/0001.json does not match its BLAKE3",
        ),
        ({"exclusions/0001.json": None}, "exclusions/0001.json is missing"),
        ({"more.json": b"{}"}, "more.json is not in the index"),
    ],
)
def test_what_was_changed_in_an_archive_is_named(
    run: RunFolder, capsys: pytest.CaptureFixture[str], change: dict[str, bytes | None], fault: str
) -> None:
    assert main(["evidence", "mine"]) == 0
    with zipfile.ZipFile("changed.zip", "w") as archive:
        for name, content in {**names("mine.evidence.zip"), **change}.items():
            if content is not None:
                archive.writestr(name, content)
    assert main(["evidence", "--verify", "changed.zip"]) == 1
    assert fault in capsys.readouterr().err


def test_a_flipped_bit_and_what_is_no_archive_are_one_line_each(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evidence", "mine"]) == 0
    data = bytearray(Path("mine.evidence.zip").read_bytes())
    data[data.index(b'"samples": [1]') + 12] ^= 1
    Path("flipped.zip").write_bytes(data)
    assert main(["evidence", "--verify", "flipped.zip"]) == 1
    assert capsys.readouterr().err == "flipped.zip: exclusions/0001.json does not match its BLAKE3\n"
    Path("other.zip").write_bytes(data[:300])
    for words in (["--verify", "other.zip"], ["--verify", "none.zip"], [], ["mine", "--verify", "a"], ["nobody"]):
        assert main(["evidence", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with zipfile.ZipFile("out.zip", "w") as archive:
        archive.writestr("index.json", json.dumps({"format": 1, "files": {"../x": {"bytes": 1, "blake3": "0" * 64}}}))
    assert main(["evidence", "--verify", "out.zip"]) == 2
    assert "leads out of the archive" in capsys.readouterr().err
