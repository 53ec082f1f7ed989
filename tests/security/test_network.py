"""The network of a start is its own: other users and other hosts can neither take part in it nor stop it."""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.compose import compose
from everstep.errors import MachineError
from everstep.frozen_config import settle
from everstep.launch import torchrun
from everstep.rank_env import WORLD
from everstep.rendezvous import channel, store_server
from everstep.rendezvous.start_folder import FOLDERS, LOCK, SOCKET, StartFolder
from everstep.rendezvous.store_server import StoreServer
from everstep.run_folder import RunFolder
from everstep.security.job_secrets import START_KEY
from everstep.trainer.distributed.store_client import RunStore
from support.processes import until
from support.strangers import as_another_user, needs_namespaces, needs_root, network, tcp

KEY = bytes(range(32))
TOLD = "everstep/0123/told"


@pytest.fixture
def server() -> Iterator[StoreServer]:
    made = StoreServer("tcp:127.0.0.1:0", KEY)
    yield made
    made.close()


def port_of(server: StoreServer) -> int:
    return int(server.address.rpartition(":")[2])


def said_to(port: int, *words: bytes, host: str = "127.0.0.1") -> str:
    """Return the answer to these bytes after the challenge; empty if the server hangs up."""
    with tcp(host, port) as connection:
        connection.recv(channel.CHALLENGE_BYTES)
        for word in words:
            connection.sendall(word)
        try:
            return connection.recv(1 << 16).decode("latin-1")
        except ConnectionError:
            return ""


# One machine: no port at all.


@pytest.mark.process
@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_on_one_machine_listens_only_on_the_loopback_and_only_while_it_starts(
    tmp_path: Path, parallel: str
) -> None:
    words = [f"run_root={tmp_path}", "run=r", "experiment=digits", "job.nproc=2", "steps=1000000", "log.every=1"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        run = subprocess.Popen([sys.executable, "-m", "everstep.launch", "run", *words, f"parallel={parallel}"],
                               stdout=output, stderr=output)  # fmt: skip
    seen: set[str] = set()

    def stepped() -> bool:
        time.sleep(0.1)  # or asking costs more than the run
        seen.update(listening(run.pid))
        assert run.poll() is None, log.read_text()
        return re.search(r"step \d+/", log.read_text()) is not None

    try:
        until(stepped, 100)
        assert {place.rpartition(":")[0] for place in seen} <= {"127.0.0.1", "[::1]"}
        assert listening(run.pid) == set()
    finally:
        run.send_signal(signal.SIGINT)
        run.wait(60)


SCRIPT = """
import os, subprocess, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
if os.environ["RANK"] == "0":
    print("sum", total.item(), "secrets", sorted(name for name in os.environ if name.startswith("EVERSTEP_S")))
    subprocess.run(["ss", "-ltnH", f"sport = {os.environ['MASTER_PORT']}"])
dist.barrier()
"""


@pytest.mark.process
def test_a_script_of_the_users_own_gets_torchs_store_on_the_loopback_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SCRIPT)
    argv = torchrun.agent([str(tmp_path / "mine.py")], 2, 10, torchrun.Rendezvous(id="r"))
    done = subprocess.run(
        argv, env=torchrun.environment(os.environ, 1, {}), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "sum 2.0 secrets []" in done.stdout
    assert re.findall(r"LISTEN +\d+ +\d+ +(\S+):\d+", done.stdout) == ["127.0.0.1"]


def listening(pid: int) -> set[str]:
    """Addresses on which a process and its descendants listen."""
    ours = {pid, *below(pid)}
    lines = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[3] for line in lines if ours & {int(each) for each in re.findall(r"pid=(\d+)", line)}}


def below(pid: int) -> set[int]:
    found: set[int] = set()
    for task in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(task.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid:
            found |= {int(task.parent.name), *below(int(task.parent.name))}
    return found


@needs_root
def test_another_user_can_neither_see_nor_reach_the_store_of_a_machine() -> None:
    folder = StartFolder().path
    server = StoreServer(f"unix:{folder}/{SOCKET}", KEY)

    def attack() -> list[str]:
        found = []
        for work in (lambda: os.listdir(folder), lambda: socket.socket(socket.AF_UNIX).connect(f"{folder}/{SOCKET}"),
                     lambda: os.unlink(f"{folder}/{SOCKET}"), lambda: os.rename(folder, f"{folder}x")):  # fmt: skip
            try:
                work()
                found.append("done")
            except OSError as error:
                found.append(type(error).__name__)
        return found

    try:
        assert as_another_user(attack) == ["PermissionError"] * 4
        assert os.stat(folder).st_mode & 0o777 == 0o700
        RunStore(server.address, KEY, 5).set("still", "there")
    finally:
        server.close()


def test_a_start_that_was_killed_leaves_a_folder_that_the_next_one_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    living = StartFolder().path
    if (pid := os.fork()) == 0:
        StartFolder()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len(list(tmp_path.iterdir())) == 2
    newest = StartFolder().path
    assert {str(each) for each in tmp_path.iterdir()} == {living, newest}


def test_a_folder_of_another_user_or_one_that_others_can_write_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / LOCK).write_text("")
    (tmp_path / f"{FOLDERS}link").symlink_to(precious)
    planted = tmp_path / f"{FOLDERS}planted"
    planted.mkdir()
    planted.chmod(0o777)
    (planted / LOCK).write_text("")
    StartFolder()
    assert (precious / LOCK).exists()
    assert planted.exists()


def test_a_store_in_a_folder_with_a_long_name_can_be_reached(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    server = StoreServer(f"unix:{folder}/{SOCKET}", KEY)
    RunStore(server.address, KEY, 5).set("a", "b")
    server.close()


# Several nodes: a port that serves only those who know the key.


def test_a_pickle_that_is_planted_for_the_agent_finds_no_store_that_takes_it(
    server: StoreServer, tmp_path: Path
) -> None:
    class Mark:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/MARK",)

    planted = base64.b64encode(pickle.dumps(Mark()))
    words = channel.Direction(KEY[::-1]).pack([b"set", b"torch.rendezvous.r", planted])
    assert said_to(port_of(server), bytes(channel.ANSWER_BYTES), words) == ""
    store = RunStore(server.address, KEY, 5)
    assert store.num_keys() == 0
    store.set("torch.rendezvous.r", planted)  # and one of us who writes it starts nothing either
    assert store.get("torch.rendezvous.r") == planted
    assert not (tmp_path / "MARK").exists()


@needs_root
def test_another_user_can_neither_tell_the_ranks_a_config_nor_read_theirs(server: StoreServer) -> None:
    store = RunStore(server.address, KEY, 5)
    store.set("config", "ours")

    def attack() -> str:
        first = said_to(port_of(server), bytes(channel.ANSWER_BYTES))
        frame = channel.Direction(bytes(32)).pack([b"set", TOLD.encode(), b'+{"config": "plugins: [posix]"}'])
        return first + said_to(port_of(server), frame * 10)

    assert as_another_user(attack) == ""
    assert not store.check([TOLD])
    assert store.get("config") == b"ours"


def test_a_stranger_with_torchs_own_client_gets_no_answer(server: StoreServer) -> None:
    code = (
        "import sys, datetime, torch.distributed as d\n"
        "s = d.TCPStore('127.0.0.1', int(sys.argv[1]), is_master=False, wait_for_workers=False,\n"
        "               timeout=datetime.timedelta(seconds=2))\n"
        f"s.set({TOLD!r}, 'evil'); print('written', s.num_keys())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(port_of(server))], capture_output=True, text=True)
    assert done.returncode != 0
    assert "written" not in done.stdout
    assert RunStore(server.address, KEY, 5).num_keys() == 0


def test_a_recorded_proof_is_good_for_no_second_connection(server: StoreServer) -> None:
    with tcp("127.0.0.1", port_of(server)) as one:
        recorded = channel.answer(KEY, one.recv(channel.CHALLENGE_BYTES))
        one.sendall(recorded)
        assert len(one.recv(channel.PROOF_BYTES)) == channel.PROOF_BYTES
    assert said_to(port_of(server), recorded) == ""


def test_a_message_that_was_changed_repeated_or_inserted_ends_the_connection(server: StoreServer) -> None:
    for tampered in (lambda a, b: [a[:-1] + b"X"], lambda a, b: [a, a], lambda a, b: [b]):
        with tcp("127.0.0.1", port_of(server)) as connection:
            challenged = connection.recv(channel.CHALLENGE_BYTES)
            answered = channel.answer(KEY, challenged)
            connection.sendall(answered)
            channel.confirm(KEY, challenged, answered, connection.recv(channel.PROOF_BYTES))
            send, _ = channel.directions(KEY, challenged, answered)
            connection.sendall(b"".join(tampered(*(send.pack([b"add", b"n", b"1"]) for _ in range(2)))))
            until(lambda: _hung_up(connection))
    assert RunStore(server.address, KEY, 5).add("n", 0) == 1  # the first of the two that were the same


def _hung_up(connection: socket.socket) -> bool:
    try:
        return connection.recv(1 << 16) == b""
    except ConnectionError:
        return True


def test_a_server_that_does_not_know_the_key_is_not_believed() -> None:
    """The run folder names the head's address, and whoever may write there can name another."""
    evil = StoreServer("tcp:127.0.0.1:0", bytes(32))
    with pytest.raises(MachineError, match="cannot be used"):
        RunStore(evil.address, KEY, 0.3)
    evil.close()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        threading.Thread(
            target=lambda: silent.accept()[0].sendall(channel.challenge() + bytes(64)), daemon=True
        ).start()
        with pytest.raises(MachineError, match="does not know the key"):
            RunStore(f"tcp:127.0.0.1:{silent.getsockname()[1]}", KEY, 0)


def test_a_process_of_another_start_is_not_let_in() -> None:
    from everstep.security.job_secrets import start_key

    old, new = (bytes.fromhex(start_key("t" * 32, f"12.0.{number}")) for number in (1, 2))
    server = StoreServer("tcp:127.0.0.1:0", new)
    with pytest.raises(MachineError):
        RunStore(server.address, old, 0.2)
    server.close()


def two_nodes(tmp_path: Path, keys: tuple[str, str]) -> tuple[list[subprocess.Popen[bytes]], int, Path]:
    """Agents of two nodes, which differ in their port only, their store's port, and what they print."""
    composed = compose(["experiment=digits", f"run_root={tmp_path}", "run=r", "steps=1000000", "log.every=1"])
    folder = RunFolder(str(tmp_path / "r"))
    settle(composed.run, folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    log = tmp_path / "log"
    agents = []
    for rank, key in enumerate(keys):
        meeting = torchrun.Rendezvous(2, f"127.0.0.1:{port}", rank, "1.0.1")
        extra = {START_KEY: key, "GLOO_SOCKET_IFNAME": "lo", WORLD: "2"}
        argv = torchrun.agent(torchrun.trainer(str(tmp_path / "r")), 1, 10, meeting)
        argv = [word.replace("join_timeout=600", "join_timeout=5") for word in argv]
        with log.open("ab") as out:
            env = torchrun.environment(os.environ, 1, extra)
            agents.append(subprocess.Popen(argv, env=env, stdout=out, stderr=out))
    return agents, port, log


@pytest.mark.process
@pytest.mark.usefixtures("warm")
def test_the_agents_of_two_nodes_meet_and_listen_on_the_one_address_of_the_store(tmp_path: Path) -> None:
    agents, port, log = two_nodes(tmp_path, ("ab" * 32, "ab" * 32))
    try:
        until(lambda: re.search(r"step \d+/", log.read_text()) is not None, 100)
        assert {place for agent in agents for place in listening(agent.pid)} == {f"127.0.0.1:{port}"}
        arguments = "".join(Path(f"/proc/{pid}/cmdline").read_text() for agent in agents for pid in below(agent.pid))
        assert "ab" * 32 not in arguments
        for _ in range(300):  # strangers come while it trains
            with contextlib.suppress(OSError):
                assert said_to(port, os.urandom(channel.ANSWER_BYTES)) == ""
        before = log.read_text()
        until(lambda: log.read_text() != before, 60)
        assert [agent.poll() for agent in agents] == [None, None]
    finally:
        for agent in agents:
            agent.terminate()
        for agent in agents:
            agent.wait(60)


@pytest.mark.process
@pytest.mark.usefixtures("warm")
def test_a_node_with_another_key_is_left_outside_with_a_line(tmp_path: Path) -> None:
    agents, port, log = two_nodes(tmp_path, ("ab" * 32, "cd" * 32))
    try:
        assert agents[1].wait(100) == 1
        assert f"error: the store of this start at tcp:127.0.0.1:{port} cannot be used" in log.read_text()
    finally:
        for agent in agents:
            agent.kill()
            agent.wait(60)


@needs_root
def test_a_flood_of_connections_takes_neither_descriptors_nor_the_store_away(server: StoreServer) -> None:
    store = RunStore(server.address, KEY, 5)
    ours, theirs = os.pipe()
    end, stop = os.pipe()
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        os.setuid(65534)
        held = []
        for _ in range(3000):
            held.append(socket.socket())
            held[-1].setblocking(False)
            held[-1].connect_ex(("127.0.0.1", port_of(server)))
        os.write(theirs, b".")
        os.read(end, 1)
        os._exit(0)
    try:
        os.read(ours, 1)
        before = len(os.listdir("/proc/self/fd"))
        store.set("during", "flood")
        assert RunStore(server.address, KEY, 30).get("during") == b"flood"
        until(lambda: len(os.listdir("/proc/self/fd")) < before + 2 * store_server.MOST_UNPROVEN)
    finally:
        os.write(stop, b".")
        os.waitpid(pid, 0)


@needs_namespaces
def test_a_host_of_another_network_reaches_only_the_one_address_and_is_not_served_there() -> None:
    with network() as other:
        local = StoreServer("tcp:127.0.0.1:0", KEY)
        before = listening(os.getpid())
        public = StoreServer(f"tcp:{other.here}:0", KEY)
        try:
            assert listening(os.getpid()) - before == {f"{other.here}:{port_of(public)}"}
            assert "Error" in other.do(lambda: said_to(port_of(local), host=other.here))
            assert other.do(lambda: said_to(port_of(public), bytes(channel.ANSWER_BYTES), host=other.here)) == ""
            assert RunStore(public.address, KEY, 5).num_keys() == 0
        finally:
            local.close()
            public.close()
