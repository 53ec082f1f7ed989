"""The log of one rank reaches the run folder, and not only at the end."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from everstep.run_folder import RunFolder
from everstep.trainer.reporting import rank_log
from everstep.trainer.reporting.rank_log import RankLog
from support.processes import until

LOG = logging.getLogger("everstep")


@pytest.mark.parametrize("remote", [False, True])
def test_what_is_logged_in_the_block_is_in_the_folder_after_it(tmp_path: Path, remote: bool) -> None:
    folder = RunFolder(f"memory://ranklog/{tmp_path.name}" if remote else str(tmp_path))
    with RankLog(folder, 2, 3):
        LOG.info("in the block")
    LOG.info("after it")
    written = folder.storage.read("attempts/0002/rank-0003.log").decode()
    assert "INFO in the block\n" in written
    assert "after it" not in written


def test_a_log_in_a_store_can_be_followed_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_log, "UPLOAD_EVERY_S", 0.01)
    folder = RunFolder(f"memory://ranklog/{tmp_path.name}")

    def told(line: str) -> bool:
        try:
            return line in folder.storage.read("attempts/0001/rank-0000.log").decode()
        except FileNotFoundError:
            return False

    with RankLog(folder, 1, 0):
        LOG.info("first")
        until(lambda: told("first"))
        LOG.info("second")
        until(lambda: told("second"))
