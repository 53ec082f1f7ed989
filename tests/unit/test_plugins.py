"""A config may name only what was allowed, and what it names wrongly is said in one line."""

from __future__ import annotations

import base64
import functools
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from everstep import frozen_config
from everstep.errors import ConfigError
from everstep.trainer.plugins import check_allowed, instantiate

SHOP = """
from pathlib import Path
from torch import nn
Path(__file__).with_name("imported").touch()

class Thing:
    def __init__(self, width, depth=2, *, inner=None):
        if width < 0:
            raise ValueError("width must\\nbe positive")
        assert depth < 9, "depth is too large"
        self.width, self.depth, self.inner = width, depth, inner

class Net(nn.Module):
    pass

class Anything:
    def __init__(self, **options):
        self.options = options

def opens(path):
    return open(path)

def broken():
    raise ZeroDivisionError("a fault of the plug-in, not of the config")

def _Private():
    return 7

NUMBER = 3
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the user's, `shop`; beside it a file appears when it is imported."""
    package = tmp_path / "shop"
    package.mkdir()
    (package / "__init__.py").write_text(SHOP)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package / "imported"  # type: ignore[misc]
    sys.modules.pop("shop", None)


def refused(node: Any, plugins: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as error:
        instantiate(node, "task", plugins)
    assert "\n" not in str(error.value)
    return str(error.value)


OUTSIDE = [
    "os.system", "builtins.open", "builtins.exec", "subprocess.Popen", "pickle.loads", "torch.load", "torch.hub.load",
    "torch.os.system", "everstep.storage.retries", "everstep.trainer.worker.os.system", "everstep.dataset.x",
    "everstep.dataset.prepare.prepare_rows", "everstep.trainer.data.address_gather.gather_rows", "torch.nnx.Linear",
    "everstep.prepare_rows", "everstep.trainer.data.cli.run", "everstep.trainer.tasks.language.LanguageModel",
    "torch.utils.data.datapipes.utils.decoder.basichandlers", "shop.Thing", "shopping.Thing", "nodots", "", "torch.nn",
]  # fmt: skip


@pytest.mark.parametrize("target", [*OUTSIDE, 5, None, ["torch.nn.Linear"]])
def test_a_target_outside_the_allowed_packages_is_refused_and_nothing_imported(shop: Path, target: object) -> None:
    before = set(sys.modules)
    for node in ({"_target_": target}, {"deep": [1, {"er": {"_target_": target}}]}):
        with pytest.raises(ConfigError, match="is in none of the packages that this run may use"):
            check_allowed(node, "task", ())
    assert "is in none of the packages" in refused({"_target_": target})
    assert set(sys.modules) == before
    assert not shop.exists()


@pytest.mark.parametrize(
    "target",
    [
        "torch.nn.os.system", "torch.nn.modules.module.torch.load", "torch.optim.optimizer.os.system",
        "torch.nn.modules.module.functools.partial", "everstep.tasks.lazy",
        "everstep.models.annotations.getdoc", "everstep.data.TYPE_CHECKING", "everstep.data.lazy",
        "torch.nn.Linear.__init__.__globals__", "torch.nn.Linear.__class__", "torch.nn.Linear.__subclasses__",
        "torch.nn.functional.handle_torch_function",
    ],
)  # fmt: skip
def test_what_an_allowed_package_merely_imports_is_refused(target: str) -> None:
    assert "task._target_=" in refused({"_target_": target})


def test_a_frozen_config_cannot_unpickle_through_an_allowed_package(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "boom"),)

    hostile = base64.b64encode(pickle.dumps(Bomb())).decode()
    text = "data: {_target_: torch.utils.data.datapipes.utils.decoder.basichandlers, extension: pickle, "
    with pytest.raises(ConfigError, match="it has a tag"):
        frozen_config.thaw(text + f"data: !!binary {hostile}}}")
    refused(yaml.safe_load(text + f"data: !!binary {hostile}}}")["data"])
    assert not (tmp_path / "boom").exists()


def test_private_names_of_an_allowed_package_are_refused_but_not_the_users_own(shop: Path) -> None:
    target = "torch.nn.attention._fa3._fa3_import_module"
    with pytest.raises(ConfigError, match="is a private name"):
        check_allowed({"_target_": target, "module_path": "shop"}, "task", ())
    assert "is a private name" in refused({"_target_": target, "module_path": "shop"})
    assert not shop.exists()
    assert instantiate({"_target_": "shop._Private"}, "task", ["shop"]) == 7


def test_a_package_of_the_users_is_usable_when_it_is_named_only(shop: Path) -> None:
    node = {"_target_": "shop.Thing", "width": 3}
    assert "name your package with 'plugins=[shop]'" in refused(node)
    assert not shop.exists()
    assert instantiate(node, "task", ["shop"]).width == 3
    assert shop.exists()


def test_what_a_users_package_merely_imports_is_refused_too(shop: Path) -> None:
    assert "is not a class or function that its package defines" in refused({"_target_": "shop.Path"}, ("shop",))
    assert "is not a class or function" in refused({"_target_": "shop.NUMBER"}, ("shop",))


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"_target_": "torch.nn.Linear", "in_feature": 2, "out_features": 2},
         "task.in_feature: torch.nn.Linear takes no 'in_feature'; did you mean 'in_features'?"),
        ({"_target_": "torch.nn.Linear", "in_features": 2},
         "task: torch.nn.Linear needs out_features; set task.out_features"),
        ({"_target_": "torch.nn.Linaer"}, "torch.nn has no 'Linaer'; did you mean 'Linear'?"),
        ({"_target_": "everstep.models.GTP"}, "everstep.models has no 'GTP'; did you mean 'GPT'?"),
        ({"_target_": "everstep.trainer.models.gpt.GPT"}, "torch.optim); choose a public name"),
        ({"_target_": "everstep.models."}, "everstep.models has no ''"),
        ({"_target_": "everstep.models..GPT"}, "everstep.models"),
        ({"_target_": "torch.nn.GroupNorm", "num_groups": 2, "num_channels": 3},
         "task (torch.nn.GroupNorm): num_channels (3) must be divisible by num_groups (2)"),
        ({"_target_": "torch.nn.Sequential", "args": [1]}, "torch.nn.Sequential takes no 'args'"),
        ({"width": 3}, "task has no _target_"),
        (None, "task has no _target_"),
        ({"_target_": "torch.nn.ReLU", "a.b": 1}, "task.a.b: torch.nn.ReLU takes no 'a.b'"),
    ],
)  # fmt: skip
def test_a_slip_gets_one_line_with_the_nearest_word(node: dict[str, object], said: str) -> None:
    assert said in refused(node)


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"_target_": "shop.Thing", "width": -1}, "task (shop.Thing): width must be positive"),
        ({"_target_": "shop.Thing", "width": 1, "depth": 9}, "task (shop.Thing): depth is too large"),
        ({"_target_": "shop.Thing", "width": "a"}, "task (shop.Thing): '<' not supported between"),
        ({"_target_": "shop.opens", "path": "/nosuch/file"}, "No such file or directory: '/nosuch/file'"),
    ],
)
def test_what_a_constructor_says_of_its_arguments_becomes_one_line(
    shop: Path, node: dict[str, object], said: str
) -> None:
    assert said in refused(node, ("shop",))


def test_a_fault_of_the_plug_in_itself_keeps_its_traceback(shop: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        instantiate({"_target_": "shop.broken"}, "task", ["shop"])


def test_a_package_that_is_not_installed_is_said_so() -> None:
    assert "there is no module 'nosuch_package'; is your package installed?" in refused(
        {"_target_": "nosuch_package.Task"}, ("nosuch_package",)
    )


def test_an_import_that_fails_inside_a_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text("import nosuch_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "cannot import needy: No module named 'nosuch_dependency'" in refused({"_target_": "needy.T"}, ("needy",))


def test_inner_nodes_are_made_first_wherever_they_stand(shop: Path) -> None:
    inner = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}
    node = {"_target_": "shop.Thing", "width": 1, "inner": {"list": [inner, 7], "deep": {"er": inner}}}
    made = instantiate(node, "task", ["shop"]).inner
    assert isinstance(made["list"][0], nn.Linear)
    assert isinstance(made["deep"]["er"], nn.Linear)
    assert made["list"][1] == 7


def test_an_inner_node_is_named_by_its_whole_key_and_held_to_the_same_rule(shop: Path) -> None:
    inner = {"_target_": "torch.nn.Linear", "in_features": 2}
    node = {"_target_": "shop.Thing", "width": 1, "inner": {"list": [inner]}}
    assert "set task.inner.list[0].out_features" in refused(node, ("shop",))
    inner["_target_"] = "os.system"
    assert "task.inner.list[0]._target_='os.system' is in none" in refused(node, ("shop",))


def test_partial_gives_a_factory_that_may_lack_arguments_but_takes_no_wrong_one() -> None:
    node = {"_target_": "torch.nn.Linear", "_partial_": True, "in_features": 2}
    factory = instantiate(node, "task", ())
    assert isinstance(factory, functools.partial)
    assert factory(out_features=5).out_features == 5
    assert "takes no 'wdth'" in refused({**node, "wdth": 1})


def test_runtime_objects_go_only_where_the_constructor_asks_for_them(shop: Path) -> None:
    made = instantiate({"_target_": "shop.Thing", "width": 1}, "task", ["shop"], inner="given", other="not")
    assert made.inner == "given"
    assert instantiate({"_target_": "shop.Anything", "a": 1}, "task", ["shop"], b=2).options == {"a": 1}


def test_a_function_that_is_a_hook_itself_is_told_how_to_be_one() -> None:
    with pytest.raises(ConfigError, match="or _partial_: true if the function itself is the hook"):
        instantiate({"_target_": "torch.nn.Linear", "in_features": 2}, "hooks[0]", ())


@pytest.mark.parametrize(
    "target",
    [
        "torch.nn.Module.apply",
        "torch.nn.Module.compile",
        "torch.nn.Linear.load_state_dict",
        "torch.nn.parallel.data_parallel",
        "torch.optim.swa_utils.update_bn",
        "torch.nn.utils.prune.custom_from_mask",
        "torch.nn.Parameter",
    ],
)
def test_of_torch_only_the_parts_of_a_model_and_of_its_training_may_be_named(target: str) -> None:
    node = {"_target_": target, "_partial_": True}
    assert "is no module, optimizer or scheduler of torch" in refused(node)


def test_the_users_own_choice_of_torch_allows_all_of_it() -> None:
    assert instantiate({"_target_": "torch.nn.Module.compile", "_partial_": True}, "hooks[0]", ["torch"])


@pytest.mark.parametrize("target", ["shop.nn.Module.compile", "shop.nn.Module.apply", "shop.Net.compile"])
def test_a_package_that_imports_torch_opens_no_more_of_it(shop: Path, target: str) -> None:
    assert "is no module, optimizer or scheduler" in refused({"_target_": target, "_partial_": True}, ("shop",))


def test_the_parts_of_torch_may_be_named_through_a_package_too(shop: Path) -> None:
    assert instantiate({"_target_": "shop.nn.ReLU"}, "model", ["shop"])
    assert instantiate({"_target_": "shop.nn.functional.relu", "_partial_": True}, "model.activation", ["shop"])


def test_activations_of_torch_may_be_named() -> None:
    made = instantiate({"_target_": "torch.nn.functional.gelu", "_partial_": True}, "model.activation", [])
    assert made(torch.zeros(1)) == 0


def test_a_config_cannot_have_torchs_compiler_run_a_file_of_the_folder(tmp_path: Path) -> None:
    compiler = {"cpp.cxx": [str(tmp_path / "x.sh")]}
    options = {"_target_": "torch.nn.Module.compile", "_partial_": True, "backend": "inductor", "options": compiler}
    node = {"_target_": "torch.nn.Module.apply", "self": {"_target_": "torch.nn.ReLU"}, "fn": options}
    assert "is no module, optimizer or scheduler of torch" in refused(node)
