"""torch.distributed.checkpoint's asynchronous save in a thread."""

from __future__ import annotations

import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.checkpoint.saver import State, serve


class DcpThread:
    kind = AsyncCheckpointerType.THREAD

    def __init__(self, state: State) -> None:
        warnings.simplefilter("ignore")
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)

    def save(self, state: State, folder: Path) -> Waiting:
        return Waiting(dcp.async_save(dict(state), checkpoint_id=folder / "dcp", async_checkpointer_type=self.kind))

    def load(self, state: State, folder: Path) -> None:
        dcp.load(state, checkpoint_id=folder / "dcp")


class Waiting:
    def __init__(self, saved: Any) -> None:
        self.future: Future[Any] = getattr(saved, "upload_completion", saved)

    def done(self) -> bool:
        return self.future.done()

    def wait(self) -> None:
        self.future.result()


if __name__ == "__main__":
    serve(DcpThread)
