"""Twelve kinds of secrets in the environment, the home and the checkout: no verb copies one of them anywhere."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from everstep.launch.__main__ import main
from everstep.launch.schedulers import registry
from support.file_scheduler import VARIABLE
from support.processes import below

pytestmark = [pytest.mark.process, pytest.mark.timeout(600), pytest.mark.usefixtures("warm")]
VARIABLES = {
    "WANDB_API_KEY": "PLANTED01" * 5,
    "AWS_SECRET_ACCESS_KEY": "PLANTED02aws",
    "HF_TOKEN": "hf_PLANTED03PLANTED03PLANTED03",
    "GITHUB_TOKEN": "ghp_PLANTED04PLANTED04PLANTED04",
    "EVERSTEP_SIGNING_KEY": "PLANTED05-signing",
    "DATABASE_URL": "postgresql://ada:PLANTED06@db.example/x",
    "GH_PAT": "PLANTED07-pat",
}
FILES = {
    ".env": "API_PASSWORD=PLANTED08\n",
    "deploy.txt": "-----BEGIN RSA PRIVATE KEY-----\nPLANTED09\n-----END RSA PRIVATE KEY-----\n",
    ".netrc": "machine example.org login ada password PLANTED10\n",
    ".aws/credentials": "[default]\naws_secret_access_key = PLANTED11\n",
    "prod-service-account.json": json.dumps({"type": "service_account", "private_key": "PLANTED12"}),
}
DIGITS = ["experiment=breast_cancer", "steps=4", "evaluate.every=2", "checkpoint.every=2", "log.progress=off"]


@dataclass
class Bench:
    """A user's checkout, home and shell, and all that the verbs said."""

    top: Path
    planted: set[Path] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    """Findings in the arguments and environments of processes."""

    @property
    def checkout(self) -> Path:
        return self.top / "checkout"

    def run(self, *words: str, code: int = 0) -> str:
        """Run a verb, and look at the argv and environment of all its processes meanwhile."""
        argv = [sys.executable, "-m", "everstep.launch", *words]
        began = subprocess.Popen(argv, cwd=self.checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        over = threading.Event()
        watching = threading.Thread(target=self.watch, args=(began.pid, over))
        watching.start()
        said, _ = began.communicate(timeout=240)
        over.set()
        watching.join()
        assert began.returncode == code, said
        assert "PLANTED" not in said, words
        return said

    def watch(self, pid: int, over: threading.Event) -> None:
        while not over.wait(0.1):
            for process in (pid, *below(pid)):
                try:
                    argv = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
                    environ = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace")
                except OSError:
                    continue
                if "PLANTED" in argv:
                    self.seen.add(f"argv: {argv}")
                for name, _, value in (pair.partition("=") for pair in environ.split("\0")):
                    if "PLANTED" in value and VARIABLES.get(name) != value:
                        self.seen.add(f"{name} of {argv}")

    def leaks(self) -> dict[str, list[str]]:
        """Return the files that hold what was planted, or are named after it."""
        found = {}
        for file in self.top.rglob("*"):
            if file in self.planted or ".git" in file.parts:
                continue
            data = os.fsencode(file) + (file.read_bytes() if file.is_file() else b"")
            data += gzip.decompress(file.read_bytes()) if file.name.endswith(".gz") else b""
            if kinds := [f"{n:02}" for n in range(1, 13) if f"PLANTED{n:02}".encode() in data]:
                found[str(file.relative_to(self.top))] = kinds
        return found


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(tmp_path)
    (made.checkout / "texts").mkdir(parents=True)
    (made.checkout / "texts" / "a.txt").write_text("honest words\n" * 50)
    (made.checkout / "mine.py").write_text("x = 1\n")
    for name, text in FILES.items():
        for folder in (made.checkout, tmp_path / "home"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
            made.planted.add(folder / name)
    git = ["git", "-C", str(made.checkout), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "-A", "-f"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    for name, text in FILES.items():
        (made.checkout / name).write_text(f"{text}{text}")
    for name, value in {**VARIABLES, "HOME": str(tmp_path / "home"), "XDG_STATE_HOME": str(tmp_path / "state"),
                        "TMPDIR": str(tmp_path / "tmp"), "WANDB_SILENT": "true"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(made.checkout)
    return made


def test_5_6_and_5_7_no_verb_shows_stores_or_passes_on_a_secret(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sinks = ["log.tensorboard=true", "log.wandb.enabled=true", "log.wandb.mode=offline"]
    bench.run("run", *DIGITS, *sinks, "run=a", "job.nproc=2", "parallel=ddp", "job.secrets=[WANDB_API_KEY,HF_TOKEN]")
    bench.run("resume", "a", "steps=6", "job.nproc=1")
    bench.run("run", *DIGITS, "run=bad", "job.nproc=1", "data.path=/nowhere", "job.max_restarts=0", code=2)
    bench.run("sweep", *DIGITS, "run=s", "seed=0,1", "job.nproc=1")
    bench.run("check", *DIGITS, "job.nproc=1")
    for words in (["ls"], ["status", "a"], ["logs", "a"], ["leaderboard", "s"],
                  ["checkpoint", "ls", "runs/a"],
                  ["checkpoint", "verify", "runs/a"],
                  ["checkpoint", "export", "runs/a", "weights.safetensors"]):  # fmt: skip
        bench.run(*words)
    bench.run("doctor", "job=slurm", code=2)  # there is none
    bench.run("data", "prepare", "src=texts", "dst=data", "tokenizer=bytes", "pack=16", "processes=2")
    bench.run("data", "inspect", "data")
    named = "job.secrets=[WANDB_API_KEY,HF_TOKEN,GH_PAT]"
    bench.run("submit", "--dry-run", "job=slurm", *DIGITS, "run=q", "job.nproc=1", "job.gpus=0", named)
    bench.run("submit", "--dry-run", "job=k8s", "job.image=i", *DIGITS, "run=k", "job.nproc=1", "job.gpus=0",
              "run_root=s3://bucket/runs", named)  # fmt: skip
    monkeypatch.setenv(VARIABLE, str(bench.top / "jobs.json"))
    monkeypatch.setitem(registry.CLUSTERS, "slurm", ("support.file_scheduler", "FileScheduler"))
    assert main(["submit", "--quick", "job=slurm", *DIGITS, "run=q", "job.nproc=1", "job.gpus=0", named]) == 0
    assert list(bench.checkout.glob("runs/q/code/*.tar.gz"))
    assert list(bench.checkout.glob("runs/a/wandb/offline-run-*"))
    assert list(bench.checkout.glob("runs/a/tensorboard/*"))
    assert bench.leaks() == {}
    assert bench.seen == set()
