"""torch.distributed.checkpoint's asynchronous save in a process of its own."""

from __future__ import annotations

from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.checkpoint.contestants.dcp_thread import DcpThread
from benchmarks.checkpoint.saver import serve


class DcpProcess(DcpThread):
    kind = AsyncCheckpointerType.PROCESS


if __name__ == "__main__":
    serve(DcpProcess)
