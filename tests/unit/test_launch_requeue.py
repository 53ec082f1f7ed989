"""What a job does after a start has ended, case by case."""

from __future__ import annotations

import dataclasses

import pytest

from everstep.launch.config import JobConfig
from everstep.launch.job_start.output_capture import find_cause
from everstep.launch.job_start.start_record import NodeReport
from everstep.launch.restart.job_policy import Action, Evidence, RestartDecision, judge
from everstep.outcome import Ending, Fault, Outcome
from everstep.rank_env import LOST_PEER

CAUSES = JobConfig().all_causes()
HOSTS = ("n1", "n2")


def verdict(max_restarts: int = 3, **known: object) -> RestartDecision:
    base = Evidence(hosts=HOSTS, reports=(NodeReport("n1", code=1), NodeReport("n2", code=1)))
    return judge(dataclasses.replace(base, **known), CAUSES, max_restarts)  # type: ignore[arg-type]


def reports(*each: NodeReport) -> tuple[NodeReport, ...]:
    return each


def test_what_is_done_ends_well() -> None:
    found = verdict(ending=Ending(Outcome.done, 300), code=0)
    assert (found.action, found.exit_code, found.cause) == (Action.exit, 0, "done")


@pytest.mark.parametrize(("outcome", "code"), [("config_error", 2), ("diverged", 3), ("superseded", 4)])
def test_what_a_restart_would_not_change_stops_at_once_with_its_own_code(outcome: str, code: int) -> None:
    found = verdict(ending=Ending(Outcome(outcome), 7, "why"), progressed=True)
    assert (found.action, found.exit_code) == (Action.exit, code)
    assert "why" in found.reason


def test_a_mistake_before_the_first_attempt_is_known_by_its_exit_code() -> None:
    found = verdict(reports=reports(NodeReport("n1", code=2), NodeReport("n2", code=143, stopped="SIGTERM")), code=143)
    assert (found.action, found.cause, found.exit_code) == (Action.exit, "user_error", 2)


def test_a_crash_starts_again_in_the_same_allocation() -> None:
    found = verdict(ending=Ending(Outcome.crashed, 12, "RuntimeError: peer gone"))
    assert (found.action, found.restarts) == (Action.again, 1)
    assert "step 12: RuntimeError: peer gone; starting again (1 of 3 without a new checkpoint)" in found.reason


def test_starts_without_a_new_checkpoint_are_counted_and_a_checkpoint_begins_anew() -> None:
    assert verdict(spent=2).restarts == 3
    assert verdict(spent=3, progressed=True).restarts == 1
    stopped = verdict(spent=3)
    assert (stopped.action, stopped.cause, stopped.exit_code) == (Action.exit, "no_progress", 1)
    assert "4 starts in a row made no new checkpoint, job.max_restarts=3 allows no other" in stopped.reason


@pytest.mark.parametrize("known", [
    {"noticed": True, "ending": Ending(Outcome.preempted, 145, "SIGUSR1"), "code": 0},
    {"noticed": True},
    {"reports": (NodeReport("n1", code=143, stopped="SIGTERM"), NodeReport("n2", code=143, stopped="SIGTERM")),
     "ending": Ending(Outcome.preempted, 145, "SIGTERM")},
])  # fmt: skip
def test_whom_the_scheduler_stops_goes_back_to_the_queue(known: dict[str, object]) -> None:
    found = verdict(progressed=True, **known)
    assert (found.action, found.cause, found.restarts) == (Action.requeue, "preempted", 1)


def test_notices_without_any_progress_do_not_go_on_for_ever() -> None:
    assert verdict(noticed=True, spent=3).action is Action.exit


def test_whom_a_user_stops_stays_stopped() -> None:
    found = verdict(ending=Ending(Outcome.preempted, 145, "stop marker in the run folder"), code=0)
    assert (found.action, found.cause, found.exit_code) == (Action.exit, "stopped", 75)


def test_another_program_may_meet_many_time_limits() -> None:
    found = verdict(noticed=True, is_trainer=False, spent=3)
    assert (found.action, found.restarts) == (Action.requeue, 1)


def test_another_program_is_judged_by_its_exit_code() -> None:
    fine = reports(NodeReport("n1", code=0), NodeReport("n2", code=0))
    assert verdict(is_trainer=False, reports=fine, code=0).cause == "done"
    assert verdict(is_trainer=False, code=2).action is Action.again


def test_a_bad_node_is_left_out_and_the_others_are_not() -> None:
    found = verdict(reports=reports(NodeReport("n2", ("no interface ib0",)), NodeReport("n1", code=143)))
    assert (found.action, found.exclude, found.cause) == (Action.requeue, ("n2",), "bad_node")
    assert "n2: no interface ib0" in found.reason


def test_what_is_wrong_with_every_node_is_no_nodes_fault() -> None:
    found = verdict(reports=reports(NodeReport("n1", ("no ib0",)), NodeReport("n2", ("no ib0",))))
    assert (found.action, found.exit_code) == (Action.exit, 1)
    broken = reports(*(NodeReport(host, code=1, cause="ecc", line="ECC") for host in HOSTS))
    assert verdict(reports=broken).exclude == ()


def test_hardware_that_complains_is_left_out() -> None:
    said = NodeReport("n2", code=1, cause="ecc", line="uncorrectable ECC error encountered")
    found = verdict(reports=reports(said, NodeReport("n1", code=1)), ending=Ending(Outcome.crashed, 5, "CUDA error"))
    assert (found.action, found.exclude, found.cause) == (Action.requeue, ("n2",), "ecc")


def test_a_node_that_never_says_a_word_is_left_out() -> None:
    found = verdict(reports=reports(NodeReport("n1", code=1)))
    assert (found.action, found.exclude) == (Action.requeue, ("n2",))


def test_a_node_that_was_killed_because_another_failed_is_not_blamed() -> None:
    found = verdict(reports=reports(NodeReport("n2"), NodeReport("n1", code=1)))
    assert (found.action, found.exclude) == (Action.again, ())


def test_an_error_of_a_rank_comes_before_what_it_did_to_the_others() -> None:
    victim = NodeReport("n1", code=1, cause="peer_lost", line="[rank0]: RuntimeError: Connection closed by peer")
    culprit = NodeReport("n2", code=1, cause="exception", line="[rank1]: ValueError: boom")
    found = verdict(reports=reports(victim, culprit), is_trainer=False)
    assert (found.action, found.cause) == (Action.again, "exception")
    assert "exception on n2: [rank1]: ValueError: boom" in found.reason


def test_an_error_of_the_user_in_the_output_stops_at_once() -> None:
    said = NodeReport("n1", code=1, cause="import", line="ModuleNotFoundError: No module named 'mine'")
    found = verdict(reports=reports(said, NodeReport("n2", code=1)), is_trainer=False)
    assert (found.action, found.cause) == (Action.exit, "import")
    assert "No module named 'mine'" in found.reason


def test_the_same_words_in_a_warning_do_not_stop_a_run_that_died_of_something_else() -> None:
    said = NodeReport("n1", code=1, cause="import", line="ModuleNotFoundError: No module named 'optional'")
    died = Ending(Outcome.crashed, 9, "RuntimeError: Connection closed by peer")
    assert verdict(reports=reports(said, NodeReport("n2", code=1)), ending=died).action is Action.again


def test_what_the_scheduler_has_ended_goes_on_within_the_budget() -> None:
    assert verdict(lost=True, reports=()).action is Action.again
    assert verdict(lost=True, reports=(), spent=3).action is Action.exit
    assert verdict(lost=True, reports=(), ending=Ending(Outcome.done, 300)).cause == "done"


def test_short_of_memory_starts_again_while_the_microbatch_shrinks() -> None:
    short = Ending(Outcome.out_of_memory, 3, micro_batch=4)
    assert verdict(ending=short, spent=3).action is Action.again
    assert verdict(ending=short, shrank=False).action is Action.exit


def test_what_is_left_of_an_earlier_start_does_nothing() -> None:
    assert verdict(left_behind=True, overtaken=True, ending=Ending(Outcome.done)).action is Action.wait
    assert verdict(overtaken=True).exit_code == Outcome.superseded.exit_code


@pytest.mark.parametrize(("line", "cause"), [
    ("RuntimeError: CUDA error: uncorrectable ECC error encountered", "ecc"),
    ("[3]: NVRM: Xid (PCI:0000:65:00): 79, pid=1, GPU has fallen off the bus.", "xid"),
    ("torch.distributed.DistBackendError: NCCL error in: x.cpp:1, unhandled system error, ncclSystemError", "nccl"),
    ("ModuleNotFoundError: No module named 'transformers'", "import"),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "gpu_memory"),
    ("slurmstepd: error: Detected 1 oom_kill event in StepId=12.0. Some of the step tasks have been OOM Killed.",
     "host_memory"),
    ("OSError: [Errno 28] No space left on device", "disk_full"),
    ("[rank3]: ValueError: no such word", "exception"),
    ("[rank3]: mine.errors.NoSuchWord: no such word", None),
    ("[rank0]: RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:20153.", "peer_lost"),
    ("[rank0]: torch.distributed.DistNetworkError: The client socket has failed to connect", None),
    ("loss 0.25 at step 12", None),
])  # fmt: skip
def test_lines_of_output_have_causes(line: str, cause: str | None) -> None:
    from everstep.launch.job_start.output_capture import find_cause

    assert find_cause(CAUSES, ["before", line, "after"])[0] == cause


def test_causes_of_the_user_come_first_and_may_drop_ours() -> None:
    from everstep.launch.config import job_config

    job = job_config({"causes": {"mine": {"match": "ECC error on rail 7", "remedy": "stop"}, "nccl": None}})
    assert next(iter(job.all_causes())) == "mine"
    assert "nccl" not in job.all_causes()


USERS = Ending(Outcome.crashed, 0, "TypeError: x", fault=Fault.user, error="TypeError", place="mine.py:3, in loss")


def test_an_error_of_the_user_before_the_first_step_ends_the_job_and_names_the_line() -> None:
    found = verdict(ending=USERS, stepped=False)
    assert (found.action, found.cause, found.exit_code) == (Action.exit, "user_error", 1)
    assert "mine.py:3, in loss" in found.reason
    assert verdict(ending=USERS, stepped=True).action is Action.again
    assert verdict(ending=USERS, stepped=True, repeated=True).action is Action.exit


def test_a_run_folder_that_was_full_is_no_error_of_the_user() -> None:
    full = Ending(Outcome.config_error, 3, "No space left on device", error="StorageError")
    assert verdict(ending=full).action is Action.again


def test_a_rank_that_was_killed_for_memory_is_started_again() -> None:
    line = "error: rank 1 on n2 was killed by SIGKILL (out of memory: memory.events oom_kill=1)"
    name, seen = find_cause(CAUSES, [f"[rank]: {line}"])
    assert name == "peer_lost"
    report = NodeReport("n2", code=1, cause=name, line=seen)
    assert (
        verdict(ending=Ending(Outcome.crashed, 7, line), reports=reports(report, NodeReport("n1", code=1))).action
        is Action.again
    )


def test_the_code_of_a_rank_that_lost_another_says_nothing_of_why() -> None:
    both = reports(NodeReport("n1", code=LOST_PEER), NodeReport("n2", code=2))
    assert verdict(reports=both, code=143).cause == "user_error"


def stalled(node: str = "n2.cluster", **known: object) -> RestartDecision:
    ending = Ending(Outcome.stalled, 12, "frozen: rank 5 on n2 …", rank=5, node=node)
    return verdict(ending=ending, **known)  # type: ignore[arg-type]


def test_a_stall_is_a_crash_that_may_be_tried_again() -> None:
    found = stalled()
    assert (found.action, found.cause, found.restarts, found.exclude) == (Action.again, "stalled", 1, ())
    assert found.reason.startswith("stalled at step 12: frozen: rank 5 on n2 …; starting again")


def test_a_node_is_excluded_for_its_second_stall_and_never_for_the_first() -> None:
    assert stalled(stalls={"n2.cluster": 1, "n1": 3}).exclude == ()
    again = stalled(stalls={"n2.cluster": 2})
    assert (again.action, again.exclude) == (Action.requeue, ("n2",))
    assert stalled(node="", stalls={"n2.cluster": 2}).exclude == ()
