"""Reader of Everstep's checkpoints for plain `torch.distributed.checkpoint.load`."""

from __future__ import annotations

import os
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from everstep.errors import CheckpointError
from everstep.trainer.checkpoint.manifest import Manifest, read_manifest
from everstep.trainer.checkpoint.read import OpenCheckpoint, fill_items
from everstep.trainer.checkpoint.restore import locate
from everstep.trainer.checkpoint.tensor_index import read_metadata


class CheckpointReader(StorageReader):
    """Reads a checkpoint, or the newest of a run, at a path or URL; each file is verified as it is read.

    Its tensors are `model.NAME`, `optimizer.NAME.KEY` and `average.NAME`:
    `load({"model": model.state_dict()}, storage_reader=CheckpointReader("runs/demo"))`.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url)
        self._source: OpenCheckpoint | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.url = os.fspath(checkpoint_id)
        self._source = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._opened().metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._opened()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        fill_items(planner, plan.items, self._opened())
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        try:
            locate(os.fspath(checkpoint_id))
        except CheckpointError:
            return False
        return True

    def _opened(self) -> OpenCheckpoint:
        if self._source is None:
            run, path = locate(self.url)
            manifest = Manifest.from_json(read_manifest(run.storage, path))
            self._source = OpenCheckpoint(run.storage, path, read_metadata(run.storage, path), manifest)
        return self._source
