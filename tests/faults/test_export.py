"""`everstep export`: models in files that other programs read, with outputs equal to the original's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from everstep.errors import ConfigError
from everstep.registry.export_folder import check_signature, files_of
from everstep.run_folder import RunFolder
from everstep.security.signing import KEY, Trust
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tensor_index import read_metadata, read_whole

pytestmark = [pytest.mark.dist, pytest.mark.usefixtures("warm")]

GPT = ("experiment=gpt_stdlib", "model.depth=1", "model.width=32", "evaluate.limit=64", "steps=3")
RUNS = {
    "conv": ("experiment=digits", "steps=8", "ema=0.9", "job.nproc=1"),
    "mlp": ("experiment=breast_cancer", "steps=8", "parallel=fsdp", "job.nproc=2"),
    "gpt": (*GPT, "parallel=fsdp", "job.nproc=2"),
    "text": ("experiment=documents", "model.width=16", "evaluate.limit=64", "steps=3", "job.nproc=1"),
    "pairs": ("experiment=recommendation", "steps=3", "parallel=fsdp", "job.nproc=2"),
    "windows": ("experiment=forecasting", "steps=3", "job.nproc=1"),
    "vit": ("experiment=digits_vit", "steps=3", "job.nproc=1"),
    "bpe": ("experiment=gpt_bpe", "model.depth=1", "data.block=16", "steps=2", "evaluate.limit=64", "job.nproc=1"),
    "glyphs": ("experiment=glyphs", "steps=2", "data.last_code=383", "job.nproc=1"),
}


def everstep(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "everstep.launch", *words], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each model."""
    root = tmp_path_factory.mktemp("runs")
    for run, words in RUNS.items():
        ended = everstep("run", *words, f"run={run}", cwd=root)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    return root


def exported(root: Path, run: str, *words: str) -> tuple[Path, dict[str, Any]]:
    out = root / f"{run}-{'-'.join(words).replace('.', '_').replace('=', '_')}"
    ended = everstep("export", run, "--out", str(out), "--format", *words, cwd=root)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return out, json.loads((out / "export.json").read_text())


@pytest.mark.parametrize("form", ["pt2", "onnx", "torchscript"])
@pytest.mark.parametrize("run", RUNS)
def test_outputs_of_a_graph_equal_those_of_the_model_without_this_project(trained: Path, run: str, form: str) -> None:
    out, facts = exported(trained, run, form)
    proof = facts["proof"]
    assert proof["without_everstep"]
    assert proof["largest"] <= 1e-5 * max(1.0, proof["scale"])
    assert (out / facts["file"]).stat().st_size > 0
    card = (out / "README.md").read_text()
    assert f"# {run}" in card
    assert "unknown to Everstep" in card


@pytest.mark.parametrize("form", ["hf", "safetensors"])
@pytest.mark.parametrize("run", RUNS)
def test_weights_are_those_of_the_checkpoint_to_the_last_bit(trained: Path, run: str, form: str) -> None:
    from safetensors.torch import load_file

    out, facts = exported(trained, run, form)
    files = out.glob("*.safetensors")
    found = {name: value for file in files for name, value in load_file(file).items()}
    folder, path = locate(str(trained / "runs" / run))
    metadata = read_metadata(folder.storage, path)
    assert facts["proof"]["tensors"] == len(found) > 0
    for name, value in found.items():
        assert torch.equal(value, read_whole(folder.storage, path, metadata, f"model.{name}")), name


def test_the_moving_average_and_a_cast_are_what_the_words_say(trained: Path) -> None:
    from safetensors.torch import load_file

    plain, _ = exported(trained, "conv", "safetensors", "--dtype", "fp32")
    average, facts = exported(trained, "conv", "safetensors", "evaluate.weights=ema")
    one, other = load_file(plain / "model.safetensors"), load_file(average / "model.safetensors")
    assert facts["weights"] == "ema"
    assert any(not torch.equal(one[name], other[name]) for name in one)
    half, facts = exported(trained, "conv", "pt2", "--dtype", "bf16")
    assert 0 < facts["proof"]["cast"]["largest"] < 0.2
    assert "| cast to | bf16, outputs move by at most" in (half / "README.md").read_text()


def test_the_card_has_what_evaluations_of_this_checkpoint_measured(trained: Path) -> None:
    assert everstep("evaluate", "conv", "--by", "label", cwd=trained).returncode == 0
    assert RunFolder(str(trained / "runs/conv")).storage.names("evaluations")
    out, _ = exported(trained, "conv", "safetensors", "--dtype", "fp64")
    card = (out / "README.md").read_text()
    assert "- label = 9 (" in card
    assert "95 % interval" in card


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--out", "runs", "--format", "pt2"), "--out runs: it is there already; choose another folder"),
        (("--out", "no/where", "--format", "pt2"), "there is no folder"),
        (("--out", "x", "--format", "pt3"), "invalid choice: 'pt3'"),
        (("--out", "x", "--format", "pt2", "evaluate.weights=ema"), "there is no moving average"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(trained: Path, words: tuple[str, ...], said: str) -> None:
    before = sorted(path.name for path in trained.iterdir())
    ended = everstep("export", "mlp", *words, cwd=trained)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in trained.iterdir()) == before


def test_an_export_with_a_key_is_signed_and_one_with_half_a_key_writes_nothing(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, f"ed25519:{'11' * 32}")
    ended = everstep("run", *RUNS["windows"], "run=signed", cwd=trained)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    out, _ = exported(trained, "signed", "safetensors")
    check_signature(out, files_of(out), Trust())
    (out / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ConfigError, match="it was changed"):
        check_signature(out, files_of(out), Trust())
    monkeypatch.setenv(KEY, f"ed25519-public:{'11' * 32}")
    ended = everstep("export", "signed", "--format", "safetensors", "--out", "half", cwd=trained)
    assert (ended.returncode, (trained / "half").exists()) == (2, False)
    assert "it verifies and cannot sign" in ended.stderr + ended.stdout
