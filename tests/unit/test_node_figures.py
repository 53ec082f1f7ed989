"""Figures of nodes: of this machine as they are, of GPUs by a library that is made up, and what becomes of them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
import types
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from everstep import control_group
from everstep.config import LogConfig, RunConfig
from everstep.control_group import memory_usage
from everstep.launch.runs.energy import energy_kwh
from everstep.launch.runs.history import read
from everstep.rank_env import RankInfo
from everstep.run_folder import RunFolder
from everstep.trainer.reporting import node_recorder
from everstep.trainer.reporting.gpu_figures import GpuMeter
from everstep.trainer.reporting.host_figures import Figures, HostMeter
from everstep.trainer.reporting.node_recorder import Energy, NodeRecorder, Recording, mean
from everstep.trainer.reporting.sinks import JsonLines
from support.processes import until
from support.run_records import Records

FILE = "nodes/0000.jsonl"


def config(every_s: float | None = 0.1) -> RunConfig:
    return RunConfig(log=LogConfig(node_every_s=every_s))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


# ------------------------------------------------------------------ the machine


def test_a_busy_processor_is_seen(tmp_path: Path) -> None:
    meter = HostMeter({})
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        time.sleep(1.0)
        figures = meter.sample()
        busy.kill()
    cores = os.cpu_count() or 1
    assert 50 / cores <= number(figures, "cpu_percent") <= 100


def number(figures: Figures, name: str) -> float:
    value = figures[name]
    assert isinstance(value, float)
    return value


def test_bytes_that_are_written_and_memory_in_use_are_seen(tmp_path: Path) -> None:
    meter = HostMeter({"run": tmp_path / "not" / "there" / "yet"})
    with (tmp_path / "file").open("wb") as file:
        file.write(bytes(64 << 20))
        os.fsync(file.fileno())
    figures = meter.sample()
    assert 50 < number(figures, "memory_mb") < number(figures, "memory_limit_mb")
    assert number(figures, "run_free_gb") > 0
    assert min(number(figures, name) for name in ("net_in_mb_s", "net_out_mb_s")) >= 0
    if "disk_write_mb_s" in figures:
        assert number(figures, "disk_write_mb_s") >= 0


@pytest.fixture(params=["v2", "v1"])
def group(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A group below one that has the limit; nothing is known of this process's own."""
    monkeypatch.setattr(control_group, "CGROUPS", tmp_path)
    names = ("memory.max", "memory.current", "inactive_file 500", "max")
    root = tmp_path
    if request.param == "v1":
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file 500", str(2**63 - 4096))
        root = tmp_path / "memory"
    line = "0::/job/step" if request.param == "v2" else "4:memory:/job/step"
    for where, limit, used in (("job/step", names[3], 2000), ("job", "9000", 3500)):
        (root / where).mkdir(parents=True, exist_ok=True)
        (root / where / names[0]).write_text(f"{limit}\n")
        (root / where / names[1]).write_text(f"{used}\n")
        (root / where / "memory.stat").write_text(f"anon 1\n{names[2]}\n")
    read_text = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a: line if str(self) == "/proc/self/cgroup" else read_text(self, *a)
    )
    return root


def test_the_limit_is_that_of_the_control_group_above(group: Path) -> None:
    usage = memory_usage()
    assert usage is not None
    assert (usage.used, usage.limit, usage.free) == (3000, 9000, 6000)
    figures = HostMeter({}).sample()
    assert figures["memory_limit_mb"] == round(9000 / 2**20, 1)


def test_a_group_without_a_limit_leaves_that_of_the_machine(group: Path) -> None:
    for file in ("memory.max", "memory.limit_in_bytes"):
        if (group / "job" / file).exists():
            (group / "job" / file).write_text("max")
    assert memory_usage() is None
    assert number(HostMeter({}).sample(), "memory_limit_mb") > 100


# ------------------------------------------------------------------ GPUs


class FakeNvml(types.ModuleType):
    """Four GPUs: the second has no power figure, as small ones have none."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.power = 250_000
        self.reasons = 0
        self.down = False
        self.calls = 0

    def nvmlInit(self) -> None:
        if self.down:
            raise RuntimeError("NVML_ERROR_DRIVER_NOT_LOADED")

    def nvmlShutdown(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int:
        return 4

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        return number

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}a1b2"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        self.calls += 1
        if self.down:
            raise RuntimeError("NVML_ERROR_GPU_IS_LOST")
        return types.SimpleNamespace(gpu=90 + handle)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return types.SimpleNamespace(used=3 << 30, total=80 << 30)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if handle == 1 or self.down:
            raise RuntimeError("NVML_ERROR_NOT_SUPPORTED")
        return self.power

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        return {1: 1980, 2: 2600}[kind]

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 61

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return self.reasons


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    return fake


def test_each_gpu_of_the_job_has_its_figures(nvml: FakeNvml) -> None:
    nvml.reasons = 0x01 | 0x04 | 0x40  # idle is no reason of interest
    figures = GpuMeter().sample()
    assert {name: value for name, value in figures.items() if name.startswith("gpu0")} == {
        "gpu0_percent": 90.0,
        "gpu0_memory_mb": 3072.0,
        "gpu0_memory_limit_mb": 81920.0,
        "gpu0_power_w": 250.0,
        "gpu0_clock_mhz": 1980.0,
        "gpu0_memory_clock_mhz": 2600.0,
        "gpu0_celsius": 61.0,
        "gpu0_throttled_percent": 100.0,
        "gpu0_throttled_by": "power_cap hw_thermal",
    }
    assert "gpu1_power_w" not in figures
    assert figures["gpu1_percent"] == 91.0
    assert "gpu2_percent" not in figures


@pytest.mark.parametrize(
    ("visible", "seen"),
    [(None, [90, 91]), ("3,2", [93, 92]), ("GPU-2a,GPU-0", [92, 90]), ("", []), ("1,9,2", [91]), ("-1", [])],
)
def test_the_gpus_are_those_that_the_job_may_use(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str | None, seen: list[int]
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    figures = GpuMeter().sample()
    assert [figures[f"gpu{n}_percent"] for n in range(len(seen))] == seen
    assert f"gpu{len(seen)}_percent" not in figures


@pytest.mark.parametrize("missing", [True, False])
def test_without_nvml_there_are_no_gpus_and_one_debug_line(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, missing: bool
) -> None:
    nvml.down = True
    if missing:
        monkeypatch.setitem(sys.modules, "pynvml", None)
    with caplog.at_level(logging.DEBUG, "everstep"):
        meter = GpuMeter()
        assert [meter.sample() for _ in range(3)] == [{}, {}, {}]
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]


def test_a_gpu_that_is_lost_leaves_the_figures_that_are_left(nvml: FakeNvml, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "everstep"):
        meter = GpuMeter()
        nvml.down = True
        for _ in range(3):
            assert meter.sample()["gpu0_celsius"] == 61.0
    assert len(caplog.records) == 1


# ------------------------------------------------------------------ records


def test_energy_is_the_integral_of_the_power() -> None:
    energy = Energy()
    for at, watts in ((10.0, 100.0), (15.0, 300.0), (20.0, None), (25.0, 100.0)):
        energy.add(at, watts)
    assert energy.joules == 5 * 200 + 10 * 200
    unknown = Energy()
    unknown.add(1.0, None)
    assert unknown.joules is None


def test_a_mean_takes_what_each_sample_has() -> None:
    samples: list[Figures] = [{"a": 1.0, "by": "x y"}, {"a": 4.0, "b": 2.0}, {"by": "z x"}]
    assert mean(samples) == {"a": 2.5, "by": "x y z", "b": 2.0}


def test_records_become_rarer_so_that_the_file_stays_small(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml
) -> None:
    """Twenty days in fast motion: every 5 s at first, once a minute in the end, and the energy is that of the time."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(HostMeter, "sample", lambda self: {"cpu_percent": 50.0})
    recording = Recording(0, JsonLines(folder.storage, folder.attempt(1, FILE)), {}, deque(maxlen=100))
    days, counts = 20, []
    for n in range(days * 17280):
        now[0] += 5.0
        if n in (720, 17280):
            counts.append(len(list(folder.lines(1, FILE))))
        recording.sample(5.0)
    recording.end()
    records = list(folder.lines(1, FILE))
    assert 700 <= counts[0] <= 720
    assert counts[1] < 3500
    assert len(records) < 3500 + 19 * 1441
    assert len(recording._taken) == 100
    assert records[-1]["energy_j"] == pytest.approx(250.0 * days * 86400)


def test_a_recorder_writes_and_ends_with_the_attempt(folder: RunFolder) -> None:
    with NodeRecorder(config(), folder, 1, RankInfo()) as recorder:
        until(lambda: len(list(folder.lines(1, FILE))) >= 2)
        taken = recorder.take()
    assert {"cpu_percent", "memory_mb"} <= taken.keys()
    assert not [thread for thread in threading.enumerate() if thread.name == "node figures"]
    records = list(folder.lines(1, FILE))
    assert all(record["node"] == 0 and record["host"] for record in records)
    assert [r["time"] for r in records] == sorted(r["time"] for r in records)


@pytest.mark.parametrize(
    ("place", "every_s"),
    [(RankInfo(rank=1, world=2, local_rank=1), 0.1), (RankInfo(), None)],
    ids=["other rank", "off"],
)
def test_the_other_ranks_of_a_node_record_nothing(folder: RunFolder, place: RankInfo, every_s: float | None) -> None:
    with NodeRecorder(config(every_s), folder, 1, place) as recorder:
        assert not [thread for thread in threading.enumerate() if thread.name == "node figures"]
        assert recorder.take() == {}
    assert folder.storage.names(folder.attempt(1)) == []


def test_a_run_folder_that_hangs_delays_nothing(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(node_recorder, "CLOSE_S", 0.3)
    hangs, released = threading.Event(), threading.Event()

    def stuck(self: JsonLines, record: object) -> None:
        hangs.set()
        released.wait(30)

    monkeypatch.setattr(JsonLines, "log", stuck)
    with NodeRecorder(config(), folder, 1, RankInfo()) as recorder:
        assert hangs.wait(20)
        start = time.monotonic()
        recorder.take()
        assert recorder.take() == {}
    assert time.monotonic() - start < 5
    released.set()


def test_a_disk_that_is_full_is_one_warning_and_no_error(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("everstep.trainer.reporting.sinks.CLOSE_S", 0.0)
    tried = []

    def full(file: int, data: bytes) -> int:
        tried.append(file)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with NodeRecorder(config(), folder, 1, RankInfo()):
            until(lambda: len(tried) > 2)
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_a_meter_that_breaks_is_one_warning(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: HostMeter) -> Figures:
        raise ZeroDivisionError

    monkeypatch.setattr(HostMeter, "sample", broken)
    with caplog.at_level(logging.WARNING, "everstep"), NodeRecorder(config(), folder, 1, RankInfo()):
        until(lambda: bool(caplog.messages))
    assert caplog.messages == ["the figures of this node end here, training goes on"]


# ------------------------------------------------------------------ energy of a run


def test_the_energy_of_a_run_is_that_of_all_attempts_and_nodes(tmp_path: Path) -> None:
    run = Records(str(tmp_path / "run"))
    for number in (1, 2, 3):
        run.attempt(number, 10.0 * number)
    run.write("attempts/0001/nodes/0000.jsonl", {"energy_j": 1.0}, {"energy_j": 1.8e6}, {"cpu_percent": 3.0})
    run.write("attempts/0001/nodes/0001.jsonl", {"energy_j": 0.9e6})
    run.write("attempts/0002/nodes/0000-00000.jsonl", {"energy_j": 5e6})
    run.write("attempts/0002/nodes/0000-00001.jsonl", {"energy_j": 0.9e6})
    cut = run.folder.storage.path("attempts/0001/nodes/0001.jsonl")
    assert cut is not None
    cut.write_bytes(cut.read_bytes() + b'\n{"energy_j": 12')
    assert energy_kwh(run.folder, read(run.folder)) == pytest.approx(1.0)


def test_a_run_without_gpus_has_no_energy(tmp_path: Path) -> None:
    run = Records(str(tmp_path / "run"))
    run.attempt(1, 0.0)
    assert energy_kwh(run.folder, read(run.folder)) is None
    run.write("attempts/0001/nodes/0000.jsonl", {"cpu_percent": 3.0})
    assert energy_kwh(run.folder, read(run.folder)) is None
