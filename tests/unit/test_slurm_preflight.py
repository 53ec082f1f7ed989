"""What stands against a job before Slurm sees it. The outputs were recorded from a real Slurm 22.05; those of newer
ones have the form that their schema says."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from everstep.errors import ConfigError
from everstep.launch.config import JobConfig
from everstep.launch.schedulers.slurm.commands import Answer, ask
from everstep.launch.schedulers.slurm.partitions import clock_s, gpus_of, nodes_of, partitions_of, plain
from everstep.launch.schedulers.slurm.preflight import megabytes, problems
from everstep.launch.schedulers.slurm.sbatch import request_flags
from everstep.launch.schedulers.slurm.scheduler import Slurm

RECORDED = Path(__file__).parent.parent / "recorded" / "slurm-22.05"


def Job(nodes: int | str = 2, **keys: Any) -> JobConfig:  # noqa: N802: reads as a type in the tables below
    """Make a job for two CPU nodes unless a test says otherwise."""
    return JobConfig(scheduler="slurm", nodes=nodes, grace_s=0, **({"nproc": 2} | keys))


class Recorded:
    """Answers as the recorded cluster did: n1, n2 and n3 with 4 CPUs, 4000 MB and 2 GPUs each; main is the default,
    `short` has n1 and n2, limits, and names; `closed` is down."""

    def __init__(self, nodes: str = "sinfo.json", test_only: Answer | None = None) -> None:
        self.nodes = (RECORDED / nodes).read_text()
        self.test_only = test_only or Answer(0, err="sbatch: Job 1 to start at 2026-11-25T02:09:08 using 2 processors")
        self.asked: list[list[str]] = []

    def __call__(self, argv: Sequence[str]) -> Answer:
        self.asked.append(list(argv))
        if argv[0] == "sbatch":
            return self.test_only
        return Answer(0, self.nodes if argv[0] == "sinfo" else (RECORDED / "partitions.txt").read_text())


def refused(line: str) -> Answer:
    return Answer(1, err=f"{line}\n")


def test_a_job_that_fits_has_no_problem_and_slurm_is_asked_last() -> None:
    cluster = Recorded()
    assert problems(Job(time="1h"), cluster) == []
    assert [argv[0] for argv in cluster.asked] == ["scontrol", "sinfo", "scontrol", "sbatch"]
    assert cluster.asked[-1][1:] == [
        "--test-only",
        "--nodes=2",
        "--time=60",
        "--gpus-per-node=2",
        "--signal=B:USR1@30",
        "--wrap=true",
    ]


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (Job(partition="man"), "job.partition='man': there is no such partition; did you mean 'main'?; there are main, "
                               "spot, urgent, short, closed"),
        (Job(1, partition="closed"), "job.partition='closed': it is DOWN; choose another"),
        (Job(partition="short", time="2h"), "job.time=2h: partition short allows at most 1 h; change job.time"),
        (Job(9), "job.nodes=9: partition main has 3 nodes; change job.nodes"),
        (Job("3:4", partition="short"), "job.nodes=3: partition short has 2 nodes; change job.nodes"),
        (Job(partition="short", account="mine"), "job.account='mine': partition short allows only lab; "
                                                      "change job.account"),
        (Job(partition="short", qos="low"), "job.qos='low': partition short allows only high; change job.qos"),
        (Job(gpus=3), "job.gpus=3: nodes of partition main have at most 2 GPUs; change job.gpus"),
        (Job(nproc=8), "job.gpus=8 (as many as job.nproc): nodes of partition main have at most 2 GPUs; "
                       "change job.gpus"),
        (Job(cpus=9), "job.cpus=9: nodes of partition main have at most 4 CPUs; change job.cpus"),
        (Job(mem="8G"), "job.mem=8G: nodes of partition main have at most 4000 MB of memory; change job.mem"),
        (Job(partition="short", mem="3000"), "job.mem=3000: nodes of partition short have at most 2000 MB of memory; "
                                             "change job.mem"),
        (Job(3, exclude=["n2"]), "job.nodes=3: only 2 nodes of partition main have what is asked of each, without "
                                      "n2; change job.nodes"),
        (Job("1:2", exclude=["n1", "n2", "n3"]), "job.nodes=1: only 0 nodes of partition main have what is asked of "
                                                  "each, without n1 n2 n3; change job.nodes"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_with_the_key(job: Job, said: str) -> None:
    assert problems(job, Recorded()) == [said]


def test_all_that_does_not_fit_is_told_at_once() -> None:
    found = problems(Job(9, time="2h", partition="short", cpus=9, qos="low"), Recorded())
    assert [line.split("=")[0] for line in found] == ["job.time", "job.nodes", "job.qos", "job.cpus"]


def test_more_processes_than_cpus_are_a_note_and_no_problem() -> None:
    told: list[str] = []
    assert problems(Job(nproc=400, gpus=0), Recorded(), note=told.append) == []
    assert told == ["job.nproc=400: the nodes have at most 4 CPUs, so processes wait for each other's; "
                    "change job.nproc if that is not meant"]  # fmt: skip
    assert problems(Job(nproc=4, gpus=0), Recorded(), note=told.append) == []
    assert len(told) == 1


def test_nodes_that_sinfo_does_not_show_may_have_what_the_others_lack() -> None:
    """Slurm shows those of a cloud only while they are switched on; the partition counts them all."""
    cluster = Recorded()
    shown = json.loads(cluster.nodes)
    cluster.nodes = json.dumps({**shown, "nodes": shown["nodes"][:2]})
    assert problems(Job(gpus=8), cluster) == []
    assert cluster.asked[-1][:2] == ["sbatch", "--test-only"]


def test_one_of_several_partitions_that_takes_the_job_is_enough() -> None:
    assert problems(Job(3, partition="short,main"), Recorded()) == []
    assert problems(Job(3, partition="closed,short"), Recorded())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("allocation failure: Invalid feature specification", "job.constraint: Slurm refuses the job: Invalid feature"),
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
         "job.account: Slurm refuses the job: Batch job submission failed"),
        ("allocation failure: Requested reservation is invalid", "job.reservation: Slurm refuses"),
        ("allocation failure: Invalid node name specified", "job.exclude: Slurm refuses"),
        ("allocation failure: Requested node configuration is not available",
         "job.nodes, job.gpus, job.cpus or job.mem: Slurm refuses"),
        ("allocation failure: something new", "job: Slurm refuses the job: something new"),
    ],
)  # fmt: skip
def test_what_only_slurm_knows_is_told_in_its_words(line: str, said: str) -> None:
    (found,) = problems(Job(), Recorded(test_only=refused(line)))
    assert found.startswith(said)


def test_nodes_that_are_out_of_service_today_are_no_reason_not_to_queue() -> None:
    cluster = Recorded(
        "sinfo_drained.json", refused("allocation failure: Requested node configuration is not available")
    )
    assert problems(Job(3), cluster) == []


def test_a_controller_that_is_away_is_one_line() -> None:
    said = "slurm_load_partitions error: Unable to contact slurm controller (connect failure)"
    assert problems(Job(), lambda _: refused(said)) == [f"job.scheduler='slurm': {said}"]


def test_a_machine_without_slurm_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no scontrol here; submit on a login node"):
        Slurm().problems(Job())


def test_the_commands_on_the_path_are_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, does in (
        ("scontrol", f"cat {RECORDED}/partitions.txt"),
        ("sinfo", f"cat {RECORDED}/sinfo.json"),
        ("sbatch", "echo 'allocation failure: Invalid feature specification' >&2; exit 1"),
    ):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{does}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert problems(Job(constraint="a100"), ask) == [
        "job.constraint: Slurm refuses the job: Invalid feature specification"
    ]


def test_newer_slurms_say_the_same_in_another_form() -> None:
    def group(state: list[str], names: list[str], partition: object) -> dict[str, object]:
        return {
            "node": {"state": state},
            "nodes": {"allocated": 0, "idle": len(names), "other": 0, "total": len(names), "nodes": names},
            "cpus": {"minimum": 4, "maximum": 4, "total": 4 * len(names)},
            "memory": {"minimum": 4000, "maximum": 4000},
            "gres": {"total": "gpu:a100:2(S:0-1)", "used": "gpu:a100:0"},
            "partition": partition,
        }

    new = {
        "sinfo": [group(["IDLE"], ["n1", "n2"], {"name": "main"}), group(["IDLE", "DRAIN"], ["n3"], {"name": "main"})]
    }
    two, one = nodes_of(json.dumps(new))
    assert (two.count, two.cpus, two.memory_mb, two.gpus, two.partitions, two.in_service) == (
        2,
        4,
        4000,
        2,
        ("main",),
        True,
    )
    assert (one.name, one.in_service) == ("n3", False)
    cluster = Recorded()
    cluster.nodes = json.dumps(new)
    assert problems(Job(gpus=3), cluster) == [
        "job.gpus=3: nodes of partition main have at most 2 GPUs; change job.gpus"
    ]


def test_a_list_of_nodes_that_cannot_be_read_leaves_the_last_word_to_slurm() -> None:
    cluster = Recorded()
    cluster.nodes = "slurm_load_node error"
    assert problems(Job(gpus=99), cluster) == []
    assert cluster.asked[-1][0] == "sbatch"


def test_numbers_times_and_sizes_of_slurm_are_read() -> None:
    new = ({"set": True, "number": 4}, {"set": True, "infinite": True, "number": 0})
    assert [plain(number) for number in (4, "4", None, *new)] == [4, 4, 0, 4, 0]
    assert [clock_s(text) for text in ("1-02:00:00", "02:00:00", "30:00", "UNLIMITED")] == [93600, 7200, 1800, None]
    assert [megabytes(text) for text in ("64G", "500M", "2048", "1T", "0", None, "lots")] \
        == [65536, 500, 2048, 1048576, 0, None, None]  # fmt: skip
    assert [gpus_of(text) for text in ("gpu:2", "gpu:a100:8(S:0-1),nvme:1", "", "gpu:a:1,gpu:b:3")] == [2, 8, 0, 4]
    assert partitions_of("") == {}


def test_a_range_of_nodes_and_a_time_are_said_as_sbatch_wants_them() -> None:
    assert request_flags(Job("2:4", time="90s", gpus=0, exclude=["n1", "n2"])) == [
        "--nodes=2-4",
        "--time=2",
        "--exclude=n1,n2",
        "--signal=B:USR1@30",
    ]
