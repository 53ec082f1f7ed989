"""Secrets of a user are named and left out: of the code of a job, of a diff, of a config and of a message."""

from __future__ import annotations

import contextlib
import functools
import io
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from everstep import provenance
from everstep.compose import compose, compose_job
from everstep.config import RunConfig
from everstep.dataset.readers.source_files import list_files
from everstep.errors import ConfigError
from everstep.frozen_config import settle
from everstep.launch.__main__ import main
from everstep.launch.config import job_config
from everstep.launch.submit.snapshot import archive, take
from everstep.run_folder import RunFolder
from everstep.security.secret_detection import (
    has_secret,
    holds_secret,
    is_secret_file,
    is_secret_name,
    refuse_secrets,
    without_secrets,
)
from everstep.storage import open_storage
from everstep.trainer.command import verb

PLANTED = "PLANTED"
BY_NAME = (".env", ".env.local", ".netrc", ".aws/credentials", "server.pem", "gcp-key.json", "deploy/id_ed25519",
           ".ssh/config", "my-service-account-prod.json", ".kube/config", "conf/secrets.yaml")  # fmt: skip
BY_CONTENT = {
    "notes.txt": "-----BEGIN OPENSSH PRIVATE KEY-----\nPLANTED",
    "train.py": "token = 'ghp_PLANTEDPLANTEDPLANTED0123'\n",
    "boto.cfg": "id = AKIAPLANTEDPLANTED01\n",
    "hub.json": '{"token": "hf_PLANTEDPLANTEDPLANTED0123"}',
    "db.py": "URL = 'postgresql://ada:PLANTED@db/x'\n",
}
CODE = {"mine.py": "x = 1\n", ".env.example": "WANDB_API_KEY=\n", "id_rsa.pub": "ssh-ed25519 AAAA\n", "token.py": "\n"}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Print nothing: its lines would hold the URLs that are asked for."""


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[int]:
    """Serve the files of a folder on this machine; yield the port."""
    handler = functools.partial(Quiet, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one file of each kind of secret, not ignored by git, beside honest code."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    for name, text in {**dict.fromkeys(BY_NAME, PLANTED), **BY_CONTENT, **CODE}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    return folder


def packed(run: RunFolder, digest: str) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(run.storage.read(archive(digest)))) as tar:
        return {member.name: opened.read() for member in tar if (opened := tar.extractfile(member)) is not None}


def test_5_2_the_code_of_a_job_has_no_file_that_looks_like_a_secret_and_names_those(
    checkout: Path, tmp_path: Path
) -> None:
    run = RunFolder(str(tmp_path / "run"))
    taken = take(run, checkout)
    assert set(taken.secrets) == {*BY_NAME, *BY_CONTENT}
    assert packed(run, taken.digest).keys() == CODE.keys()


def test_5_2_a_secret_is_taken_when_its_file_is_named(checkout: Path, tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path / "run"))
    taken = take(run, checkout, keep=["server.pem", "conf/*"])
    assert {"server.pem", "conf/secrets.yaml"} == packed(run, taken.digest).keys() - CODE.keys()
    assert not {"server.pem", "conf/secrets.yaml"} & set(taken.secrets)


def test_5_3_the_diff_of_a_run_has_no_change_of_a_secret_file_and_no_form_of_a_secret(checkout: Path) -> None:
    (checkout / "mine.py").write_text("key = 'ghp_PLANTEDPLANTEDPLANTED0123'\n")
    git(checkout, "add", "-A", "-f")
    git(checkout, "commit", "-qm", "a")
    for name in (*BY_NAME, *BY_CONTENT):
        (checkout / name).write_text((checkout / name).read_text() + "\nPLANTED again\n")
    (checkout / "mine.py").write_text("y = 2\n")
    found = provenance.code(str(checkout))
    assert found is not None
    assert found["changed"]
    assert "y = 2" in found["diff"]
    assert PLANTED not in str(found)


REFUSED = [
    "init_from=https://ada:PLANTED@host/x",
    "init_from=s3://KEY:PLANTED@bucket/x",
    "run_root=s3://KEY:PLANTED@bucket/x",
    "init_from='az://c/x?sv=1&sig=PLANTED'",
    "init_from='https://b/x?X-Amz-Signature=PLANTED'",
    "+data.token=hf_PLANTEDPLANTEDPLANTED0123",
    "+task.key=AKIAPLANTEDPLANTED01",
    "+data.password=PLANTED",
    "+model.hub.api_key=PLANTED",
    "+log.hparams.hf_token=PLANTED",
    "job.env.PGPASS=PLANTED",
    "job.env.DATABASE_URL=PLANTED",
    "job.env.GH_PAT=PLANTED",
    "job.env.SAS=PLANTED",
    "job.env.HARMLESS=postgresql://ada:PLANTED@db/x",
    "job.setup=['export WANDB_API_KEY=PLANTED']",
    "job.setup=['GH_PAT=PLANTED ./fetch']",
    "job.flags=['--export=ALL,HF_TOKEN=PLANTED']",
    "job.secrets=['ghp_PLANTEDPLANTEDPLANTED0123']",
    "job.secrets=['HF_TOKEN=PLANTED']",
    "log.wandb.project=glpat-PLANTEDPLANTEDPLANTED",
]
VERBS = (["submit", "job=slurm"], ["check"], ["run", "--cfg"], ["sweep", "seed=0,1"])


@pytest.mark.parametrize(
    ("verb", "word"),
    [*((["run"], word) for word in REFUSED), *((verb, "job.env.PGPASS=PLANTED") for verb in VERBS)],
    ids=lambda value: value.partition("=")[0] if isinstance(value, str) else "-".join(value),
)
def test_5_4_and_5_5_a_secret_on_the_command_line_is_refused_and_not_shown(
    verb: list[str], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*verb, "experiment=breast_cancer", "run=r", word]) == 2
    out, err = capsys.readouterr()
    assert PLANTED not in out + err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_5_4_a_secret_is_refused_on_a_resume_and_among_swept_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settle(RunConfig(run="r"), RunFolder("runs/r"))
    for words in (
        ["resume", "r", "log.wandb.project=glpat-PLANTEDPLANTEDPLANTED"],
        ["resume", "r", "job.causes.x.match='https://a:PLANTED@b'"],
        ["sweep", "experiment=breast_cancer", "init_from=https://a:PLANTED@b,c", "run=s"],
        ["sweep", "experiment=breast_cancer", "seed=0,1", "sweep.constraint=ghp_PLANTEDPLANTEDPLANTED0123", "run=s"],
    ):
        assert main(words) == 2, words
        out, err = capsys.readouterr()
        assert PLANTED not in out + err, words
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["r"]


def test_5_4_a_url_with_a_password_is_opened_by_no_verb_and_not_shown() -> None:
    for url in ("s3://KEY:PLANTED@bucket/x", "https://ada:PLANTED@host/x"):
        with pytest.raises(ConfigError) as refused:
            open_storage(url)
        assert PLANTED not in str(refused.value)


@pytest.mark.parametrize("source", ["http://ada:PLANTED@host/x.jsonl", "s3://KEY:PLANTED@bucket/x.jsonl"])
def test_a_source_of_a_preparation_with_a_password_is_refused_and_not_shown(tmp_path: Path, source: str) -> None:
    with pytest.raises(ConfigError) as refused:
        list_files([source])
    assert PLANTED not in str(refused.value)


def test_the_signature_of_a_source_is_in_no_record_of_bad_rows_and_in_no_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "x.jsonl").write_text('{"a": 1}\n{"a": \n')
    with serve(tmp_path / "web") as port:
        source = f"src=http://127.0.0.1:{port}/x.jsonl?sig=PLANTED"
        words = ["prepare", source, f"dst={tmp_path / 'set'}", "format=jsonl"]
        assert verb(["data", *words]) == 2
        assert verb(["data", *words, "max_bad=1"]) == 0
        assert verb(["data", "prepare", f"src=http://127.0.0.1:{port}/none?sig=PLANTED", "dst=none"]) == 2
    assert "line 2" in (tmp_path / "set" / "bad.jsonl").read_text()
    for file in (tmp_path / "set").rglob("*"):
        assert not file.is_file() or PLANTED.encode() not in file.read_bytes(), file
    assert PLANTED not in "".join(capsys.readouterr())


def test_the_program_of_a_submission_has_no_secret_among_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").write_text("")
    words = ["submit", "--dry-run", "job=slurm", "--", "x.py", "--db", "postgresql://ada:PLANTED@db/x"]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert PLANTED not in out + err


def test_honest_values_are_no_secrets() -> None:
    job = job_config({"env": {"PATH": "/a:/b", "NCCL_DEBUG": "INFO", "TOKENIZERS_PARALLELISM": "false"}})
    assert job.env["PATH"] == "/a:/b"
    compose_job(["job=slurm", "job.setup=['module load cuda/12.4', 'export A=$SCRATCH/a:b']"])
    compose(["experiment=breast_cancer", "init_from=s3://bucket/a:b@c", "run_root=gs://bucket/runs"])
    refuse_secrets({"pad_token": "<pad>", "key": "user", "cast": {"tokens": "int64"}, "password": None}, "data")
    assert not any(map(is_secret_name, ("PATH", "COMPASS", "AUTHOR", "PATTERN", "NCCL_DEBUG", "SASL_HOME")))
    assert not any(map(is_secret_file, ("tokenizer.json", "keyboard.py", ".env.example", "environment.yml")))
    assert not has_secret("loss=0.3 tokens/s=4k http://host:8080/x a@b")
    assert not holds_secret(b"sk-learn and hf_hub and ghp_ are words; s3://bucket:9000/x")


def test_a_text_that_is_kept_loses_its_secrets_only() -> None:
    text = "pip install https://ada:PLANTED@host/x; seed 3"
    assert without_secrets(text) == "pip install (a secret was here)host/x; seed 3"
