"""The registry: versions that never change, aliases of which one of two promoters moves each, and verified copies."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from everstep.errors import ConfigError, DataError
from everstep.launch.cli.registry import registry
from everstep.registry.registry import Registry


def export(folder: Path, text: str = "weights") -> Path:
    """A folder as everstep export writes one."""
    folder.mkdir()
    (folder / "model.pt2").write_text(text)
    (folder / "export.json").write_text(json.dumps({"format": "pt2", "file": "model.pt2", "step": 3}))
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Registry:
    """A registry with three versions of the model spam."""
    found = Registry(str(tmp_path / "models"))
    for number in (1, 2, 3):
        assert found.add("spam", export(tmp_path / f"export-{number}", f"weights {number}")).number == number
    return found


def test_a_version_keeps_files_and_facts_and_the_same_files_are_the_same_version(
    models: Registry, tmp_path: Path
) -> None:
    second = models.find("spam@2")
    assert (second.number, second.facts["step"], set(second.files)) == (2, 3, {"model.pt2", "export.json"})
    assert models.find("spam").number == 3
    assert models.add("spam", tmp_path / "export-2").number == 2
    assert models.versions("spam") == [1, 2, 3]
    assert models.models() == ["spam"]
    got = models.fetch(second, tmp_path / "got")
    assert (got / "model.pt2").read_text() == "weights 2"


def test_an_alias_moves_forward_and_back_and_keeps_its_history(models: Registry) -> None:
    for number, why in ((1, "first"), (2, "better"), (3, "best")):
        models.promote(models.version("spam", number), "prod", why)
    assert models.find("spam@prod").number == 3
    assert models.rollback("spam", "prod", "slow").version == 2
    assert models.rollback("spam", "prod").version == 1
    with pytest.raises(ConfigError, match="spam@prod: there is no version before 1"):
        models.rollback("spam", "prod")
    models.promote(models.version("spam", 3), "prod")
    assert models.rollback("spam", "prod").version == 1
    moves = [(move.version, move.kind, move.why) for move in models.history("spam", "prod")]
    assert moves[:4] == [
        (1, "promote", "first"),
        (2, "promote", "better"),
        (3, "promote", "best"),
        (2, "rollback", "slow"),
    ]
    assert len(moves) == 7


def test_of_many_promoters_at_once_exactly_one_makes_each_move(models: Registry) -> None:
    won: list[int] = []
    lost: list[str] = []
    gate = threading.Barrier(8)

    def promote(number: int) -> None:
        mine = Registry(models.url)
        version = mine.version("spam", number % 3 + 1)
        gate.wait()
        try:
            won.append(mine.promote(version, "prod").number)
        except ConfigError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=promote, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    history = models.history("spam", "prod")
    assert len(won) + len(lost) == 8
    assert sorted(set(won)) == [move.number for move in history]
    assert all("has just moved it to version" in line for line in lost)
    # A promotion to the version that the alias has already is no move, so it returns that of another thread.
    assert len(history) <= len(won)


def test_many_adders_at_once_get_numbers_of_their_own(tmp_path: Path) -> None:
    folders = [export(tmp_path / f"export-{number}", f"weights {number}") for number in range(6)]
    threads = [
        threading.Thread(target=lambda folder=folder: Registry(str(tmp_path / "models")).add("spam", folder))
        for folder in folders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    models = Registry(str(tmp_path / "models"))
    assert models.versions("spam") == [1, 2, 3, 4, 5, 6]
    assert len({models.version("spam", number).digest for number in range(1, 7)}) == 6


def test_a_file_that_was_changed_is_never_given_out(models: Registry, tmp_path: Path) -> None:
    version = models.find("spam@2")
    stored = tmp_path / "models/spam/files" / version.digest / "model.pt2"
    stored.write_text("weightz 2")
    with pytest.raises(DataError, match="is not the file that was added"):
        models.fetch(version, tmp_path / "got")
    stored.unlink()
    with pytest.raises(DataError, match=r"model\.pt2 is missing"):
        models.fetch(version, tmp_path / "got")
    assert [path.name for path in tmp_path.iterdir() if "got" in path.name] == []


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../evil": [1, "0" * 64]}},
        {"files": {"model.pt2": [-1, "0" * 64]}},
        {"files": {"model.pt2": [1, "zz"]}},
        {"digest": "../other"},
        {"time": 1e99},
        {"note": 3},
    ],
)
def test_a_record_from_elsewhere_is_checked_before_it_is_used(
    models: Registry, tmp_path: Path, change: dict[str, object]
) -> None:
    place = tmp_path / "models/spam/versions/000002.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    with pytest.raises(DataError, match="version 2 of spam"):
        models.version("spam", 2)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("spam@9", "spam@9: .* has no such version; there are 1, 2, 3"),
        ("spam@prod", "has no such alias"),
        ("spamm", "has no such model; did you mean 'spam'"),
        ("../spam", "model='../spam': letters"),
    ],
)
def test_a_name_that_is_wrong_is_one_line(models: Registry, word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        models.find(word)


def test_a_folder_that_is_no_export_is_refused(models: Registry, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match=r"has no export\.json"):
        models.add("spam", tmp_path / "other")
    export(tmp_path / "nested")
    (tmp_path / "nested/more").mkdir()
    with pytest.raises(ConfigError, match="a version has plain files only"):
        models.add("spam", tmp_path / "nested")


def test_a_reason_longer_than_a_reader_takes_is_refused_before_it_is_written(models: Registry, tmp_path: Path) -> None:
    models.promote(models.find("spam@1"), "prod")
    for change in (
        lambda: models.promote(models.find("spam@2"), "prod", "x" * 2001),
        lambda: models.add("spam", export(tmp_path / "long", "long"), "x" * 2001),
    ):
        with pytest.raises(ConfigError, match="2001 characters"):
            change()
    assert (models.find("spam@prod").number, models.versions("spam")) == (1, [1, 2, 3])


def test_the_command_adds_promotes_shows_and_rolls_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(tmp_path / "models")
    for number in (1, 2):
        registry(["add", url, "spam", str(export(tmp_path / f"export-{number}", str(number))), "--note", "nightly"])
        registry(["promote", url, f"spam@{number}", "--to", "prod", "--why", "better"])
    registry(["rollback", url, "spam@prod", "--why", "slow"])
    registry(["ls", url])
    registry(["show", url, "spam@prod"])
    registry(["get", url, "spam@prod", str(tmp_path / "got")])
    told = capsys.readouterr().out
    assert "spam@prod is version 1 again (move 3)" in told
    assert (tmp_path / "got/model.pt2").read_text() == "1"
    with pytest.raises(ConfigError, match="is there already"):
        registry(["get", url, "spam@prod", str(tmp_path / "got")])
