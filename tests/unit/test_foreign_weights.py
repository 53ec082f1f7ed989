"""Weights of other programs: each kind gives the same model; damage, code and what does not fit are said."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn

from everstep.errors import CheckpointError, ConfigError
from everstep.rank_env import RankInfo
from everstep.trainer.checkpoint.weights import load_weights
from everstep.trainer.distributed.mesh import Mesh

ALONE = Mesh(RankInfo(), torch.device("cpu"))
Weights = dict[str, Tensor]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def weights() -> Weights:
    torch.manual_seed(7)
    return {name: value.clone() for name, value in network().state_dict().items()}


def safetensors(folder: Path, given: Weights) -> str:
    save_file(given, folder / "any.safetensors", metadata={"format": "pt"})
    return str(folder / "any.safetensors")


def hugging_face(folder: Path, given: Weights) -> str:
    save_file(given, folder / "model.safetensors")
    return str(folder)


def indexed(folder: Path, given: Weights) -> str:
    names, index = sorted(given), {}
    for number, part in enumerate((names[:3], names[3:])):
        save_file({name: given[name] for name in part}, folder / f"model-{number}.safetensors")
        index |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return str(folder)


def torch_file(folder: Path, given: Weights) -> str:
    torch.save(given, folder / "weights.pt")
    return str(folder / "weights.pt")


def wrapped(folder: Path, given: Weights) -> str:
    torch.save({"epoch": 3, "state_dict": given}, folder / "last.ckpt")
    return str(folder / "last.ckpt")


def dcp_folder(folder: Path, given: Weights) -> str:
    dcp.save(dict(given), checkpoint_id=folder / "dcp", no_dist=True)
    return str(folder / "dcp")


KINDS = [safetensors, hugging_face, indexed, torch_file, wrapped, dcp_folder]


@pytest.mark.parametrize("write", KINDS)
def test_each_kind_of_file_gives_the_same_model(tmp_path: Path, write: Callable[[Path, Weights], str]) -> None:
    given, model = weights(), network()
    line = load_weights(write(tmp_path, given), model, ALONE)
    assert "): 9 of 9 weights, 0 renamed, 0 cast" in line
    for name, value in model.state_dict().items():
        assert torch.equal(value, given[name]), name


def test_names_are_mapped_types_cast_and_the_report_says_so(tmp_path: Path) -> None:
    given = {f"bert.{n}": v.bfloat16() if v.is_floating_point() else v for n, v in weights().items()}
    url = safetensors(tmp_path, {**given, "pooler.weight": torch.ones(2)})
    (tmp_path / "map.yaml").write_text('"bert.*": "*"\n')
    for names in ({"bert.*": "*"}, str(tmp_path / "map.yaml")):
        model = network()
        line = load_weights(url, model, ALONE, names=names)
        assert line == f"{url} (safetensors): 9 of 9 weights, 9 renamed, 8 cast; left there: pooler.weight"
        assert torch.equal(model.state_dict()["0.weight"], given["bert.0.weight"].float())


def test_what_init_match_leaves_out_may_be_missing_or_of_another_shape(tmp_path: Path) -> None:
    given = {**weights(), "2.weight": torch.ones(5, 4)}
    del given["2.bias"]
    model = network()
    line = load_weights(torch_file(tmp_path, given), model, ALONE, ["0.*", "1.*"])
    assert line.endswith("7 of 9 weights, 0 renamed, 0 cast; not taken: 2.bias, 2.weight; left there: 2.weight")


def test_a_tied_weight_may_be_saved_under_one_name(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    model["head"].weight = model["embed"].weight
    load_weights(safetensors(tmp_path, {"embed.weight": torch.full((3, 2), 5.0)}), model, ALONE)
    assert model["head"].weight.unique().tolist() == [5.0]


@pytest.mark.parametrize(("change", "said"), [
    ({"2.weight": torch.ones(5, 4)}, r"2\.weight is \[5, 4\] there, \[2, 4\] in the model; .* init_match"),
    ({"2.weight": torch.ones(2, 4, dtype=torch.int64)}, r"2\.weight is int64 there, float32 in the model"),
    ({"2.weight": None, "head.weight": torch.ones(2, 4)},
     r"2\.weight of the model is missing there, which has head\.weight for no weight of the model; rename by init_map"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line_and_changes_nothing(
    tmp_path: Path, change: dict[str, Tensor | None], said: str
) -> None:
    given = {name: value for name, value in {**weights(), **change}.items() if value is not None}
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=said) as caught:
        load_weights(safetensors(tmp_path, given), model, ALONE)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("names", "said"), [
    ({"bertt.*": "*"}, r"'bertt\.\*' matches no name there; there are"),
    ({"0.weigt": "x"}, r"'0\.weigt' matches no name there; did you mean '0\.weight'\?"),
    ({"*": "same"}, r"'\*' and 'same' have not equally many \*"),
    ({"0.weight": "0.bias"}, r"0\.bias and 0\.weight both become 0\.bias|0\.weight and 0\.bias both become 0\.bias"),
    (["0.*"], "must be a mapping of old to new names"),
    ("/nowhere.yaml", r"init_map=/nowhere\.yaml: .*No such file"),
])  # fmt: skip
def test_a_mistake_in_the_map_is_one_line(tmp_path: Path, names: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load_weights(safetensors(tmp_path, weights()), network(), ALONE, names=names)
    assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (os.environ["EVIL"],)


@pytest.mark.parametrize("name", ["weights.pt", ".metadata"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    if name == ".metadata":
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    else:
        torch.save({"a": Evil()}, tmp_path / name)
    said = "posix.mkdir, which is no part of DCP's" if name == ".metadata" else "no file of weights that torch.load"
    with pytest.raises(CheckpointError, match=said) as caught:
        load_weights(str(tmp_path if name == ".metadata" else tmp_path / name), network(), ALONE)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil").exists()


def header(**entry: object) -> bytes:
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(("data", "said"), [
    (b"abc", "is no safetensors file"),
    ((1 << 60).to_bytes(8, "little") + b"{}", "is no safetensors file: its header has"),
    (header(data_offsets=[0, 800]), "its end is 800, not a whole number from 0 to 8"),
    (header(data_offsets=[4, 0]), "its end is 0, not a whole number from 4 to 8"),
    (header(data_offsets=[0, 4]), r"has 4 bytes, which do not make up its shape \[2\]"),
    (header(shape=[-2]), "its shape is -2"),
    (header(shape=[1 << 50]), "its shape is"),
    (header(dtype="F31"), "has the type 'F31', which is none of"),
    (header(dtype=[]), "has the type a list of 0"),
    ((2).to_bytes(8, "little") + b"[]", "is a list of 0, not an object"),
])  # fmt: skip
def test_a_damaged_header_is_refused_before_anything_is_read(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=said):
        load_weights(str(tmp_path / "a.safetensors"), network(), ALONE)


@pytest.mark.parametrize(("file", "said"), [
    ("../a.safetensors", "is no safetensors file of the folder"),
    ("a.bin", "is no safetensors file of the folder"),
    ("gone.safetensors", "names gone.safetensors, which is missing"),
    ("model.safetensors", "names other, which no file has"),
])  # fmt: skip
def test_an_index_names_files_of_its_folder_alone(tmp_path: Path, file: str, said: str) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"other": file}}))
    with pytest.raises(CheckpointError, match=said):
        load_weights(str(tmp_path), network(), ALONE)
