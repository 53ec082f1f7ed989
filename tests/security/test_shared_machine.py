"""Other users of the machine neither read nor replace what a run keeps there."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from everstep.dataset.prepare import ledger
from everstep.dataset.prepare.ledger import Ledger
from everstep.errors import ConfigError
from everstep.launch.submit import snapshot
from everstep.launch.submit.code_archive import SnapshotError
from everstep.security.private_folder import expand, private_folder
from support.other_user import UID, as_another, needs_root
from support.processes import until

KEY = "checkpoint.local.path"


def test_a_private_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "a" / "b", KEY)
    assert folder.stat().st_mode & 0o7777 == 0o700
    assert private_folder(folder, KEY) == folder


def test_a_private_folder_that_others_could_only_read_is_closed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o755)
    assert private_folder(tmp_path / "a", KEY).stat().st_mode & 0o7777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o702, 0o1777])
def test_a_folder_that_a_group_or_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(mode)
    with pytest.raises(ConfigError, match="must be yours alone"):
        private_folder(tmp_path / "a", KEY)


@pytest.mark.parametrize("members", [[], ["me"], ["me", "other"]])
def test_a_group_may_write_only_if_this_user_is_alone_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: list[str]
) -> None:
    """The rule for --config-dir: umask 002 and a group for each user give such folders."""
    me = SimpleNamespace(pw_name="me", pw_gid=os.getgid())
    monkeypatch.setattr("everstep.security.ownership.pwd.getpwuid", lambda uid: me)
    monkeypatch.setattr(
        "everstep.security.ownership.grp.getgrgid", lambda gid: SimpleNamespace(gr_name="me", gr_mem=members)
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o775)
    if "other" not in members:
        assert private_folder(tmp_path / "a", KEY).stat().st_mode & 0o7777 == 0o700
        return
    with pytest.raises(ConfigError, match=f"{KEY}=.*can be written by its group .*; remove it, or set {KEY} to"):
        private_folder(tmp_path / "a", KEY)


def test_a_link_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(ConfigError, match="must be yours alone"):
        private_folder(tmp_path / "link", KEY)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made "):
        private_folder(tmp_path / "file", KEY)


@needs_root
def test_a_folder_of_another_user_is_refused(open_folder: Path) -> None:
    (open_folder / "a").mkdir(mode=0o700)
    os.chown(open_folder / "a", UID, UID)
    with pytest.raises(ConfigError, match="must be yours alone"):
        private_folder(open_folder / "a", KEY)


@needs_root
@pytest.mark.parametrize("owner", [UID, 0])
def test_a_folder_below_one_that_another_user_could_replace_is_refused(open_folder: Path, owner: int) -> None:
    above = open_folder / "above"
    above.mkdir()
    above.chmod(0o755 if owner == UID else 0o777)
    os.chown(above, owner, owner)
    with pytest.raises(ConfigError, match="can be replaced by other users"):
        private_folder(above / "a", KEY)


@needs_root
def test_a_folder_like_tmp_is_fine_and_what_is_in_it_stays_there(open_folder: Path) -> None:
    open_folder.chmod(0o1777)
    folder = private_folder(open_folder / "a", KEY)
    (folder / "weights").write_text("secret")
    assert as_another(lambda: os.listdir(folder)) == "PermissionError"
    assert as_another(lambda: (folder / "weights").read_text()) == "PermissionError"
    assert as_another(lambda: folder.rename(open_folder / "b")) == "PermissionError"
    assert as_another(lambda: (open_folder / "else").mkdir()) == "None"


@needs_root
@pytest.mark.parametrize("made", ["folder", "open folder", "link"])
def test_5_9_the_folder_of_unpacked_code_is_refused_when_another_user_made_it(
    open_folder: Path,
    made: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_folder.chmod(0o1777)
    monkeypatch.setattr("tempfile.tempdir", str(open_folder))
    place = open_folder / f"everstep-code-{os.getuid()}"

    def make() -> None:
        if made == "link":
            place.symlink_to("/tmp")
        else:
            place.mkdir(mode=0o777 if made == "open folder" else 0o700)

    assert as_another(make) == "None"
    with pytest.raises(SnapshotError, match=r"TMPDIR=.*must be yours alone"):
        snapshot.node_folder()


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "PATH", "HF_TOKEN", "{AWS_SECRET_ACCESS_KEY}", "DATABASE_URL"]
)
def test_1_8_a_path_names_no_variable_that_may_be_a_secret(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name.strip("{}"), "PLANTED")
    with pytest.raises(ConfigError, match="may not be part of a path") as refused:
        expand(f"/shared/${name}", "checkpoint.local.path")
    assert "PLANTED" not in str(refused.value)


def test_1_8_a_path_names_the_folders_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", "/local/7")
    monkeypatch.setenv("USER", "ada")
    assert expand("$SLURM_TMPDIR/${USER}/$UID", "k") == f"/local/7/ada/{os.getuid()}"
    monkeypatch.delenv("LOCAL_SCRATCH", raising=False)
    with pytest.raises(ConfigError, match=r"this node has no such variable \(\$LOCAL_SCRATCH\)"):
        expand("$LOCAL_SCRATCH", "k")


@needs_root
@pytest.mark.dist
def test_5_1_a_node_tier_that_another_user_made_first_ends_the_run_before_a_step(open_folder: Path) -> None:
    from support.ranks import train

    open_folder.chmod(0o1777)
    tier, root = open_folder / "tier", open_folder / "runs"
    root.mkdir(mode=0o700)

    def make() -> None:
        tier.mkdir()
        tier.chmod(0o777)

    assert as_another(make) == "None"
    ended = train(1, root, "checkpoint.local.every=2", f"checkpoint.local.path={tier}", "parallel=single")
    assert ended.codes == [2], ended.printed
    assert "it must be yours alone" in ended.printed
    assert list(tier.iterdir()) == []


@needs_root
@pytest.mark.dist
def test_5_1_a_node_tier_is_neither_read_nor_swapped_by_another_user(open_folder: Path) -> None:
    from support import kill_points
    from support.ranks import train

    open_folder.chmod(0o1777)
    tier, root = open_folder / "tier", open_folder / "runs"
    root.mkdir(mode=0o700)
    words = ("checkpoint.local.every=2", f"checkpoint.local.path={tier}", "parallel=single", "checkpoint.every=100")
    killed = train(1, root, *words, before=lambda rank: kill_points.in_step(8))
    assert killed.codes == [-9], killed.printed
    (kept,) = tier.iterdir()
    assert list(kept.glob("step-*/manifest.json"))
    assert as_another(lambda: os.listdir(tier)) == "PermissionError"
    assert as_another(lambda: kept.rename(f"{kept}.gone")) == "PermissionError"
    assert as_another(lambda: tier.rename(f"{tier}.gone")) == "PermissionError"
    assert as_another(lambda: shutil.rmtree(tier)) == "PermissionError"
    assert train(1, root, *words).codes == [0]


def test_5_10_compiled_code_is_kept_in_a_folder_of_this_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from everstep.process_setup import INDUCTOR_CACHE, use_own_cache

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv(INDUCTOR_CACHE, "/chosen/by/the/user")
    use_own_cache()
    assert os.environ[INDUCTOR_CACHE] == "/chosen/by/the/user"
    monkeypatch.delenv(INDUCTOR_CACHE)
    use_own_cache()
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    made = tmp_path / f"everstep-compiled-{os.getuid()}"
    assert (cache_dir(), made.stat().st_mode & 0o7777) == (str(made), 0o700)
    monkeypatch.delenv(INDUCTOR_CACHE)
    made.chmod(0o777)
    with pytest.raises(
        ConfigError, match=r"TORCHINDUCTOR_CACHE_DIR=.*written by every user \(it must be yours alone\)"
    ):
        use_own_cache()


@needs_root
@pytest.mark.dist
def test_5_10_a_cache_that_another_user_made_first_ends_the_run_before_it_compiles(open_folder: Path) -> None:
    from support.ranks import environment, train

    open_folder.chmod(0o1777)
    root = open_folder / "runs"
    root.mkdir(mode=0o700)
    cache = open_folder / f"everstep-compiled-{os.getuid()}"
    assert as_another(cache.mkdir) == "None"
    with environment(TMPDIR=str(open_folder)):
        ended = train(1, root, "parallel=single", "parallel.compile=eager", before=_forget_tempdir)
    assert ended.codes == [2], ended.printed
    assert "it must be yours alone" in ended.printed


@needs_root
@pytest.mark.dist
def test_a_file_in_place_of_torchs_own_cache_keeps_no_run_from_starting(open_folder: Path) -> None:
    from support.ranks import environment, train

    open_folder.chmod(0o1777)
    root = open_folder / "runs"
    root.mkdir(mode=0o700)
    assert as_another((open_folder / "torchinductor_root").touch) == "None"
    with environment(TMPDIR=str(open_folder), USER="root", LOGNAME="root"):
        ended = train(1, root, "parallel=single", "steps=1", before=_forget_tempdir)
    assert ended.codes == [0], ended.printed


def _forget_tempdir(rank: int) -> None:
    import tempfile

    tempfile.tempdir = None
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)


@needs_root
def test_5_11_another_user_cannot_hold_the_lock_of_a_preparation(open_folder: Path) -> None:
    open_folder.chmod(0o755)
    lock = open_folder / "data" / ".prepare" / "lock"

    def hold() -> None:
        fcntl.flock(os.open(lock, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)

    with Ledger(str(open_folder / "data")).held(print):
        assert lock.stat().st_mode & 0o777 == 0o600
        assert as_another(hold) == "PermissionError"
    assert as_another(hold) == "PermissionError"


def test_5_11_a_long_wait_says_who_prepares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "LONG_S", 0.2)
    said: list[str] = []
    got = threading.Event()

    def other() -> None:
        with Ledger(str(tmp_path)).held(said.append):
            got.set()

    with Ledger(str(tmp_path)).held(print):
        waiting = threading.Thread(target=other)
        waiting.start()
        until(lambda: len(said) == 2)
        assert not got.is_set()
    waiting.join(20)
    assert got.is_set()
    assert said[0] == f"waits for another process that prepares {tmp_path}"
    assert f"(pid {os.getpid()} on {socket.gethostname()}, since " in said[1]
