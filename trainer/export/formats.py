"""Formats of `everstep export`: a function writes the files of one, and returns the first name."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from everstep.errors import ConfigError
from everstep.trainer.export.recorded_call import RecordedCall

SHARD_BYTES = 5 * 10**9
"""Largest file of a folder of Hugging Face."""
Write = Callable[[nn.Module, RecordedCall, Path], str]


def safetensors(model: nn.Module, call: RecordedCall, folder: Path) -> str:
    """Write the weights as one file of safetensors."""
    _need("safetensors", "export")
    from safetensors.torch import save_file

    save_file(weights(model), folder / "model.safetensors", {"format": "pt"})
    return "model.safetensors"


def hf(model: nn.Module, call: RecordedCall, folder: Path) -> str:
    """Write the weights as Hugging Face does: files of at most SHARD_BYTES and an index."""
    _need("safetensors", "export")
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in weights(model).items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, {"format": "pt"})
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    places = {weight: name for name, shard in zip(names, shards, strict=True) for weight in shard}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return "model.safetensors.index.json"


def pt2(model: nn.Module, call: RecordedCall, folder: Path) -> str:
    """Write a program of torch.export, with any number of samples."""
    with _in_one_line("pt2"):
        program = torch.export.export(model, call.args, call.kwargs, dynamic_shapes=_shapes(model, call))
        torch.export.save(program, folder / "model.pt2")
    return "model.pt2"


def onnx(model: nn.Module, call: RecordedCall, folder: Path) -> str:
    """Write an ONNX graph, with any number of samples."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _need(package, "onnx")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with _in_one_line("onnx"):
        torch.onnx.export(
            model, call.args, folder / "model.onnx", kwargs=call.kwargs, dynamo=True, verbose=False,
            dynamic_shapes=_shapes(model, call), external_data=False,
        )  # fmt: skip
    return "model.onnx"


def torchscript(model: nn.Module, call: RecordedCall, folder: Path) -> str:
    """Write a trace of TorchScript, which torch has deprecated."""
    with _in_one_line("torchscript"):
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            model,
            None if call.kwargs else call.args,
            example_kwarg_inputs=call.by_name(model) if call.kwargs else None,
            strict=False,
            check_trace=False,
        )
        traced.save(str(folder / "model.pt"))
    return "model.pt"


FORMATS: Mapping[str, Write] = {write.__name__: write for write in (safetensors, hf, pt2, onnx, torchscript)}

GRAPHS = ("pt2", "onnx", "torchscript")
"""Formats that run without the model's code, and need an example of a call."""


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the model's state dict; a tied one under its first name alone."""
    found: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            continue
        key = (value.data_ptr(), value.shape, value.stride())
        if value.numel() and key in seen:
            continue
        seen.add(key)
        found[name] = value.detach().clone(memory_format=torch.contiguous_format)
    return found


def _shapes(model: nn.Module, call: RecordedCall) -> dict[str, Any]:
    """Return which sizes of the arguments are free: the first, where it is the number of samples."""
    batch = torch.export.Dim("batch", min=1)

    def spec(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: batch} if value.dim() and len(value) == call.samples else None
        if isinstance(value, Mapping):
            return {name: spec(inner) for name, inner in value.items()}
        return type(value)(spec(inner) for inner in value) if isinstance(value, list | tuple) else None

    return {name: spec(value) for name, value in call.by_name(model).items()}


def _need(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"export needs {package}, which is not installed: pip install 'everstep[{extra}]'")


@contextlib.contextmanager
def _in_one_line(name: str) -> Iterator[None]:
    """Turn what a format cannot hold into one line, and leave out torch's warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ConfigError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"--format {name}: torch cannot write this model so ({type(error).__name__}: {said}); choose another "
            "format, or change forward()"
        ) from error
