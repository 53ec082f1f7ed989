"""Passes of one step: what they change beside gradients does not depend on how many a process takes."""

from __future__ import annotations

from torch import Tensor

from everstep.config import Buffers
from everstep.trainer.state.step_attributes import StepAttributes
from everstep.trainer.state.step_buffers import StepBuffers
from everstep.trainer.state.train_state import TrainState


class StepPasses:
    """Sets buffers and plain attributes before each pass of a step, and at its end."""

    def __init__(self, state: TrainState) -> None:
        self.state = state
        self.attributes = StepAttributes(state.attributes, state.passes)
        self._buffers: StepBuffers | None = None
        self._several = self._taken = False

    def begin_step(self, passes: int) -> None:
        """Keep what a step of so many passes on this rank may change."""
        buffers = self.state.buffers
        # Only a run's first step finds what changes: a resume must know the same as the run without it.
        first = self.state.progress.step == 0
        self._taken = False
        self._several = buffers is None or buffers.policy is not Buffers.local
        self._buffers = buffers.begin_step(watch=first) if buffers is not None else None
        self.attributes.begin_step(watch=first and self._several, keep=passes > 1 and self._several)

    def before_pass(self) -> None:
        """Set the values at the start of the step, unless this is its first pass."""
        if self._taken and self._several:
            self.rewind()
        self._taken = True

    def rewind(self) -> None:
        """Set the values at the start of the step."""
        if self._buffers is not None:
            self._buffers.rewind()
        self.attributes.rewind()

    def after_pass(self, index: int, real: bool) -> None:
        """Take what the forward pass of a microbatch, by its number, has left."""
        if self._buffers is not None:
            self._buffers.after_pass(index, real)
        self.attributes.after_pass()

    def end_step(self, skipped: Tensor | bool) -> None:
        """Make the buffers that change equal on all ranks; after a skipped step, restore their values."""
        if self._buffers is not None and self.state.buffers is not None:
            self.state.buffers.end_step(self._buffers, skipped)
