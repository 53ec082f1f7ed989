"""With a signing key, an export, a version, a move of an alias and evidence count only as they were signed."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from everstep.config import RunConfig
from everstep.errors import ConfigError, DataError
from everstep.frozen_config import freeze
from everstep.launch.__main__ import main
from everstep.registry.export_folder import SIGNATURE, sign_folder
from everstep.registry.registry import Registry
from everstep.run_folder import CONFIG, RunFolder
from everstep.security.signing import KEY, Trust
from everstep.serving import load

SEED, OTHER = "11" * 32, "22" * 32


def public(seed: str) -> str:
    from cryptography.hazmat.primitives.asymmetric import ed25519

    half = ed25519.Ed25519PrivateKey.from_private_bytes(bytes.fromhex(seed)).public_key()
    return f"ed25519-public:{half.public_bytes_raw().hex()}"


def export(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "model.pt2").write_text(text)
    (folder / "export.json").write_text(json.dumps({"format": "pt2", "file": "model.pt2"}))
    sign_folder(folder)
    return folder


@pytest.fixture
def signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry with two signed versions of spam, prod moved to each; the environment then has no key."""
    monkeypatch.setenv(KEY, f"ed25519:{SEED}")
    models = Registry(str(tmp_path / "models"))
    for text in ("one", "two"):
        models.promote(models.add("spam", export(tmp_path / text, text)), "prod")
    monkeypatch.delenv(KEY)
    return models


def forged(models: Registry, place: str, **fields: object) -> None:
    """Change a record, and keep its signature."""
    path = Path(models.url) / place
    line, signature = path.read_bytes().splitlines()
    path.write_bytes(json.dumps(json.loads(line) | fields, sort_keys=True).encode() + b"\n" + signature + b"\n")


def test_a_public_key_reads_what_the_private_one_signed_and_no_key_reads_all(signed: Registry, tmp_path: Path) -> None:
    assert SEED not in "".join(path.read_text() for path in Path(signed.url).rglob("*") if path.is_file())
    for models in (
        Registry(signed.url),
        Registry(signed.url, public(SEED)),
        Registry(signed.url, [public(OTHER), public(SEED)]),
    ):
        assert models.find("spam@prod").number == 2
        assert [move.version for move in models.history("spam", "prod")] == [1, 2]
    got = signed.fetch(signed.find("spam@1"), tmp_path / "got")
    assert (got / SIGNATURE).read_text().startswith("export-1:ed25519:")


def test_only_the_keys_of_the_caller_count_and_that_of_the_environment_is_not_read(
    signed: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "ed25519:no key at all")
    assert Registry(signed.url, public(SEED)).find("spam@prod").number == 2
    with pytest.raises(ConfigError, match="is no key of ed25519"):
        Registry(signed.url)


@pytest.mark.parametrize("change", ["foreign", "facts", "other_model", "other_number", "unsigned", "cut", "not_json"])
def test_a_version_that_was_not_signed_as_it_is_cannot_be_loaded(signed: Registry, change: str) -> None:
    models = Registry(signed.url, public(OTHER if change == "foreign" else SEED))
    place, name = "spam/versions/000002.json", "spam"
    path = Path(signed.url) / place
    if change == "facts":
        forged(signed, place, facts={"format": "torchscript", "file": "model.pt2"})
    elif change == "other_model":
        path = Path(signed.url) / "ham/versions/000002.json"
        path.parent.mkdir(parents=True)
        path.write_bytes((Path(signed.url) / place).read_bytes())
        name = "ham"
    elif change == "other_number":
        path.write_bytes((Path(signed.url) / "spam/versions/000001.json").read_bytes())
    elif change == "unsigned":
        path.write_bytes(path.read_bytes().splitlines()[0] + b"\n")
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:-9] + b"\n")
    elif change == "not_json":  # the signature is asked for before anything is parsed
        path.write_bytes(b"[" * 5000 + b"\n" + path.read_bytes().splitlines()[1])
    said = (
        "it is not signed, and trusted asks" if change == "unsigned" else "was signed with a key that trusted does not"
    )
    with pytest.raises(DataError, match=said) as refused:
        models.version(name, 2)
    assert "\n" not in str(refused.value)
    with pytest.raises(DataError, match=said):
        load(models.url, name, version=2, trusted=public(OTHER if change == "foreign" else SEED))


def test_a_file_of_a_signed_version_that_was_exchanged_is_refused_before_it_is_parsed(signed: Registry) -> None:
    version = signed.version("spam", 2)
    (Path(signed.url) / "spam/files" / version.digest / "model.pt2").write_text("owt")
    with pytest.raises(DataError, match="is not the file that was added"):
        load(signed.url, "spam", alias="prod", trusted=public(SEED))


def test_an_alias_that_was_moved_without_the_key_is_not_followed(
    signed: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed.promote(signed.version("spam", 1), "prod")  # without a key
    models = Registry(signed.url, public(SEED))
    with pytest.raises(DataError, match=r"prod/000003\.json: it is not signed"):
        models.find("spam@prod")
    monkeypatch.setenv(KEY, f"ed25519:{SEED}")
    owner = Registry(signed.url)
    assert owner.promote(owner.version("spam", 1), "prod").number == 4
    assert models.find("spam@prod").number == 1
    with pytest.raises(ConfigError, match="there is no version before 1"):
        owner.rollback("spam", "prod")


def test_an_export_that_was_changed_or_not_signed_is_not_added_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, f"ed25519:{SEED}")
    models = Registry(str(tmp_path / "models"))
    changed = export(tmp_path / "changed", "one")
    (changed / "model.pt2").write_text("two")
    plain = export(tmp_path / "plain", "one")
    (plain / SIGNATURE).unlink()
    monkeypatch.setenv(KEY, f"ed25519:{OTHER}")
    foreign = export(tmp_path / "foreign", "one")
    monkeypatch.setenv(KEY, f"ed25519:{SEED}")
    for folder, said in ((changed, "it was changed"), (plain, "it is not signed"), (foreign, "it was changed")):
        with pytest.raises(ConfigError, match=said):
            models.add("spam", folder)
    assert models.versions("spam") == []
    assert not list((tmp_path / "models").rglob("model.pt2"))


def test_a_key_that_only_verifies_adds_and_promotes_nothing(
    signed: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, public(SEED))
    models = Registry(signed.url)
    for change in (lambda: models.add("spam", tmp_path / "one"), lambda: models.promote(models.find("spam@1"), "dev")):
        with pytest.raises(ConfigError, match="it verifies and cannot sign"):
            change()


def test_versions_from_before_the_key_keep_no_signed_one_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = Registry(str(tmp_path / "models"))
    models.promote(models.add("spam", export(tmp_path / "old", "old")), "prod")
    monkeypatch.setenv(KEY, f"ed25519:{SEED}")
    models = Registry(models.url)
    made = models.add("spam", export(tmp_path / "new", "new"))
    assert (made.number, models.promote(made, "prod").version) == (2, 2)
    with pytest.raises(DataError, match="it is not signed"):
        models.find("spam@1")


@pytest.mark.parametrize("given", [f"ed25519:{SEED}", "a secret", "ed25519-public:12"])
def test_what_is_no_public_key_is_refused_and_not_shown(given: str) -> None:
    with pytest.raises(ConfigError, match=r"trusted\[0\]: no public key of ed25519") as refused:
        Trust(given)
    assert SEED not in str(refused.value)
    assert "a secret;" not in str(refused.value)
    with pytest.raises(ConfigError, match="no key at all trusts nothing"):
        Trust([])


def test_evidence_is_signed_and_its_check_asks_for_the_signature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    RunFolder("runs/mine").storage.write(CONFIG, freeze(RunConfig(run="mine")).encode())
    assert main(["evidence", "mine", "--out", "plain.zip"]) == 0
    monkeypatch.setenv(KEY, f"ed25519:{SEED}")
    assert main(["evidence", "mine", "--out", "signed.zip"]) == 0
    with zipfile.ZipFile("signed.zip") as whole, zipfile.ZipFile("forged.zip", "w") as changed:
        for name in whole.namelist():
            changed.writestr(name, whole.read(name) + (b"\n" if name == "index.json" else b""))
    monkeypatch.setenv(KEY, public(SEED))
    codes = {name: main(["evidence", "--verify", f"{name}.zip"]) for name in ("signed", "plain", "forged")}
    assert codes == {"signed": 0, "plain": 1, "forged": 1}
    told = capsys.readouterr()
    assert f"its index was signed with the key of {KEY}" in told.out
    assert "plain.zip: index.json: it is not signed" in told.err
    assert "forged.zip: index.json: it was changed" in told.err
    monkeypatch.setenv(KEY, public(OTHER))
    assert main(["evidence", "--verify", "signed.zip"]) == 1
    monkeypatch.delenv(KEY)
    assert main(["evidence", "--verify", "plain.zip"]) == 0
    assert "is not signed: it shows damage, not forgery" in capsys.readouterr().out


def test_neither_a_registry_without_keys_nor_the_commands_load_cryptography(tmp_path: Path) -> None:
    program = (
        "import sys, everstep, everstep.serving, everstep.launch.cli.registry, everstep.launch.cli.evidence\n"
        "from everstep.registry.registry import Registry\n"
        f"Registry({str(tmp_path)!r}).models()\n"
        "assert 'cryptography' not in sys.modules"
    )
    environment = {"PATH": "/usr/bin:/bin"}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
