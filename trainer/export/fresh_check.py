"""Script that runs an exported model without Everstep on saved inputs, and prints the differences.

python -I fresh_check.py FORMAT FILE CASE, where CASE is a torch.save of args, kwargs (by name), samples and expected.
"""

import importlib
import json
import sys

import torch
from torch.utils import _pytree as pytree


def outputs(form: str, file: str, args: tuple, kwargs: dict) -> list:  # type: ignore[type-arg]
    """Return the tensors that the exported model gives."""
    if form == "onnx":
        onnxruntime = importlib.import_module("onnxruntime")
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        names = [each.name for each in session.get_inputs()]
        found = session.run(None, {name: value.numpy() for name, value in zip(names, given, strict=True)})
        return [torch.from_numpy(each) for each in found]
    model = torch.export.load(file).module() if form == "pt2" else torch.jit.load(file)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]


def first(tree: object, samples: int, kept: int) -> object:
    """Return the tree with the first rows of what has a row for each sample."""

    def cut(leaf: object) -> object:
        return leaf[:kept] if isinstance(leaf, torch.Tensor) and leaf.dim() and len(leaf) == samples else leaf

    return pytree.tree_map(cut, tree)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference; infinite for another shape, or for a number where the other has none."""
    if one.shape != other.shape:
        return float("inf")
    differs = (one != other) & ~(one.isnan() & other.isnan())
    apart = (one.double() - other.double()).abs()[differs]
    return float(torch.where(apart.isfinite(), apart, torch.inf).max()) if apart.numel() else 0.0


def main(form: str, file: str, case: str) -> None:
    saved = torch.load(case, weights_only=True)
    samples, largest = saved["samples"], 0.0
    finite = [each[each.isfinite()].abs() for each in saved["expected"]]
    scale = max((float(each.max()) for each in finite if each.numel()), default=1.0)
    for kept in {samples, max(1, samples // 3)}:
        args, kwargs, expected = (first(saved[name], samples, kept) for name in ("args", "kwargs", "expected"))
        found = outputs(form, file, tuple(args), kwargs)  # type: ignore[arg-type]
        for one, other in zip(found, expected, strict=True):  # type: ignore[call-overload]
            largest = max(largest, distance(one, other))
    alone = not any(name.split(".")[0] == "everstep" for name in sys.modules)
    print(json.dumps({"largest": largest, "scale": scale, "without_everstep": alone}))


if __name__ == "__main__":
    main(*sys.argv[1:])
