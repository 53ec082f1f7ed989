"""Restore: find the newest checkpoint whose files all verify, and load it into the state."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from everstep.errors import CheckpointError
from everstep.run_folder import CHECKPOINTS, PROGRESS, RunFolder
from everstep.security.signing import KEY
from everstep.trainer.checkpoint.load import (
    allocate,
    load_state,
    open_checkpoint,
    open_with_table,
    pack_ref,
    read_table,
    unpack_ref,
)
from everstep.trainer.checkpoint.manifest import (
    TENSORS,
    CheckpointRef,
    Committed,
    Damaged,
    ManifestFacts,
    candidates,
    check_format,
    find_fault,
    set_aside,
    was_set_aside,
)
from everstep.trainer.checkpoint.node_tier import NodeCheckpoint, NodeTier, copy_to_nodes, find_on_nodes
from everstep.trainer.checkpoint.read import DamagedError, OpenCheckpoint, files_needed
from everstep.trainer.checkpoint.signature import binding_fault
from everstep.trainer.checkpoint.signed_head import head_fault
from everstep.trainer.checkpoint.tools.inventory import split_url
from everstep.trainer.distributed.mesh import Mesh
from everstep.trainer.state.train_state import TrainState


@dataclass(frozen=True)
class Restored:
    """The checkpoint from which an attempt resumes, and the reason for the choice."""

    step: int
    attempt: int
    why: str
    world: int
    """Processes that saved it."""
    walked_past: tuple[str, ...] = ()


class Restorer:
    """Finds and loads a checkpoint for one attempt.

    Values that a damaged checkpoint left in the state are overwritten by the next one.
    """

    def __init__(
        self,
        folder: RunFolder,
        facts: ManifestFacts,
        mesh: Mesh,
        state: TrainState,
        tier: NodeTier | None,
    ) -> None:
        self.folder = folder
        self.facts = facts
        self.mesh = mesh
        self.state = state
        self.tier = tier

    def restore(self) -> tuple[Restored | None, list[CheckpointRef]]:
        """Return the loaded checkpoint (None if the run has none yet) and the run folder's remaining ones.

        Damaged checkpoints are skipped and, once a good one is loaded, set aside. If none is good, nothing is changed.

        Raises:
            CheckpointError: all are damaged; the message lists the fault of each.
        """
        loaded, left, bad = self.load_newest()
        self.mesh.decide(lambda: self._accept(loaded, bad) if loaded is not None else self._check_new(bad))
        if loaded is None:
            return None, left
        walked = tuple(f"{each.path}: {each.why}" for each in bad)
        why = "the newest" if not bad else f"the newest that verifies; {len(bad)} damaged"
        if isinstance(loaded, NodeCheckpoint):
            why += ", from the nodes' own disks"
        why += self.mesh.decide(lambda: self._doubts(loaded))
        world = loaded.manifest.world if isinstance(loaded, Committed) else self.mesh.world
        return Restored(loaded.step, loaded.attempt, why, world, walked), left

    def _doubts(self, loaded: CheckpointRef) -> str:
        """Return what the signed head and the signed config say against the choice, to append to its reason."""
        signature = loaded.manifest.signature if isinstance(loaded, Committed) else ""
        doubts = (
            head_fault(self.folder, self.facts.binding),
            binding_fault(signature, None, self.facts.binding.config),
        )
        return "".join(f"; but {doubt}" for doubt in doubts if doubt)

    def reload(self) -> CheckpointRef:
        """Load the newest checkpoint that verifies, during a run; return it."""
        # The time decides on which steps automatic copies are made, and must not decide what a run computes.
        loaded, _, bad = self.load_newest(copies=False)
        if loaded is None:
            faults = "; ".join(f"{each.path}: {each.why}" for each in bad) or "none was written"
            raise CheckpointError(f"{self.folder.url} has no checkpoint that can be read ({faults})")
        self.mesh.decide(lambda: self._set_aside(bad))
        return loaded

    def load_newest(self, copies: bool = True) -> tuple[CheckpointRef | None, list[CheckpointRef], list[Damaged]]:
        """Return (the loaded one, the run folder's remaining ones, the skipped ones with the reason).

        Args:
            copies: False leaves out automatic copies on the node tier.
        """
        sent = self.mesh.decide(lambda: [pack_ref(found) for found in candidates(self.folder)])
        listed = [unpack_ref(found) for found in sent]
        wanted = self.tier is not None and (copies or not self.tier.config.is_automatic)
        on_nodes = find_on_nodes(self.tier, self.folder) if self.tier is not None and wanted else []
        bad: list[Damaged] = []
        for found in _newest_first([*on_nodes, *listed]):
            try:
                self._load(found)
            except DamagedError as error:
                bad.append(Damaged(found.path, found.step, found.attempt, str(error)))
                continue
            skipped = {each.path for each in bad}
            return found, [each for each in listed if each.path not in skipped], bad
        return None, [], bad

    def _load(self, found: CheckpointRef) -> None:
        check_format(self.folder, found)
        self._check_config(found)
        if isinstance(found, NodeCheckpoint):
            source = self._open_on_nodes(found)
        else:
            source = open_checkpoint(self.folder.storage, found, self.mesh)
        if fault := self.facts.excluded.fault(source.manifest.values, source.manifest.step):
            raise DamagedError(fault)
        load_state(self.state, source, self.facts.data_digest, self.mesh)

    def _check_config(self, found: CheckpointRef) -> None:
        """Raise CheckpointError if the config is not the signed one; resume.allow turns this into a doubt."""
        if isinstance(found, Committed) and not self.facts.binding.may_differ:
            fault = binding_fault(found.manifest.signature, None, self.facts.binding.config)
            if fault:
                raise CheckpointError(
                    f"{self.folder.url}/{found.path}: {fault}; put the old config.yaml back, or unset {KEY} to trust it"
                )

    def _open_on_nodes(self, found: NodeCheckpoint) -> OpenCheckpoint:
        """Open a checkpoint of the node tier, after copying the files that this rank needs to its node."""
        storage, path, manifest = found.tier.storage, found.path, found.manifest
        copy_to_nodes(found, [TENSORS])
        self.mesh.together(lambda: read_table(storage, path, manifest))
        source = open_with_table(storage, path, storage.read(f"{path}/{TENSORS}"), manifest)
        copy_to_nodes(found, files_needed(allocate(self.state, source), source))
        return source

    def _accept(self, loaded: CheckpointRef, bad: list[Damaged]) -> None:
        self._set_aside(bad)
        self.folder.record_restored(self.facts.attempt, loaded.step, loaded.attempt)

    def _set_aside(self, bad: list[Damaged]) -> None:
        for damaged in bad:
            if damaged.path.startswith(CHECKPOINTS):  # the node tier removes its own
                set_aside(self.folder, damaged.path)

    def _check_new(self, bad: list[Damaged]) -> None:
        """Check that a run without a good checkpoint never had one, before it starts from new weights."""
        found = [f"{each.path}: {each.why}" for each in bad]
        found += [f"{path}: set aside" for path in was_set_aside(self.folder)]
        if found or self._was_saved():
            raise CheckpointError(
                f"{self.folder.url} had checkpoints, but none can be restored ({'; '.join(found) or 'all are gone'}); "
                "nothing was deleted; start another run, from 'init_from' if you like"
            )
        self.folder.record_restored(self.facts.attempt, 0, 0)

    def _was_saved(self) -> bool:
        try:
            return bool(json.loads(self.folder.storage.read(PROGRESS)).get("checkpoint_step"))
        except (FileNotFoundError, ValueError):
            return False


def _newest_first(found: list[CheckpointRef]) -> list[CheckpointRef]:
    """Sort newest first; for the same step, the node tier's comes first, since it is nearer."""
    return sorted(found, key=lambda each: (each.step, each.attempt, isinstance(each, NodeCheckpoint)), reverse=True)


def choose(url: str) -> Iterator[tuple[RunFolder, CheckpointRef]]:
    """Yield the checkpoint that a URL names, or those of the run that it names, newest first."""
    head, name = split_url(url)
    run = RunFolder(head)
    is_found = False
    for found in candidates(run):
        if not name or found.path.endswith(f"/{name}"):
            check_format(run, found)
            is_found = True
            yield run, found
    if name and not is_found:
        raise CheckpointError(f"{url} is not a checkpoint: it has no manifest that can be read")


def locate(url: str) -> tuple[RunFolder, str]:
    """Return (run folder, path in it) of a verified checkpoint: the one of the URL, or the run's newest."""
    faults = []
    for run, found in choose(url):
        if isinstance(found, Damaged):
            fault = found.why
        else:
            fault = find_fault(run.storage, found.path, found.manifest.files.items())
        if not fault:
            return run, found.path
        faults.append(f"{found.path}: {fault}")
    raise CheckpointError(f"{url} has no checkpoint that can be read ({'; '.join(faults) or 'none was written'})")
