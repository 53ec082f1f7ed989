"""Main loop of a sweep: ask the sampler, start trials, wait, record results.

All state is in the records.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from everstep.errors import EverstepError
from everstep.launch.console import say
from everstep.launch.job_start.signals import Signals
from everstep.launch.sweep.asha import finalist, promotion, reason_to_stop
from everstep.launch.sweep.config import PURE, RUNGED
from everstep.launch.sweep.lease import Lease
from everstep.launch.sweep.plan import Plan
from everstep.launch.sweep.state import RungResult, SweepState, Trial, TrialOutcome, curve, loss, result
from everstep.launch.sweep.suggest import Suggester
from everstep.launch.sweep.workers import EndedTrial, Task, Workers
from everstep.outcome import Outcome


@dataclass
class Driver:
    """One driver of one sweep; `run` returns the exit code."""

    plan: Plan
    story: SweepState
    workers: Workers
    lease: Lease
    signals: Signals
    show: Callable[[SweepState, list[Task]], None] = lambda story, running: None
    anew: frozenset[str] = frozenset()
    """Trials that were cancelled with the whole sweep and are resumed with it."""
    asking: Suggester = field(init=False)
    _fruitless: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Trial → consecutive starts without a new checkpoint, and the newest step."""
    _started: set[int] = field(default_factory=set)
    """Trials that have had a process or a job, of this driver or an earlier one."""

    def __post_init__(self) -> None:
        self.asking = Suggester(self.plan, self.story)

    def run(self) -> int:
        self._pick_up()
        while True:
            self.lease.check()
            self._collect()
            self._cut()
            stopped = self._stopped()
            if stopped is None:
                self._fill()
            running = self.workers.running()
            self.show(self.story, self.workers.training())
            if stopped is not None:
                say(f"{stopped}; 'everstep resume {self.plan.folder.url}' goes on")
                self.workers.leave()
                self._collect()
                return Outcome.preempted.exit_code
            if not running:
                return self._end()
            self.signals.wait(self.plan.sweep.poll_s)

    def _pick_up(self) -> None:
        """Adopt trials of an earlier driver that still run, and record the results of those that have ended."""
        # For a trial that is retried, the folder still holds the outcome of the earlier failure.
        left = [
            trial for trial in self.story.trials if trial.is_open and not trial.again and trial.name not in self.anew
        ]
        self._started = {task.trial for task in self.workers.adopt([self._task(trial) for trial in left])}
        for trial in left:
            if trial.number not in self._started:
                told = result(EndedTrial(self._task(trial)), self.plan.metrics, trial.cut)
                if told is not None:
                    self._tell(trial, told)

    def _stopped(self) -> str | None:
        if self.signals.take():
            return "stopped"
        return "the sweep is cancelled" if self.plan.folder.is_stopped else None

    def _end(self) -> int:
        limit = self.plan.sweep.max_failures
        if limit is not None and self.story.failures >= limit:
            say(f"{self.story.failures} trials have failed; sweep.max_failures={limit} allows no other")
            return 1
        return 0

    # Results

    def _collect(self) -> None:
        try:
            ended = self.workers.poll()
        except EverstepError as error:
            say(f"{error}; asking again")  # the scheduler may be available again later
            return
        for each in ended:
            self._note(each)

    def _note(self, ended: EndedTrial) -> None:
        trial = self.story.trials[ended.task.trial]
        told = result(ended, self.plan.metrics, trial.cut)
        if told is not None and told.verdict is TrialOutcome.cancelled and self.plan.folder.is_stopped:
            return  # cancelled with the sweep, and resumed with it
        if told is None:
            told = self._given_up(ended)
        if told is not None:
            self._tell(trial, told)

    def _given_up(self, ended: EndedTrial) -> RungResult | None:
        """Return a failed result for a trial lost repeatedly without a new checkpoint; None to restart it."""
        number, step = ended.task.trial, ended.task.folder.newest_step() or 0
        starts, before = self._fruitless.get(number, (0, -1))
        starts = starts + 1 if step <= before else 1
        self._fruitless[number] = (starts, step)
        limit = self.plan.job.max_restarts + 1
        if starts <= limit or self.plan.folder.is_stopped:
            return None
        return RungResult(TrialOutcome.failed, (), step, f"lost {starts} times in a row without a new checkpoint")

    def _tell(self, trial: Trial, told: RungResult) -> None:
        self.plan.folder.append(
            self.story,
            {
                "event": "told",
                "trial": trial.number,
                "rung": trial.rung,
                "verdict": told.verdict.value,
                "values": list(told.values),
                "step": told.step,
                "reason": told.reason,
            },
        )
        self.asking.tell(trial, trial.told[trial.rung])

    # Early stopping

    def _cut(self) -> None:
        """Apply the pruners that stop a running trial early."""
        sweep = self.plan.sweep
        if sweep.pruner in RUNGED or sweep.pruner.value == "none":
            return
        training = self.workers.training()
        begun = {task.trial for task in training}
        shown = [trial for trial in self.story.trials if trial.told or trial.number in begun]
        curves = {trial.number: self._curve(trial) for trial in shown}
        for task in training:
            trial = self.story.trials[task.trial]
            others = [curve for number, curve in curves.items() if number != trial.number]
            why = reason_to_stop(sweep, curves[trial.number], others)
            if trial.cut is None and why is not None and max(curves[trial.number]) < task.config.steps:
                self.plan.folder.append(self.story, {"event": "cut", "trial": trial.number, "reason": why})
            if trial.cut is not None:
                self.workers.stop(task)

    def _curve(self, trial: Trial) -> dict[int, float]:
        known = self._curves.get(trial.number)
        if known is not None:
            return known
        name, goal = self.plan.metrics[0], self.plan.goals[0]
        found = {at: loss(value, goal) for at, value in curve(self.plan.folder.run(trial.name), name).items()}
        if not trial.is_open:  # its curve is final
            self._curves[trial.number] = found
        return found

    _curves: dict[int, dict[int, float]] = field(default_factory=dict)

    # Starts

    def _fill(self) -> None:
        while trials := self._startable():
            self.lease.check()
            refused = self.workers.start([self._task(trial) for trial in trials])
            self._started |= {trial.number for trial in trials}
            for each in refused:
                self._tell(self.story.trials[each.task.trial], RungResult(TrialOutcome.failed, (), 0, each.why))

    def _startable(self) -> list[Trial]:
        """Return the trials to start: open trials of earlier drivers, then new trials, then promotions.

        The number of trials is known, so a promotion waits until all have begun and is compared with all of them.
        """
        limit = self.plan.sweep.max_failures
        if limit is not None and self.story.failures >= limit:
            return []
        running = self.workers.running()
        busy = {task.trial for task in running}
        room = self.workers.room - len(running)
        found: list[Trial] = []
        for trial in [trial for trial in self.story.trials if trial.is_open and trial.number not in busy]:
            if trial.cut is not None:  # stopped early by an earlier driver, which ended before recording it
                told = result(EndedTrial(self._task(trial)), self.plan.metrics, trial.cut)
                self._tell(trial, told or RungResult(TrialOutcome.pruned, (), 0, trial.cut))
            elif len(found) < room or (self._queues and trial.number not in self._started):
                found.append(trial)
        while (len(found) < room or self._queues) and (asked := self._asked()) is not None:
            found.append(asked)
        while len(found) < room and (promoted := self._promoted(not running and not found)) is not None:
            found.append(promoted)
        return found

    @property
    def _queues(self) -> bool:
        """True if trials may be submitted beyond capacity.

        Requires a sampler that needs no results, and no failure limit.
        """
        sweep = self.plan.sweep
        return self.workers.queues and sweep.sampler in PURE and sweep.max_failures is None

    def _promoted(self, nothing_else: bool) -> Trial | None:
        if self.plan.sweep.pruner not in RUNGED:
            return None
        trials = [trial for trial in self.story.trials if trial.told]
        losses = {trial.number: trial.losses(self.plan.goals) for trial in trials}
        first = {trial.number: trial.first for trial in trials}
        under_way = frozenset(trial.number for trial in trials if trial.is_open)
        found = promotion(losses, self.plan.sweep.eta, self.plan.rung_count, first, under_way)
        if found is None and nothing_else:
            found = finalist(losses, self.plan.rung_count, first)
        if found is None:
            return None
        self.plan.folder.append(self.story, {"event": "promoted", "trial": found.trial, "rung": found.rung})
        return self.story.trials[found.trial]

    def _asked(self) -> Trial | None:
        found = self.asking.next(self.story)
        if found is None:
            return None
        record, number = found
        # Compose first: a config that cannot be composed must not be recorded.
        self.plan.config(record["values"], record["name"], record["rung"])
        self.plan.folder.append(self.story, record)
        self.asking.know(self.story.trials[-1], number)
        return self.story.trials[-1]

    def _task(self, trial: Trial) -> Task:
        config = self.plan.config(trial.values, trial.name, trial.rung)
        return Task(trial.number, self.plan.folder.run(trial.name), config)
