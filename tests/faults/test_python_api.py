"""Training from Python: scripts and notebooks start the ordinary launcher, and what cannot be written is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tools.diff import differences
from support import PATHS

pytestmark = pytest.mark.process

COMMON = """
import json, sys
import numpy as np, pandas as pd, torch
from torch import nn
from torch.nn import functional as F
import everstep
from everstep import Loss

WIDTH = 8
rng = np.random.default_rng(0)
X = rng.normal(size=(96, 5)); y = (X[:, 0] > 0).astype(np.int64)
frame = pd.DataFrame(X, columns=list("abcde")).assign(label=y)
KEYS = dict(global_batch=16, micro_batch=8, checkpoint={"every": 10, "local": {"every": None}})

def layers(n):
    return [nn.Linear(WIDTH, WIDTH) for _ in range(n)]

class Net(nn.Module):
    def __init__(self, depth=1):
        super().__init__()
        self.depth = depth
        self.body = nn.Sequential(nn.Linear(5, WIDTH), nn.Tanh(), *layers(depth), nn.Linear(WIDTH, 2))

    def forward(self, x):
        return self.body(x)

class Task:
    def __init__(self, depth=1):
        self.depth = depth

    def model(self):
        return Net(self.depth)

    def loss(self, model, batch):
        return Loss(F.cross_entropy(model(batch["features"]), batch["target"], reduction="sum"), len(batch["target"]))

    def evaluate(self, model, batch):
        return self.loss(model, batch)
"""


def script(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Run a script with COMMON before it, as a user does."""
    file = folder / "script.py"
    file.write_text(COMMON + textwrap.dedent(text))
    env = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(file)], cwd=folder, env=env, capture_output=True, text=True, timeout=240)


def printed(folder: Path, text: str) -> dict[str, object]:
    """Return what a script that succeeds prints as its last line, in JSON."""
    ended = script(folder, text)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found: dict[str, object] = json.loads(ended.stdout.splitlines()[-1])
    return found


def test_a_task_of_a_script_trains_on_two_processes_and_its_run_has_metrics_best_and_model(tmp_path: Path) -> None:
    found = printed(
        tmp_path,
        """
        run = everstep.train(Task(depth=2), data=(X, y), validation=0.25, steps=20, nproc=2, run="first",
                             evaluate={"every": 10}, **KEYS)
        model = run.model()
        with torch.no_grad():
            wrong = int((model(torch.tensor(X, dtype=torch.float32)).argmax(1).numpy() != y).sum())
        measured = run.evaluate("best", by="target")["sets"]["validation"]
        print(json.dumps({"state": run.state, "step": run.step, "depth": model.depth, "wrong": wrong,
                          "slices": {label: part["samples"] for label, part in measured["slices"].items()},
                          "same": abs(measured["metrics"]["loss"]["value"] / run.best["value"] - 1) < 1e-5,
                          "best": run.best["step"], "columns": sorted(run.metrics.columns), "again": repr(
                          everstep.Run("first"))}))
        """,
    )
    assert (found["state"], found["step"], found["depth"]) == ("done", 20, 2)
    assert found["best"] in (10, 20)
    assert found["same"]
    assert sum(found["slices"].values()) > 0  # type: ignore[attr-defined]
    assert {"loss", "lr", "evaluate/loss"} <= set(found["columns"])  # type: ignore[call-overload]
    assert found["again"] == "Run('runs/first', done, step 20)"
    assert "Net" in (tmp_path / "runs/first/project/run_task.py").read_text()


def test_a_run_that_python_started_is_resumed_by_the_command_line_to_the_bits_of_one_in_one_go(tmp_path: Path) -> None:
    printed(
        tmp_path,
        """
        everstep.train(Task(), data=(X, y), steps=20, run="whole", **KEYS)
        run = everstep.train(Task(), data=(X, y), steps=10, run="parts", **KEYS)
        print(json.dumps({"step": run.step}))
        """,
    )
    words = [sys.executable, "-m", "everstep.launch", "resume", "parts", "steps=20"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(words, cwd=tmp_path, env={**env, "PYTHONPATH": PATHS}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    runs = [locate(str(tmp_path / "runs" / name)) for name in ("whole", "parts")]
    assert list(differences(*runs)) == []


def test_a_module_that_was_changed_since_runs_only_with_trust(tmp_path: Path) -> None:
    printed(
        tmp_path,
        """
        run = everstep.train(Task(), data=(X, y), steps=10, run="mine", **KEYS)
        print(json.dumps({"step": run.step}))
        """,
    )
    module = tmp_path / "runs/mine/project/run_task.py"
    module.write_text(module.read_text() + "open('ran', 'w')\n")
    words = [sys.executable, "-m", "everstep.launch", "resume", "mine", "steps=20"]
    env = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
    refused = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "it would run" in refused.stderr
    assert "project/run_task.py" in refused.stderr
    assert not (tmp_path / "ran").exists()
    trusted = subprocess.run([*words, "--trust"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert trusted.returncode == 0, trusted.stderr
    assert (tmp_path / "ran").exists()


def test_the_same_call_again_goes_on_and_one_with_other_code_or_data_is_refused(tmp_path: Path) -> None:
    found = printed(
        tmp_path,
        """
        everstep.train(Task(), data=(X, y), steps=10, run="r", **KEYS)
        steps = everstep.train(Task(), data=(X, y), steps=20, run="r", **KEYS).step
        refused = []
        for task, data in [(Task(), (X + 1, y)), (Net, (X, y))]:
            try:
                if task is Net:
                    everstep.train(model=Net, loss=F.cross_entropy, data=data, run="r", **KEYS)
                else:
                    everstep.train(task, data=data, run="r", **KEYS)
            except everstep.ConfigError as error:
                refused.append(str(error))
        print(json.dumps({"steps": steps, "refused": refused}))
        """,
    )
    assert found["steps"] == 20
    assert [("differs" in str(each), "another run=" in str(each)) for each in found["refused"]] == [(True, True)] * 2  # type: ignore[attr-defined]


def test_a_module_with_a_loss_function_starts_from_its_own_weights_and_a_frame_gives_the_columns(
    tmp_path: Path,
) -> None:
    found = printed(
        tmp_path,
        """
        def distance(output, target):
            return (output.argmax(1) - target).abs().float()

        net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Dropout(0.1), nn.Linear(4, 2, bias=False))
        run = everstep.train(model=net, loss=nn.CrossEntropyLoss(), metrics={"distance": distance}, data=frame,
                             target="label", validation=0.25, steps=1, run="m", optimizer={"lr": 0.0}, **KEYS)
        same = all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), run.model().state_dict().values()))
        print(json.dumps({"same": same, "columns": sorted(run.metrics.columns)}))
        """,
    )
    assert found["same"] is True
    assert {"evaluate/accuracy", "evaluate/distance"} <= set(found["columns"])  # type: ignore[call-overload]


def test_a_module_defined_in_an_indented_block_is_given_in_the_place_of_a_task(tmp_path: Path) -> None:
    found = printed(
        tmp_path,
        """
        if __name__ == "__main__":
            class Within(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.net = nn.Linear(5, 2)
                    self.words = '''two
                        lines'''

                def forward(self, x):
                    return self.net(x)

            run = everstep.train(Within(), loss=F.cross_entropy, data=(X, y), steps=1, run="m", **KEYS)
            print(json.dumps({"words": run.model().words}))
        """,
    )
    assert found["words"] == "two\n                lines"
    # There is no validation set, so the samples that its export is compared on are those of training.
    words = [sys.executable, "-m", "everstep.launch", "export", "m", "--format", "pt2", "--out", "exported"]
    env = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert "outputs for 96 samples are equal" in ended.stdout, ended.stderr


def test_datasets_of_torch_and_sparse_matrices_train(tmp_path: Path) -> None:
    found = printed(
        tmp_path,
        """
        import scipy.sparse
        from torch.utils.data import Dataset

        class Pairs(Dataset):
            def __len__(self):
                return len(X)

            def __getitem__(self, n):
                return torch.tensor(X[n], dtype=torch.float32), int(y[n])

        kinds = {"dense": (X, y), "sparse": (scipy.sparse.csr_matrix(X), y), "torch": Pairs()}
        losses = [float(everstep.train(Task(), data=data, steps=10, run=name, **KEYS).metrics["loss"].iloc[-1])
                  for name, data in kinds.items()]
        print(json.dumps({"losses": losses}))
        """,
    )
    first, *others = found["losses"]  # type: ignore[misc]
    assert others == [first] * 2


MISTAKES = {
    "uses an object of the script": (
        "table = pd.DataFrame()\nclass Bad(Task):\n    def model(self):\n        return nn.Linear(len(table), 1)\n"
        "everstep.train(Bad(), data=(X, y))",
        "task: Bad uses table, a DataFrame",
    ),
    "an argument that is not kept": (
        "class Bad(Task):\n    def __init__(self, width):\n        self.net = width\n"
        "everstep.train(Bad(3), data=(X, y))",
        "self.width = width",
    ),
    "an argument that the instance keeps changed": (
        "class Bad(Task):\n    def __init__(self, depth):\n        self.depth = 2 * depth\n"
        "everstep.train(Bad(3), data=(X, y))",
        "Bad.depth is 6, and 12",
    ),
    "an attribute that was set afterwards": (
        "task = Task()\ntask.temperature = 2.0\neverstep.train(task, data=(X, y))",
        "Task.temperature is 2.0, and None",
    ),
    "weights that were loaded afterwards": (
        "class Bad(Task):\n    def __init__(self):\n        self.teacher = nn.Linear(2, 2)\n"
        "everstep.train(Bad(), data=(X, y))",
        "Bad.teacher has values that the run would not have",
    ),
    "a layer that was changed afterwards": (
        "net = nn.Sequential(nn.Linear(5, 2), nn.Dropout(0.1))\nnet[1].inplace_too = 3\n"
        "everstep.train(model=net, loss=F.cross_entropy, data=(X, y))",
        "inplace_too is 3, and None",
    ),
    "no task": ("everstep.train(data=(X, y))", "a task, or model= and loss="),
    "no loss": ("everstep.train(model=Net(), data=(X, y))", "also needs loss="),
    "a module as a task": ("everstep.train(Net(), data=(X, y))", "give loss="),
    "a class that uses a variable of the function around it": (
        "def make():\n    n = 5\n    class Inner(nn.Module):\n        def __init__(self):\n"
        "            super().__init__()\n            self.net = nn.Linear(n, 2)\n    return Inner\n"
        "everstep.train(make()(), loss=F.cross_entropy, data=(X, y))",
        "Inner uses n of the function around it",
    ),
    "a lambda": ("everstep.train(model=lambda: Net(), loss=F.mse_loss, data=(X, y))", "is a lambda"),
    "hooks": (
        "net = Net()\nnet.register_forward_hook(print)\neverstep.train(model=net, loss=F.mse_loss, data=(X, y))",
        "has hooks",
    ),
    "a target that is no column": (
        "everstep.train(model=Net, loss=F.cross_entropy, data=frame, target='labl')",
        "no such column",
    ),
    "data of no kind": ("everstep.train(Task(), data=3)", "data is a int"),
    "random samples": (
        "class Bad:\n    def __len__(self):\n        return 9\n    def __getitem__(self, n):\n"
        "        return rng.normal(size=3), 0\neverstep.train(Task(), data=Bad())",
        "draws random numbers",
    ),
    "a mistyped key": ("everstep.train(Task(), data=(X, y), optimzer={'lr': 1})", "optimzer"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_write(tmp_path: Path, name: str) -> None:
    text, expected = MISTAKES[name]
    body = textwrap.indent(text, "    ")
    ended = script(tmp_path, f"try:\n{body}\nexcept everstep.EverstepError as error:\n    print('REFUSED', error)\n")
    assert ended.returncode == 0, ended.stderr
    refused = ended.stdout.rpartition("REFUSED ")[2].strip()
    assert expected in refused, ended.stdout
    assert "\n" not in refused


def test_a_notebook_defines_trains_shows_and_uses_a_model(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    cells = [
        COMMON,
        "run = everstep.train(Task(), data=(X, y), validation=0.25, steps=30, nproc=2, run='cell', **KEYS)",
        "live = everstep.train(Task(), data=(X, y), steps=100000, run='live', wait=False, **KEYS)\n"
        "import time\nwhile live.is_running and live.step < 20: time.sleep(0.05)\nlive.stop()",
        "print(json.dumps({'step': run.step, 'best': run.best['step'], 'state': live.state, "
        "'metrics': len(live.metrics), 'cuda': torch.cuda.is_initialized()}))",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    os.environ["PYTHONPATH"], before = PATHS, os.environ.get("PYTHONPATH", "")
    try:
        nbclient.NotebookClient(book, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    finally:
        os.environ["PYTHONPATH"] = before
    found = json.loads(book.cells[3].outputs[-1].text.splitlines()[-1])
    assert (found["step"], found["best"], found["state"], found["cuda"]) == (30, 30, "stopped", False)
    shown = [output for output in book.cells[1].outputs if output.output_type == "display_data"]
    assert '<progress value="30" max="30"' in shown[0].data["text/html"]


def test_another_optimizer_does_not_inherit_the_arguments_of_the_default_one(tmp_path: Path) -> None:
    found = printed(
        tmp_path,
        """
        sgd = {"_target_": "torch.optim.SGD", "lr": 0.1}
        run = everstep.train(Task(), data=(X, y), steps=2, run="s", optimizer=sgd, **KEYS)
        print(json.dumps({"step": run.step}))
        """,
    )
    assert found["step"] == 2
