"""`everstep export`: write a checkpoint's model in a format, load it again elsewhere, and compare."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn

from everstep.errors import ConfigError, EverstepError, printable
from everstep.outcome import to_json_line
from everstep.registry.export_folder import FACTS, sign_folder
from everstep.run_folder import MANIFEST
from everstep.security.signing import check_signer
from everstep.storage import open_storage
from everstep.trainer.export import fresh_check
from everstep.trainer.export.card import card
from everstep.trainer.export.formats import FORMATS, GRAPHS, weights
from everstep.trainer.export.recorded_call import NO_CALL, RecordedCall, record
from everstep.trainer.inference.session import Session, join_ranks, load_sets, open_session, read_config

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIMIT, HALF_LIMIT = 1e-5, 2e-2
"""Largest difference of outputs, relative to the largest output; the second for half precision."""


def export(options: argparse.Namespace) -> int:
    """Run the verb; the folder appears when all is written and compared."""
    check_signer()
    run = read_config(options.work, options)
    mesh = join_ranks(run)
    # Weights alone need no example, so a run whose data is gone can be exported too.
    splits, sets = load_sets(run, mesh, options.on, or_train=True) if options.format in GRAPHS else (None, {})
    session = open_session(run, mesh, options.source, options.which)
    dtype = DTYPES[options.dtype] if options.dtype else None
    target = Path(options.out)
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with session.evaluating():
            model = session.model.model
            exact = record(session, next(iter(sets.values()))) if sets else NO_CALL
            call = exact
            if dtype is not None:
                model.to(dtype)
                call = record(session, next(iter(sets.values())), dtype) if sets else NO_CALL
            name = FORMATS[options.format](model, call, staged)
            proof = _proof(options.format, staged / name, model, call)
            if dtype is not None:
                proof["cast"] = {"dtype": options.dtype, "largest": _largest(exact, call) if sets else None}
        facts = _facts(session, options, name, proof) | {"inputs": call.described()}
        (staged / FACTS).write_bytes(to_json_line(facts))
        (staged / "README.md").write_text(card(session, splits, facts))
        sign_folder(staged)
        staged.chmod(0o755)
        staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    print(printable(f"{target / name}: {facts['summary']}"))
    return 0


def _proof(form: str, file: Path, model: nn.Module, call: RecordedCall) -> dict[str, Any]:
    """Return how far the exported model is from the original, in a process without Everstep.

    Raises:
        ConfigError: it is further than the limit, or cannot be loaded.
    """
    if form not in GRAPHS:
        return {"tensors": _check_tensors(file, model), "equal": True}
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    limit = HALF_LIMIT if half else LIMIT
    with tempfile.TemporaryDirectory() as folder:
        case = Path(folder) / "case.pt"
        # A trace takes its arguments by name only if they were recorded by name.
        named = call.by_name(model) if call.kwargs else {}
        args = () if call.kwargs else call.args
        saved = {"args": args, "kwargs": named, "samples": call.samples, "expected": call.outputs}
        torch.save(saved, case)
        script = str(Path(fresh_check.__file__).resolve())
        words = [sys.executable, "-I", script, form, str(file), str(case)]
        ended = subprocess.run(words, capture_output=True, text=True, cwd=folder, check=False)
    if ended.returncode:
        said = ended.stderr.strip().splitlines()[-1:] or ["no output"]
        raise ConfigError(
            f"--format {form}: the file cannot be used without this project ({said[0][:300]}); choose another format"
        )
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    if not found["without_everstep"]:
        raise EverstepError(f"--format {form}: the file imports Everstep when it is loaded; nothing was written")
    if not found["largest"] <= limit * found["scale"]:
        raise EverstepError(
            f"--format {form}: outputs differ from the original by {found['largest']:.3g} (limit {limit:g} of "
            f"{found['scale']:.3g}); nothing was written"
        )
    return {**found, "samples": call.samples, "limit": limit}


def _check_tensors(file: Path, model: nn.Module) -> int:
    """Return the number of tensors, each equal to the model's to the last bit."""
    from safetensors.torch import load_file

    if file.suffix == ".json":
        names = set(json.loads(file.read_text())["weight_map"].values())
        found = {name: value for shard in names for name, value in load_file(file.with_name(shard)).items()}
    else:
        found = load_file(file)
    wanted = weights(model)
    differs = [name for name, value in wanted.items() if name not in found or _bits(found[name]) != _bits(value)]
    if differs or len(found) != len(wanted):
        what = differs[0] if differs else "the number of tensors"
        raise EverstepError(f"{file.name}: {what} differs from the model; nothing was written")
    return len(found)


def _bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _largest(one: RecordedCall, other: RecordedCall) -> float:
    pairs = zip(one.outputs, other.outputs, strict=True)
    return max((float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel()), default=0.0)


def _facts(session: Session, options: argparse.Namespace, name: str, proof: dict[str, Any]) -> dict[str, Any]:
    model, run = session.model.model, options.source
    if "tensors" in proof:
        summary = f"{proof['tensors']} tensors, read again and equal to the last bit"
    else:
        far = f"at most {proof['largest']:.3g} from" if proof["largest"] else "equal to"
        summary = f"outputs for {proof['samples']} samples are {far} the original's, in a process without Everstep"
    if options.format == "torchscript":
        summary += "; torch has deprecated TorchScript: --format pt2 is what replaces it"
    return {
        "time": time.time(),
        "format": options.format,
        "file": name,
        "checkpoint": session.checkpoint,
        "run": run if "://" in run else str(Path(run).absolute()),
        "manifest": blake3(open_storage(session.checkpoint).read(MANIFEST)).hexdigest(),
        "step": session.step,
        "weights": session.run.evaluate.weights.value,
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "proof": proof,
        "summary": summary,
    }
