"""A served model: verified, warmed up, swapped whole, and never stopped by a store that fails."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everstep.errors import ConfigError, DataError, EverstepError
from everstep.registry.registry import Registry
from everstep.serving import ServedModel, load
from support.processes import until

pytestmark = pytest.mark.dist


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((3,), factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def export(folder: Path, factor: float, form: str = "torchscript", **facts: Any) -> Path:
    folder.mkdir()
    model, x = Scale(factor).eval(), torch.ones(2, 3)
    if form == "torchscript":
        torch.jit.trace(model, x).save(str(folder / "model"))  # type: ignore[no-untyped-call]
    else:
        shapes = {"x": {0: torch.export.Dim("batch")}}
        torch.export.save(torch.export.export(model, (x,), dynamic_shapes=shapes), folder / "model.pt2")
    inputs = {"args": [{"shape": [None, 3], "dtype": "float32"}], "kwargs": {}}
    name = next(path.name for path in folder.iterdir())
    (folder / "export.json").write_text(json.dumps({"format": form, "file": name, "inputs": inputs, **facts}))
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Registry:
    """A registry in which spam@1 gives 1 x and spam@2 gives 2 x; prod is the first."""
    found = Registry(str(tmp_path / "models"))
    for factor in (1, 2):
        found.add("spam", export(tmp_path / f"export-{factor}", float(factor)))
    found.promote(found.version("spam", 1), "prod")
    return found


@pytest.mark.parametrize("form", ["torchscript", "pt2"])
def test_a_model_answers_in_a_process_that_has_none_of_its_code(tmp_path: Path, form: str) -> None:
    models = Registry(str(tmp_path / "models"))
    models.add("spam", export(tmp_path / "export", 3.0, form))
    program = f"""
import everstep.serving, sys, torch
spam = everstep.serving.load({models.url!r}, "spam")
assert not [name for name in sys.modules if name.startswith("everstep.trainer")]
print(spam.version, spam(torch.ones(5, 3)).sum().item())
"""
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert ended.stdout == "spam@1 45.0\n", ended.stderr


def test_readers_see_one_version_or_the_other_through_a_hundred_promotions(models: Registry) -> None:
    served = load(models.url, "spam", alias="prod")
    seen: set[tuple[float, ...]] = set()
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            seen.add(tuple(served(torch.ones(1, 3))[0].tolist()))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for turn in range(100):
        number = 2 - turn % 2
        models.promote(models.version("spam", number), "prod")
        assert served.refresh()
        assert served.version.number == number
    over.set()
    for reader in readers:
        reader.join()
    assert seen == {(1.0, 1.0, 1.0), (2.0, 2.0, 2.0)}
    assert not served.refresh()


def test_a_watching_model_follows_its_alias_and_survives_a_store_that_fails(
    models: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = ServedModel(models, "spam@prod").watch(0.01)
    find = Registry.find

    def fail(self: Registry, word: str) -> Any:
        raise OSError("the store is away")

    monkeypatch.setattr(Registry, "find", fail)
    until(lambda: served.error is not None)
    assert "the store is away" in str(served.error)
    assert served(torch.ones(1, 3)).tolist() == [[1.0, 1.0, 1.0]]
    monkeypatch.setattr(Registry, "find", find)
    models.promote(models.version("spam", 2), "prod")
    until(lambda: served.version.number == 2)
    until(lambda: served.error is None)
    assert served(torch.ones(1, 3)).tolist() == [[2.0, 2.0, 2.0]]
    served.close()


def test_a_damaged_version_or_one_that_does_not_answer_is_never_used(models: Registry, tmp_path: Path) -> None:
    served = load(models.url, "spam", alias="prod", warm_up=[torch.ones(4, 3)])
    second = models.version("spam", 2)
    stored = tmp_path / "models/spam/files" / second.digest / "model"
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    models.promote(second, "prod")
    with pytest.raises(DataError, match="is not the file that was added"):
        served.refresh()
    wrong = export(tmp_path / "wrong", 5.0)
    (wrong / "model").write_bytes(b"no model")
    models.promote(models.add("spam", wrong), "prod")
    with pytest.raises(EverstepError, match="spam@3 does not answer a warm-up call"):
        served.refresh()
    assert (served.version.number, served(torch.ones(1, 3)).tolist()) == (1, [[1.0, 1.0, 1.0]])


def test_weights_alone_cannot_be_served(models: Registry, tmp_path: Path) -> None:
    models.add("spam", export(tmp_path / "weights", 4.0, format="safetensors"))
    with pytest.raises(ConfigError, match=r"spam@3 is of format safetensors, which needs the model's code"):
        load(models.url, "spam")
    with pytest.raises(ConfigError, match="give one of them"):
        load(models.url, "spam", alias="prod", version=1)
