"""The user's code is kept as it was, once for each content, and comes out again with nothing beside it."""

from __future__ import annotations

import contextlib
import gzip
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.errors import ConfigError
from everstep.launch.submit import snapshot
from everstep.launch.submit.code_archive import SnapshotError, SnapshotFile, digest_of, pack
from everstep.launch.submit.snapshot import take, unpack
from everstep.run_folder import RunFolder
from support.tar_archives import info, tar


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "protocol.file.allow=always")
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """One file committed, one changed since, one new, one ignored."""
    folder = tmp_path / "checkout"
    (folder / "package").mkdir(parents=True)
    git(folder, "init", "-q")
    (folder / "package" / "a.py").write_text("committed\n")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "gone.py").write_text("")
    (folder / ".gitignore").write_text("ignored/\n*.log\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "a")
    (folder / "package" / "a.py").write_text("changed\n")
    (folder / "package" / "new.py").write_text("untracked\n")
    (folder / "gone.py").unlink()
    (folder / "ignored").mkdir()
    (folder / "ignored" / "secret").write_text("s")
    (folder / "x.log").write_text("log")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "elsewhere" / "r"))


def files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_changed_and_new_files_are_in_it_and_ignored_and_deleted_ones_are_not(
    checkout: Path, run: RunFolder, tmp_path: Path
) -> None:
    kept = take(run, checkout)
    assert files(unpack(run, kept.digest, tmp_path / "node")) == {
        ".gitignore": "ignored/\n*.log\n", "package/a.py": "changed\n", "package/new.py": "untracked\n",
        "run.sh": "#!/bin/sh\n",
    }  # fmt: skip
    assert os.access(tmp_path / "node" / kept.digest / "run.sh", os.X_OK)
    assert (kept.files, kept.folder) == (4, "")


def test_what_is_queued_is_not_touched_by_later_edits(checkout: Path, run: RunFolder, tmp_path: Path) -> None:
    kept = take(run, checkout)
    (checkout / "package" / "a.py").write_text("edited while the job waited\n")
    later = take(run, checkout)
    assert later.digest != kept.digest
    assert (unpack(run, kept.digest, tmp_path / "node") / "package" / "a.py").read_text() == "changed\n"
    assert (unpack(run, later.digest, tmp_path / "node") / "package" / "a.py").read_text().startswith("edited")


def test_the_same_content_is_kept_once_whatever_its_times(checkout: Path, run: RunFolder) -> None:
    first = take(run, checkout)
    archive = run.storage.path(snapshot.archive(first.digest))
    assert archive is not None
    written = archive.stat().st_mtime_ns
    os.utime(checkout / "package" / "a.py", (1, 1))
    git(checkout, "add", "-A")
    git(checkout, "commit", "-qm", "b")
    assert take(run, checkout).digest == first.digest
    assert run.storage.names("code") == [f"{first.digest}.tar.gz"]
    assert archive.stat().st_mtime_ns == written


def test_two_archives_of_one_content_are_equal_to_the_byte(checkout: Path, tmp_path: Path) -> None:
    runs = [RunFolder(str(tmp_path / name / "r")) for name in "ab"]
    kept = [take(run, checkout) for run in runs]
    one, other = (run.storage.read(snapshot.archive(each.digest)) for run, each in zip(runs, kept, strict=True))
    assert one == other


@pytest.mark.parametrize("change", ["content", "name", "mode", "link"])
def test_whatever_differs_gives_another_digest(change: str) -> None:
    first = [SnapshotFile("a", b"x"), SnapshotFile("b", b"y")]
    other = {
        "content": [SnapshotFile("a", b"xy"), SnapshotFile("b", b"")],
        "name": [SnapshotFile("a", b"x"), SnapshotFile("c", b"y")],
        "mode": [SnapshotFile("a", b"x", 0o755), SnapshotFile("b", b"y")],
        "link": [SnapshotFile("a", b"x", link=True), SnapshotFile("b", b"y")],
    }
    assert digest_of(first) == digest_of(list(reversed(first)))
    assert digest_of(first) != digest_of(other[change])


def test_below_the_top_the_whole_checkout_is_kept_with_where_one_stood(checkout: Path, run: RunFolder) -> None:
    kept = take(run, checkout / "package")
    assert (kept.folder, kept.files) == ("package", 4)


def test_a_submodule_comes_along(checkout: Path, run: RunFolder, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    git(inner, "init", "-q")
    (inner / "i.py").write_text("inner\n")
    git(inner, "add", "-A")
    git(inner, "commit", "-qm", "i")
    git(checkout, "submodule", "add", "-q", str(inner), "sub")
    (checkout / "sub" / "new.py").write_text("not committed there\n")
    found = files(unpack(run, take(run, checkout).digest, tmp_path / "node"))
    assert (found["sub/i.py"], found["sub/new.py"]) == ("inner\n", "not committed there\n")


def test_runs_that_git_was_not_told_to_ignore_are_no_code(checkout: Path) -> None:
    run = RunFolder(str(checkout / "runs" / "r"))
    run.storage.write("checkpoints/big", b"0" * 1000)
    assert take(run, checkout).files == 4


def test_links_stay_links_and_those_that_lead_out_are_left_out_and_told(
    checkout: Path, run: RunFolder, tmp_path: Path
) -> None:
    (checkout / "inside").symlink_to("package/a.py")
    (checkout / "outside").symlink_to("/etc/hostname")
    (checkout / "package" / "up").symlink_to("../../elsewhere")
    kept = take(run, checkout)
    assert kept.left_out == ("outside", "package/up")
    found = unpack(run, kept.digest, tmp_path / "node")
    assert os.readlink(found / "inside") == "package/a.py"
    assert not (found / "outside").exists()


def test_too_much_is_refused_with_the_largest_files_and_the_key(checkout: Path, run: RunFolder) -> None:
    (checkout / "weights.bin").write_bytes(bytes(3_000_000))
    with pytest.raises(ConfigError) as refused:
        take(run, checkout, limit_mb=2)
    assert "has 3 MB, more than job.code_mb=2 (largest: weights.bin 3.0 MB, " in str(refused.value)
    assert "name what is no code in .gitignore" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert run.storage.names("code") == []


def test_outside_of_git_the_named_packages_and_scripts_are_taken(tmp_path: Path, run: RunFolder) -> None:
    folder = tmp_path / "plain"
    (folder / "mine" / "__pycache__").mkdir(parents=True)
    for name in ("mine/task.py", "mine/data.json", "mine/__pycache__/task.pyc", "single.py", "train.py", "other.txt"):
        (folder / name).write_text(name)
    kept = take(run, folder, plugins=["mine.task", "single", "numpy"], scripts=["train.py"])
    assert sorted(files(unpack(run, kept.digest, tmp_path / "node"))) == [
        "mine/data.json", "mine/task.py", "single.py", "train.py",
    ]  # fmt: skip


def test_outside_of_git_what_the_named_ones_import_from_the_folder_is_taken_too(tmp_path: Path, run: RunFolder) -> None:
    folder = tmp_path / "plain"
    texts = {
        "mine/task.py": "import trainer\nfrom lib.layers import Layer\nfrom . import inner\n",
        "mine/inner.py": "def late():\n    import json, data.load as load\n",
        "trainer.py": "from mine import task\nimport numpy, absent\n", "lib/__init__.py": "", "lib/layers.py": "",
        "lib/table.csv": "1", "data/load.py": "", "data/pictures.bin": "0", "other.py": "", "numpy/notes.py": "",
        "tools/train.py": "import helper, other2\n", "tools/helper.py": "", "other2.py": "this is { no Python",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    kept = take(run, folder, plugins=["mine"])
    assert files(unpack(run, kept.digest, tmp_path / "node")).keys() == {
        "mine/task.py", "mine/inner.py", "trainer.py", "lib/__init__.py", "lib/layers.py", "lib/table.csv",
        "data/load.py",
    }  # fmt: skip
    kept = take(run, folder, scripts=["tools/train.py"])
    assert files(unpack(run, kept.digest, tmp_path / "node")).keys() == {
        "tools/train.py",
        "tools/helper.py",
        "other2.py",
    }


def test_a_store_keeps_it_as_a_disk_does(checkout: Path, tmp_path: Path) -> None:
    run = RunFolder(f"memory://snapshot/{tmp_path.name}")
    kept = take(run, checkout)
    assert (unpack(run, kept.digest, tmp_path / "node") / "package" / "a.py").read_text() == "changed\n"


@pytest.mark.process
def test_processes_that_unpack_at_once_get_one_folder(checkout: Path, run: RunFolder, tmp_path: Path) -> None:
    kept = take(run, checkout)
    node = tmp_path / "node"
    code = (
        "import sys; from pathlib import Path; from everstep.launch.submit.snapshot import unpack\n"
        "from everstep.run_folder import RunFolder\n"
        "print((unpack(RunFolder(sys.argv[1]), sys.argv[2], Path(sys.argv[3])) / 'package/a.py').read_text())"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, run.url, kept.digest, str(node)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    assert [process.communicate(timeout=60)[0] for process in started] == ["changed\n\n"] * 4
    assert [path.name for path in node.iterdir()] == [kept.digest]


def test_threads_that_unpack_at_once_get_one_folder(checkout: Path, run: RunFolder, tmp_path: Path) -> None:
    kept = take(run, checkout)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(unpack(run, kept.digest, tmp_path / "n"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "n" / kept.digest] * 8
    assert [path.name for path in (tmp_path / "n").iterdir()] == [kept.digest]


def link(path: str, target: bytes) -> SnapshotFile:
    return SnapshotFile(path, target, 0o777, link=True)


HOSTILE = {
    "an absolute path": tar(info("/tmp/owned")),
    "a path upwards": tar(info("a/../../owned")),
    "a link to an absolute path": tar(info("a", tarfile.SYMTYPE, "/etc")),
    "a link upwards": tar(info("a/b", tarfile.SYMTYPE, "../../x")),
    "a hard link": tar(info("a", tarfile.LNKTYPE, "/etc/passwd")),
    "a device": tar(info("a", tarfile.CHRTYPE)),
    "a pipe": tar(info("a", tarfile.FIFOTYPE)),
    "no archive": b"PK" * 20,
    "half an archive": tar(info("a"))[:30],
    "a gzip of something else": gzip.compress(b"x" * 2000),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_archive_is_refused_and_leaves_nothing(what: str, run: RunFolder, tmp_path: Path) -> None:
    run.storage.write(snapshot.archive("d"), HOSTILE[what])
    with pytest.raises(SnapshotError):
        unpack(run, "d", tmp_path / "node")
    assert not (tmp_path / "node").exists() or list((tmp_path / "node").iterdir()) == []
    assert not Path("/tmp/owned").exists()


@pytest.mark.parametrize(
    "members",
    [
        # Each link's own words stay inside; one through the other leads out.
        [link("x/d", b".."), link("e", b"x/d/../y")],
        # A file below a link would be written through it.
        [link("x", b"."), SnapshotFile("x/y", b"data")],
        [SnapshotFile("x", b"data"), SnapshotFile("x/y", b"data")],
    ],
)
def test_members_that_reach_through_each_other_are_refused(
    members: list[SnapshotFile], run: RunFolder, tmp_path: Path
) -> None:
    run.storage.write(snapshot.archive(digest_of(members)), pack(members))
    with pytest.raises(SnapshotError):
        unpack(run, digest_of(members), tmp_path / "node")
    assert list((tmp_path / "node").iterdir()) == []


def test_an_archive_with_another_content_than_its_name_says_is_refused(run: RunFolder, tmp_path: Path) -> None:
    digest = digest_of([SnapshotFile("a", b"x")])
    run.storage.write(snapshot.archive(digest), pack([SnapshotFile("a", b"y")]))
    with pytest.raises(SnapshotError, match="does not hold the code that its name says"):
        unpack(run, digest, tmp_path / "node")


def test_an_archive_that_would_fill_the_disk_is_broken_off(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "UNPACKED_LIMIT_MB", 1)
    run.storage.write(snapshot.archive("d"), pack([SnapshotFile("a", bytes(2_000_000))]))
    with pytest.raises(SnapshotError, match="more than 1 MB"):
        unpack(run, "d", tmp_path / "node", 0.5)


def test_a_snapshot_that_is_gone_says_so(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="the code of this job is gone"):
        unpack(run, "0" * 32, tmp_path)


def test_a_node_runs_only_code_that_nobody_else_could_have_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = snapshot.node_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert snapshot.node_folder() == folder
    folder.chmod(0o777)
    with pytest.raises(SnapshotError, match="must be yours alone"):
        snapshot.node_folder()
    folder.rmdir()
    (tmp_path / "others").mkdir()
    folder.symlink_to(tmp_path / "others")
    with pytest.raises(SnapshotError, match="must be yours alone"):
        snapshot.node_folder()


names = st.text("ab/.", min_size=1, max_size=6)


targets = st.text("ab/.", min_size=1, max_size=6).map(str.encode)
kinds = st.builds(SnapshotFile, names, st.binary(max_size=8)) | st.builds(link, names, targets)


@given(st.lists(kinds, max_size=5))
def test_whatever_an_archive_holds_nothing_is_written_outside(members: list[SnapshotFile]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "deep" / "node"
        run = RunFolder(f"{scratch}/run")
        run.storage.write(snapshot.archive(digest_of(members)), pack(members))
        before = sorted(Path(scratch).rglob("*"))
        with contextlib.suppress(SnapshotError):
            unpack(run, digest_of(members), folder)
        new = set(Path(scratch).rglob("*")) - set(before) - {folder, folder.parent}
        assert all(path.is_relative_to(folder) for path in new)
        assert all(Path(os.path.realpath(path)).is_relative_to(folder) for path in new if path.is_symlink())
