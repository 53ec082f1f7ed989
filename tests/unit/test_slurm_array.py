"""The sbatch command of a batch of runs, and how the elements of an array are told apart; no cluster is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from everstep.launch.config import job_config
from everstep.launch.job_start.allocation import Allocation
from everstep.launch.schedulers.base import Batch, Batching
from everstep.launch.schedulers.job import JobHandle, JobState
from everstep.launch.schedulers.slurm.jobs_json import jobs
from everstep.launch.schedulers.slurm.sbatch import script, spans
from everstep.launch.schedulers.slurm.scheduler import Slurm

GOLDEN = Path(__file__).parent.parent / "golden/slurm/array.txt"
BATCH = Batch("lr", "/runs/lr", "everstep-1", (0, 1, 2, 3, 5), 4, tuple(
    JobHandle("slurm", "c", id) for id in ("7_0", "7_3", "9")))  # fmt: skip
JOB = job_config({"scheduler": "slurm", "python": "/venv/bin/python", "nodes": 2, "nproc": 8, "time": "1d"})


def fake(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = folder / name
    command.write_text(f"#!/bin/sh\n{text}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_whole_command() -> None:
    words = [word.replace(str(script()), "run.sbatch") for word in Slurm().render_batch(JOB, BATCH).argv]
    assert "\n".join(words) + "\n" == GOLDEN.read_text()


def test_slurm_takes_batches_and_its_script_is_the_one_of_a_single_run() -> None:
    assert isinstance(Slurm(), Batching)
    assert Slurm().render_batch(JOB, BATCH).files == {"run.sbatch": script().read_text()}


def test_a_container_sees_the_list_and_all_run_folders() -> None:
    job = job_config({"scheduler": "slurm", "image": "train.sif", "runtime": "apptainer"})
    binds = next(word for word in Slurm().render_batch(job, BATCH).argv if "/runs/lr:" in word)
    assert binds.endswith("/runs/lr:/runs/lr")


@pytest.mark.parametrize(
    ("numbers", "text"), [((0,), "0"), ((0, 1), "0-1"), ((5, 0, 1, 2), "0-2,5"), ((1, 3, 4), "1,3-4")]
)
def test_elements_are_written_as_spans(numbers: tuple[int, ...], text: str) -> None:
    assert spans(numbers) == text


@pytest.mark.parametrize(
    ("config", "largest"),
    [
        ("ClusterName = c\nMaxArraySize            = 1001\nSchedulerParameters = bf_interval=2", 1001),
        ("MaxArraySize = 1001\nSchedulerParameters = bf_interval=2,max_array_tasks=100,x", 100),
        ("MaxArraySize = 0\nSchedulerParameters     = (null)", 0),
    ],
)
def test_the_site_says_how_large_an_array_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, largest: int
) -> None:
    fake(tmp_path, "scontrol", f"cat <<E\n{config}\nE", monkeypatch)
    assert Slurm().largest_batch() == largest


def entry(array: int, comment: str = "everstep-1", **more: object) -> str:
    known = {"job_id": array, "array_job_id": array, "array_task_id": None, "array_task_string": "", "comment": comment,
             "job_state": "PENDING", "cluster": "c"}  # fmt: skip
    return json.dumps({**known, **more})


def test_elements_that_wait_have_one_entry_and_are_told_apart_all_the_same() -> None:
    waiting, running = entry(4, array_task_string="1-3,9,20-30:5%2"), entry(4, array_task_id=0, job_state="RUNNING")
    found = jobs(f'{{"jobs": [{waiting}, {running}]}}')
    assert [job.id for job in found] == ["4_1", "4_2", "4_3", "4_9", "4_20", "4_25", "4_30", "4_0"]
    assert {job.status.state.value for job in found[:-1]} == {"pending"}


@pytest.mark.parametrize(("token", "handle"), [("everstep-1", "4"), ("everstep-1.2", "4_2"), ("everstep-2", None)])
def test_an_array_is_found_by_its_token_and_an_element_by_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, handle: str | None
) -> None:
    text = f'{{"jobs": [{entry(3, "other")}, {entry(4, array_task_id=7)}, {entry(4, array_task_string="0-6")}]}}'
    fake(tmp_path, "squeue", f"cat <<'E'\n{text}\nE", monkeypatch)
    fake(tmp_path, "sacct", "exit 1", monkeypatch)
    found = Slurm().find(token)
    assert found == (None if handle is None else JobHandle("slurm", "c", handle))


def test_squeue_is_asked_not_to_cut_a_long_list_of_elements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut, whole = entry(4, array_task_string="0,2,4..."), entry(4, array_task_string="0,2,4,6")
    text = f"""[ "$SLURM_BITSTR_LEN" = 0 ] && echo '{{"jobs": [{whole}]}}' || echo '{{"jobs": [{cut}]}}'"""
    fake(tmp_path, "squeue", text, monkeypatch)
    last = JobHandle("slurm", "c", "4_6")
    assert Slurm().status([last])[last].state is JobState.pending


def test_an_element_is_a_job_of_its_own_to_its_nodes_though_one_has_the_arrays_number() -> None:
    environment = {"SLURM_JOB_ID": "4", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert Allocation.of(environment).job == "4"
    element = {**environment, "SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_ID": "7"}
    assert Allocation.of(element).job == "4_7"


def test_a_launcher_within_an_array_does_not_make_its_jobs_elements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, "sbatch", 'echo "1;${SLURM_ARRAY_TASK_ID:-none}"', monkeypatch)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert Slurm().submit(Slurm().render_batch(JOB, BATCH)).cluster == "none"


def test_a_job_gets_a_token_of_its_own_in_sbatchs_environment_and_in_no_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, "sbatch", f'echo "$EVERSTEP_RUN_TOKEN $*" >>{tmp_path}/seen; echo "1;c"', monkeypatch)
    for _ in range(2):
        Slurm().submit(Slurm().render_batch(JOB, BATCH))
    monkeypatch.setenv("EVERSTEP_RUN_TOKEN", "u" * 32)
    Slurm().submit(Slurm().render_batch(JOB, BATCH))
    tokens, arguments = zip(*(line.split(" ", 1) for line in (tmp_path / "seen").read_text().splitlines()), strict=True)
    assert [len(token) for token in tokens] == [64, 64, 32]
    assert len(set(tokens)) == 3
    assert tokens[2] == "u" * 32
    assert not [token for token in tokens if token in " ".join(arguments)]


def test_the_script_asks_for_the_element_by_its_number_in_the_list(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("/runs/a\n/runs/b\n")
    asked = [sys.executable, "-m", "everstep.launch.restart.decide", "element", f"{tmp_path}/list"]
    done = subprocess.run([*asked, "1"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "/runs/b\n")
    assert subprocess.run([*asked, "2"], capture_output=True, check=False).returncode == 2
