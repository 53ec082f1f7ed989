"""Calls of the run's hooks: each at the steps that it asks for; one that fails is named."""

from __future__ import annotations

import bdb
import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from everstep.config import Node, OnHookError
from everstep.errors import EverstepError
from everstep.fault import chain, reason_of
from everstep.trainer.distributed.mesh import lost_peer
from everstep.trainer.plugins import TARGET
from everstep.trainer.reporting.media import MediaLog
from everstep.trainer.reporting.sinks import warn
from everstep.trainer.step_info import StepInfo
from everstep.trainer.step_view import Ask, ask_of
from everstep.trainer.watchdog.activity import Activity, Phase

LOG = logging.getLogger("everstep")
Hook = Callable[[StepInfo], None]
"""Callback for steps; called on every rank, in the order of steps."""


class HookError(RuntimeError):
    """Failure of a hook; its message has the hook's name, its cause is the error."""


class Hooks:
    """The hooks of a run, in the order of its config."""

    def __init__(self, hooks: Sequence[Hook], nodes: Sequence[Node], on_error: OnHookError, rank: int) -> None:
        names = [f"hooks[{number}] ({node[TARGET]})" for number, node in enumerate(nodes)]
        self._active = [(name, hook, ask_of(hook, name)) for name, hook in zip(names, hooks, strict=True)]
        self._on_error = on_error
        self._rank = rank

    def plus(self, name: str, hook: Hook) -> Hooks:
        """Return these hooks and one more of everstep itself."""
        more = copy.copy(self)
        more._active = [*self._active, (name, hook, ask_of(hook, name))]
        return more

    @property
    def asks(self) -> list[Ask]:
        return [ask for _, _, ask in self._active if ask is not None]

    def due(self, step: int) -> bool:
        """True if a hook asks for the model at this step, so that its results are read at once."""
        return any(ask.due(step) for ask in self.asks)

    def __call__(self, info: StepInfo, activity: Activity, step: int, media: MediaLog | None) -> None:
        """Call the hooks that are due.

        Args:
            step: the last step that was computed, which on a GPU is later than that of `info`.
        """
        failed: list[str] = []
        with media.at(info.step) if media is not None else nullcontext():
            for number, (name, hook, ask) in enumerate(self._active):
                if ask is not None and not ask.due(info.step):
                    continue
                activity.at(Phase.hook, step, number)
                try:
                    hook(info)
                except Exception as error:
                    self._fail(name, info.step, error)
                    failed.append(name)
        if failed:
            # Their asks stay: what ranks exchange for them is the same on all.
            self._active = [(n, _nothing if n in failed else hook, ask) for n, hook, ask in self._active]

    def _fail(self, name: str, step: int, error: Exception) -> None:
        """Raise a hook's error under its name, or say that the hook is off from now on.

        Raises:
            HookError: `hooks_on_error=stop`.
        """
        told = isinstance(error, EverstepError)
        if lost_peer(error) or any(isinstance(each, bdb.BdbQuit) for each in chain(error)):
            raise error
        if self._on_error is OnHookError.stop:
            if told:
                raise error
            raise HookError(f"{name} failed at step {step}: {reason_of(error)}") from error
        LOG.error("%s failed at step %d", name, step, exc_info=error)
        where = f" on rank {self._rank}" if self._rank else ""
        said = str(error) if told else reason_of(error)
        warn(f"{name} failed at step {step}{where} and is off until the next start, training goes on: {said}")


def _nothing(info: StepInfo) -> None:
    """Do nothing, in the place of a hook that is off."""
