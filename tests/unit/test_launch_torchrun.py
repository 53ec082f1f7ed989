"""The command and environment that start the trainer."""

from __future__ import annotations

import os
import subprocess
import sys

from everstep.launch.torchrun import command, environment


def test_one_process_needs_no_torchrun() -> None:
    assert command("/runs/demo", nproc=1, grace_s=60) == [
        sys.executable,
        "-m",
        "everstep.trainer",
        "--frozen",
        "/runs/demo",
    ]


def test_many_processes_go_through_torchrun_with_a_rendezvous_that_needs_no_port() -> None:
    argv = command("s3://bucket/runs/demo", nproc=4, grace_s=90)
    assert argv[1:3] == ["-m", "everstep.trainer.run_torchrun"]
    assert argv[-4:] == ["-m", "everstep.trainer", "--frozen", "s3://bucket/runs/demo"]
    assert {
        "--nproc-per-node=4",
        "--rdzv-backend=everstep",
        "--rdzv-endpoint=here",
        "--rdzv-id=demo",
        "--rdzv-conf=rank=0,join_timeout=60,program=trainer",
        "--shutdown-timeout=90",
        "--max-restarts=0",
    } <= set(argv)


def test_plugins_stand_on_the_command_line() -> None:
    for nproc in (1, 2):
        assert command("/runs/demo", nproc, 60, plugins=["mine", "ours.nets"])[-2:] == ["--plugins", "mine,ours.nets"]


def test_each_restart_of_torchrun_gets_a_store_of_its_own() -> None:
    assert environment({}, threads=1, extra={})["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_all_starts_have_one_order_of_strings_in_sets_unless_the_user_sets_another() -> None:
    assert environment({}, threads=1, extra={})["PYTHONHASHSEED"] == "0"
    assert environment({"PYTHONHASHSEED": "7"}, threads=1, extra={})["PYTHONHASHSEED"] == "7"


def test_a_trainer_that_is_started_by_hand_has_that_order_too() -> None:
    program = "from everstep.rank_env import fix_hash_seed; fix_hash_seed(); print(list({*map(str, range(50))}))"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    printed = {subprocess.check_output([sys.executable, "-c", program], env=env) for _ in range(3)}
    assert len(printed) == 1


def test_the_job_may_add_to_the_environment_and_has_the_last_word() -> None:
    env = environment({"A": "shell", "HOME": "/root"}, threads=3, extra={"A": "job"})
    assert (env["A"], env["HOME"], env["OMP_NUM_THREADS"]) == ("job", "/root", "3")
