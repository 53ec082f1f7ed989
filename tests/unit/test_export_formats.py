"""Formats of an export: what a graph cannot hold is one line that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from everstep.errors import ConfigError
from everstep.trainer.export.formats import FORMATS
from everstep.trainer.export.recorded_call import RecordedCall


class Branch(nn.Module):
    """A branch on values, which no graph holds."""

    def forward(self, given: Tensor) -> Tensor:
        return given if given.sum() > 0 else -given


class Text(nn.Module):
    """An output that is no tensor, which a trace cannot hold."""

    def forward(self, given: Tensor) -> object:
        return {"text": str(given.shape), "given": given}


@pytest.mark.parametrize(("form", "model"), [("pt2", Branch()), ("onnx", Branch()), ("torchscript", Text())])
def test_a_model_that_a_format_cannot_hold_is_refused_in_one_line(tmp_path: Path, form: str, model: nn.Module) -> None:
    given = torch.ones(4, 3)
    with pytest.raises(ConfigError) as refused:
        FORMATS[form](model, RecordedCall((given,), {}, [given], 4), tmp_path)
    said = str(refused.value)
    assert said.startswith(f"--format {form}: torch cannot write this model so (")
    assert said.endswith("; choose another format, or change forward()")
    assert "\n" not in said
