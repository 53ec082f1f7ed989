"""The example projects, installed as packages and trained by the command, on one process and on several."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from everstep.run_folder import RunFolder
from everstep.trainer.reporting.sinks import read_metrics
from support import TESTS

pytestmark = pytest.mark.process
ROOT = TESTS.parent
EXAMPLES = ROOT / "examples"
TWO = "job.nproc=2"
EXACT = ["precision=fp64", "log.every=5"]


@dataclass(frozen=True)
class Project:
    """One example, installed; its commands run in a folder of data and runs."""

    name: str
    site: Path
    home: Path

    def python(self, *words: str) -> None:
        """Run a module of Python with the project's package in its path, without a network."""
        paths = os.pathsep.join(map(str, (ROOT, self.site)))
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-m", *words], env=environment, cwd=self.home, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    def run(self, name: str, *overrides: str) -> RunFolder:
        """Start or resume a run by `everstep run`, as the example's README does."""
        conf = str(EXAMPLES / self.name / "conf")
        given = [f"experiment={self.name}", f"plugins=[{self.name}]", f"run={name}", *overrides]
        self.python("everstep.launch", "run", "--config-dir", conf, *given)
        return RunFolder(str(self.home / "runs" / name))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Project]:
    def install(name: str) -> Project:
        site, home = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp(name)
        install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(site)]
        subprocess.run([sys.executable, "-m", "pip", *install, str(EXAMPLES / name)], check=True)
        return Project(name, site, home)

    return install


def losses(run: RunFolder) -> dict[int, float]:
    return {step: record["loss"] for step, record in read_metrics(run).items()}


def last_evaluation(run: RunFolder) -> dict[str, float]:
    return list(read_metrics(run, "evaluate").values())[-1]


@pytest.fixture(scope="module")
def nanogpt(project: Callable[[str], Project]) -> Project:
    made = project("nanogpt")
    made.python("nanogpt.bpe", "data/bpe.json", "400")
    sources = f"src={sysconfig.get_paths()['stdlib']}/[a-c]*.py"
    shape = ["format=files", "tokenizer=hf:data/bpe.json", "pack=32", "validation=0.2", "processes=1"]
    made.python("everstep.launch", "data", "prepare", sources, "dst=data/stdlib", *shape)
    return made


SMALL_GPT = ["task.vocabulary=400", "task.context=32", "task.width=32", "task.depth=2", "task.dropout=0.02",
             "steps=80", "schedule.over_steps=80", "schedule.warmup_steps=5", "optimizer.lr=0.01",
             "global_batch=64", "micro_batch=16", *EXACT]  # fmt: skip


def tokens(folder: Path, split: str) -> Counter[int]:
    [shard] = (folder / "data/stdlib" / split).glob("*.arrow")
    with pa.memory_map(str(shard)) as source:
        table = pa.ipc.open_file(source).read_all()
    return Counter(table["tokens"].combine_chunks().flatten().to_pylist())


def frequencies(folder: Path) -> float:
    """Return the held-out loss of a table that says how often each token is in the training part."""
    seen, held_out = tokens(folder, "train"), tokens(folder, "validation")
    total = seen.total() + 400
    return -sum(n * math.log((seen[token] + 1) / total) for token, n in held_out.items()) / held_out.total()


def test_a_gpt_with_tied_weights_learns_and_resumes_from_fsdp_in_ddp_on_another_world(nanogpt: Project) -> None:
    alone = nanogpt.run("alone", *SMALL_GPT, "parallel=single")
    nanogpt.run("wide", *SMALL_GPT, "parallel=fsdp", TWO, "steps=40")
    wide = nanogpt.run("wide", *SMALL_GPT, "parallel=ddp", "job.nproc=3")
    assert last_evaluation(alone)["loss"] < frequencies(nanogpt.home) - 0.1
    assert losses(wide) == pytest.approx(losses(alone), rel=1e-8)


@pytest.fixture(scope="module")
def bert(project: Callable[[str], Project]) -> Project:
    made = project("bert_lora")
    made.python("bert_lora.base", "data/base")
    rows = ["src=bert_lora.data:rows", "format=generator", "validation=0.2", "key=file"]
    made.python("everstep.launch", "data", "prepare", *rows, "dst=data/snippets")
    return made


def test_adapters_on_a_bert_learn_and_peft_loads_what_was_trained(bert: Project) -> None:
    settings = ["steps=80", "schedule.over_steps=80", *EXACT]
    alone = bert.run("alone", *settings, "parallel=single")
    bert.run("wide", *settings, "parallel=ddp", TWO, "steps=40")
    wide = bert.run("wide", *settings, "parallel=fsdp", TWO)
    assert last_evaluation(alone)["accuracy"] > 0.8  # half of the texts are prose
    assert losses(wide) == pytest.approx(losses(alone), rel=1e-6)
    bert.python("everstep.launch", "checkpoint", "export", "runs/wide", "trained.safetensors", "--only-trained")
    bert.python("bert_lora.adapter", "data/base", "trained.safetensors", "adapter")
    assert loads_as_trained(bert.home)


def loads_as_trained(home: Path) -> bool:
    """True if peft's own loader of the adapter folder gives each exported tensor back."""
    from peft import PeftModel
    from transformers import BertForSequenceClassification

    exported = load_file(home / "trained.safetensors")
    assert {name.split(".")[-3 if "lora" in name else -2] for name in exported} >= {"lora_A", "lora_B", "default"}
    base = BertForSequenceClassification.from_pretrained(home / "data/base")
    loaded = PeftModel.from_pretrained(base, str(home / "adapter")).state_dict()
    return all(torch.equal(loaded[name], tensor.to(loaded[name].dtype)) for name, tensor in exported.items())


def test_a_residual_network_learns_digits_and_its_batchnorm_is_the_same_on_another_world(
    project: Callable[[str], Project],
) -> None:
    cnn = project("cnn")
    settings = ["task.width=8", "steps=60", "schedule.over_steps=60", *EXACT]
    whole = ["parallel.kind=single", "micro_batch=64"]
    alone = cnn.run("alone", *settings, *whole)
    cnn.run("wide", *settings, "parallel.kind=ddp", TWO, "steps=30")
    wide = cnn.run("wide", *settings, *whole, "resume.allow=[micro_batch]")
    assert last_evaluation(alone)["f1"] > 0.85
    assert losses(wide) == pytest.approx(losses(alone), rel=1e-6)
    measured = last_evaluation(wide)
    cells = {name: value for name, value in measured.items() if name.startswith("confusion/")}
    assert len(cells) == 100
    assert cells == {name: last_evaluation(alone)[name] for name in cells}
    assert sum(cells.values()) == 359  # all held-out digits, each once
