"""The verbs beside training, from the command line as a user types them."""

from __future__ import annotations

from pathlib import Path

import pytest

from everstep.trainer.command import verb


def test_check_builds_the_parts_of_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(["check", "experiment=digits", "model.width=32"]) == 0
    assert "parameters" in capsys.readouterr().out


def test_check_takes_options_between_overrides(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    assert verb(["check", "experiment=digits", "--config-dir", str(tmp_path), "steps=3"]) == 0


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["check", "experiment=digits", "model.widht=3"], "did you mean 'width'"),
        (["check", "experiment=digits", "optimizer.lr=-1"], "optimizer (torch.optim.AdamW)"),
        (["checkpoint", "ls", "nowhere"], "nowhere holds no checkpoint"),
        (["checkpoint", "diff", "one", "other"], "no checkpoint that can be read"),
        (["data", "inspect", "nowhere"], "is no dataset"),
        (["data", "verify", "nowhere"], "is no dataset"),
        (["data", "prepare", "src=nowhere", "dst=D"], "src=nowhere matches no file"),
        (["data", "prepare", "src=nowhere", "dst=D", "blok=3"], "no key 'blok'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    typed: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert verb(typed) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_data_is_prepared_inspected_and_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"text {number} " * 50)
    dst = str(tmp_path / "set")
    words = [f"src={tmp_path}/*.txt", f"dst={dst}", "format=files", "tokenizer=bytes", "pack=16", "validation=0.3"]
    assert verb(["data", "prepare", *words]) == 0
    assert verb(["data", "inspect", f"{dst}/train"]) == 0
    assert verb(["data", "verify", dst]) == 0
    printed = capsys.readouterr().out
    assert "tokens uint8[17]" in printed
    assert "is whole: 2 shards" in printed or "is whole: 4 shards" in printed
    assert verb(["data", "prepare", *words]) == 0
    assert "nothing is left to do" in capsys.readouterr().err
    assert verb(["data", "prepare", *words, "shard_mib=3"]) == 2
    assert "is a dataset already" in capsys.readouterr().err
