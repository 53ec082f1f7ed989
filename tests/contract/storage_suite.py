"""What every `Storage` has to do. To test one of your own:

class TestMine(StorageSuite):
    @pytest.fixture
    def store(self): return MyStorage(…)   # empty
"""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from everstep.storage import Storage

MIB = 2**20


class Broken(Exception):
    """What goes wrong in the caller while it writes."""


class StorageSuite:
    def test_what_was_written_is_read(self, store: Storage) -> None:
        for data in (b"", b"one", bytes(range(256)) * 40):
            store.write("deep/er/file", data)
            assert store.read("deep/er/file") == data
            assert store.size("deep/er/file") == len(data)
            assert store.exists("deep/er/file")

    def test_a_range_is_its_bytes_and_nothing_else(self, store: Storage) -> None:
        store.write("file", bytes(range(100)))
        for start, stop in ((0, 100), (0, 1), (99, 100), (10, 20), (0, 0), (50, 50), (100, 100)):
            assert store.read_range("file", start, stop) == bytes(range(start, stop))

    def test_a_range_beyond_the_end_is_what_there_is(self, store: Storage) -> None:
        store.write("file", b"0123456789")
        assert store.read_range("file", 8, 20) == b"89"
        assert store.read_range("file", 10, 20) == b""
        assert store.read_range("file", 50, 60) == b""

    def test_what_is_missing_is_file_not_found(self, store: Storage) -> None:
        store.write("there/file", b"x")
        for path in ("file", "there/other", "there/file/below"):
            assert not store.exists(path)
            for verb in (store.read, store.size, lambda p: store.read_range(p, 0, 1)):
                with pytest.raises(FileNotFoundError):
                    verb(path)

    def test_names_are_sorted_one_level_deep_and_empty_where_nothing_is(self, store: Storage) -> None:
        for path in ("b", "a/2", "a/10/x", "a/10/y", "ab/z"):
            store.write(path, b"x")
        assert store.names() == ["a", "ab", "b"]
        assert store.names("a") == ["10", "2"]
        assert store.names("a/10") == ["x", "y"]
        assert store.names("nowhere") == []
        assert store.names("b") == []

    def test_what_another_process_adds_is_seen_at_once(self, store: Storage) -> None:
        other = type(store)(store.url)
        assert store.names("folder") == []
        assert not store.exists("folder/file")
        other.write("folder/file", b"x")
        assert store.names("folder") == ["file"]
        assert store.exists("folder/file")
        assert store.read("folder/file") == b"x"
        other.delete("folder/file")
        assert store.names("folder") == []
        assert not store.exists("folder/file")

    def test_create_leaves_a_file_that_is_there_as_it_is(self, store: Storage) -> None:
        assert store.create("folder/file", b"first")
        assert not store.create("folder/file", b"second")
        assert store.read("folder/file") == b"first"
        assert store.names("folder") == ["file"]

    def test_of_many_creators_one_wins_and_its_bytes_stand(self, store: Storage) -> None:
        count = 12
        barrier = threading.Barrier(count)

        def contend(number: int) -> bool:
            barrier.wait(30)
            return store.create("claim", b"%d" % number)

        with ThreadPoolExecutor(count) as pool:
            won = list(pool.map(contend, range(count)))
        assert won.count(True) == 1
        assert store.read("claim") == b"%d" % won.index(True)

    @pytest.mark.parametrize("size", [0, 1, 7 * MIB, 40 * MIB])
    def test_a_stream_is_the_file_when_its_block_ends(self, store: Storage, size: int) -> None:
        block = bytes(range(256)) * 4096
        with store.writer("folder/file") as stream:
            for start in range(0, size, len(block)):
                stream.write(block[: size - start])
        assert store.size("folder/file") == size
        assert store.read("folder/file") == (block * 40)[:size]
        assert store.names("folder") == ["file"]

    @pytest.mark.parametrize("size", [1, 7 * MIB, 40 * MIB])
    def test_a_stream_that_breaks_off_leaves_what_was_there(self, store: Storage, size: int) -> None:
        store.write("folder/file", b"old")
        for path in ("folder/file", "new/file"):
            with pytest.raises(Broken):
                self._break_off(store, path, size)
        assert store.read("folder/file") == b"old"
        assert store.names() == ["folder"] or store.names("new") == []
        assert store.names("folder") == ["file"]

    def _break_off(self, store: Storage, path: str, size: int) -> None:
        with store.writer(path) as stream:
            stream.write(b"x" * size)
            assert store.names("new") == []
            raise Broken

    def test_a_reader_never_sees_half_a_write(self, store: Storage) -> None:
        values = {b"a" * 50_000, b"b" * 70_000}
        store.write("file", b"a" * 50_000)
        done = threading.Event()

        def write() -> None:
            for _ in range(5):
                for value in sorted(values):
                    store.write("file", value)
            done.set()

        thread = threading.Thread(target=write)
        thread.start()
        try:
            while not done.is_set():
                assert store.read("file") in values
        finally:
            thread.join()

    def test_delete_removes_files_and_folders_and_nothing_else(self, store: Storage) -> None:
        for path in ("a/1", "a/b/2", "ab/3", "c"):
            store.write(path, b"x")
        store.delete("a")
        store.delete("c")
        store.delete("nowhere")
        assert store.names("a") == []
        assert not store.exists("a/b/2")
        assert not store.exists("c")
        assert store.exists("ab/3")

    def test_move_takes_files_and_folders_with_all_in_them(self, store: Storage) -> None:
        store.write("a/b/1", b"x")
        store.write("file", b"y")
        store.move("a", "to/here")
        store.move("file", "to/file")
        assert store.read("to/here/b/1") == b"x"
        assert store.read("to/file") == b"y"
        assert not store.exists("a/b/1")
        assert not store.exists("file")

    def test_a_copy_leaves_what_it_copies(self, store: Storage) -> None:
        store.write("a/b/1", b"x" * 5000)
        store.write("a/2", b"")
        store.write("file", b"y")
        store.write("to/file", b"old")
        store.copy("a", "to/here")
        store.copy("file", "to/file")
        for folder in ("a", "to/here"):
            assert store.read(f"{folder}/b/1") == b"x" * 5000
            assert store.read(f"{folder}/2") == b""
        assert store.read("to/file") == store.read("file") == b"y"
        with pytest.raises(FileNotFoundError):
            store.copy("nowhere", "to/nowhere")
        assert store.names("to") == ["file", "here"]

    def test_odd_names_are_kept_as_they_are(self, store: Storage) -> None:
        names = sorted(["a b", "a+b", "a=b,c", "ä", "100%", "a%20b", "x~y", "(1)", "@", "[0]"])
        for name in names:
            store.write(f"odd/{name}", name.encode())
        assert store.names("odd") == names
        for name in names:
            assert store.read(f"odd/{name}") == name.encode()
            assert store.exists(f"odd/{name}")
        store.delete("odd")
        assert store.names() == []

    def test_a_storage_can_be_sent_to_another_process(self, store: Storage) -> None:
        store.write("file", b"x")
        assert pickle.loads(pickle.dumps(store)).read("file") == b"x"

    def test_two_roots_do_not_see_each_other(self, store: Storage) -> None:
        store.write("inner/file", b"x")
        inner = type(store)(f"{store.url}/inner")
        assert inner.names() == ["file"]
        assert inner.read("file") == b"x"
        inner.write("other", b"y")
        assert store.read("inner/other") == b"y"
