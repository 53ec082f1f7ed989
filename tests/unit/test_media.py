"""Texts, pictures, tables and histograms: what is accepted, where it goes, and what bounds it."""

from __future__ import annotations

import base64
import io
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from everstep import ConfigError, log_histogram, log_image, log_table, log_text
from everstep.run_folder import RunFolder
from everstep.trainer.reporting import media as module
from everstep.trainer.reporting.media import MediaLog, read_media
from everstep.trainer.reporting.media_record import pixels_of
from everstep.trainer.reporting.png import png
from everstep.trainer.reporting.trackers.sink_thread import SinkThread
from everstep.trainer.reporting.trackers.tensorboard_sink import TensorBoardSink


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run")


@pytest.fixture(autouse=True)
def nothing_open() -> Iterator[None]:
    yield
    module._open.clear()


class Shown:
    """A tracker that shows media."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def log(self, record: Any) -> None:
        self.records.append((record["kind"], record["step"]))

    def media(self, record: Any) -> None:
        self.records.append((record["type"], record["step"], record.get("png", b"")[:4]))

    def close(self) -> None:
        pass


class Numbers:
    """A tracker of numbers alone."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, record: Any) -> None:
        self.steps.append(record["step"])

    def close(self) -> None:
        pass


def opened(folder: RunFolder, attempt: int = 1, step: int = 1, trackers: Any = ()) -> MediaLog:
    log = MediaLog(folder, attempt, trackers, lambda: step)
    log.open()
    return log


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (1, 1), (300, 200, 3)])
def test_a_png_holds_the_pixels_that_it_was_made_of(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    assert (np.asarray(Image.open(io.BytesIO(png(pixels)))) == pixels).all()


def test_channels_may_come_first_as_torch_has_them() -> None:
    image = torch.randint(0, 256, (3, 4, 6), dtype=torch.uint8)
    assert (pixels_of("x", image) == image.permute(1, 2, 0).numpy()).all()
    assert pixels_of("x", image[:1]).shape == (4, 6)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (torch.zeros(3, 4, 4), r"it must be uint8; .*\(image \* 255\)"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"shape \[2, 3, 4, 4\]; give one of \(H, W\)"),
        (np.zeros((0, 4), np.uint8), "shape"),
        (np.zeros((4, 4, 4), np.uint8), "shape"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(folder: RunFolder, image: Any, said: str) -> None:
    opened(folder)
    with pytest.raises(ConfigError, match=said):
        log_image("x", image)


def test_a_row_of_other_length_than_the_columns_is_refused(folder: RunFolder) -> None:
    opened(folder)
    with pytest.raises(ConfigError, match="row 1 has 1 cells for 2 columns"):
        log_table("x", ["a", "b"], [[1, 2], [3]])


def test_outside_of_a_run_nothing_happens() -> None:
    log_text("x", "hello")
    log_image("x", "no picture at all")


def test_all_kinds_come_back_from_the_run_folder(folder: RunFolder) -> None:
    log = opened(folder, step=7)
    log_text("said", "hello")
    log_image("seen/one", np.full((4, 4, 3), 9, np.uint8), "a caption")
    log_table("rows", ["name", "value"], [["a", torch.tensor(1.5)], ["b", None]])
    log_histogram("weights", torch.tensor([0.0, 1.0, 1.0, float("nan")]), bins=2)
    log.close()
    text, image, table, histogram = read_media(folder)
    assert (text["text"], text["step"]) == ("hello", 7)
    picture = Image.open(io.BytesIO(folder.storage.read(image["path"])))
    assert (picture.size, picture.getpixel((0, 0)), image["caption"]) == ((4, 4), (9, 9, 9), "a caption")
    assert table["rows"] == [["a", 1.5], ["b", None]]
    assert (histogram["counts"], histogram["nonfinite"]) == ([1, 2], 1)


def test_a_replayed_step_supersedes_what_was_logged_before(folder: RunFolder) -> None:
    for attempt, text in ((1, "old"), (2, "new")):
        log = opened(folder, attempt, step=3)
        log_text("x", text)
        log.close()
    assert [(r["step"], r["text"]) for r in read_media(folder)] == [(3, "new")]


def test_a_name_is_recorded_once_a_step_and_the_rest_is_counted(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    log = opened(folder)
    for number in range(5):
        log_text("x", str(number))
    log.close()
    assert [r["text"] for r in read_media(folder)] == ["0"]
    assert "4 texts, pictures, tables or histograms were left out: 4 because a name is recorded once" in (
        capsys.readouterr().err
    )


def test_a_flood_is_bounded_by_rate_and_by_size(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PER_S", 0.0)
    monkeypatch.setattr(module, "LARGEST", 1000)
    log = opened(folder)
    log_text("large", "x" * 2000)
    for number in range(300):
        log_text(f"x{number}", "")
    log.close()
    assert len(read_media(folder)) == int(module.BURST)


def test_trackers_get_media_before_the_record_of_their_step_and_those_of_numbers_get_none(folder: RunFolder) -> None:
    shown, numbers = Shown(), Numbers()
    threads = [SinkThread("shown", lambda: shown), SinkThread("numbers", lambda: numbers)]
    step = 1
    log = MediaLog(folder, 1, threads, lambda: step)
    log.open()
    for step in (1, 2, 3):  # noqa: B007
        log_image("x", np.zeros((2, 2), np.uint8))
    for done in (1, 2, 3):  # as on a GPU, where results come some steps later
        log.release(done)
        for thread in threads:
            thread.log({"kind": "train", "step": done})
    log.close()
    for thread in threads:
        thread.close()
    assert shown.records == [pair for s in (1, 2, 3) for pair in (("image", s, b"\x89PNG"), ("train", s))]
    assert numbers.steps == [1, 2, 3]


def test_a_disk_that_fails_is_counted_and_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    log = opened(folder)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    log._writer._write = fail  # type: ignore[method-assign]
    log_text("x", "y")
    log.close()
    assert "1 because they could not be written" in capsys.readouterr().err


def test_tensorboard_shows_text_picture_table_and_histogram(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = RunFolder(str(tmp_path / "run"))
    thread = SinkThread("TensorBoard", lambda: TensorBoardSink(folder))
    log = opened(folder, step=4, trackers=[thread])
    log_text("said", "hello")
    log_image("seen", np.zeros((2, 3), np.uint8))
    log_table("rows", ["a|b"], [[1]])
    log_histogram("weights", np.arange(10.0))
    log.close()
    thread.close()
    events: Any = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    (image,) = events.Images("media/seen")
    assert (image.step, image.width, image.height) == (4, 3, 2)
    assert Image.open(io.BytesIO(image.encoded_image_string)).size == (3, 2)
    assert events.Histograms("media/weights")[0].histogram_value.num == 10
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert texts["media/said/text_summary"] == "hello"
    assert "a\\|b" in texts["media/rows/text_summary"]


def test_wandb_shows_text_picture_table_and_histogram() -> None:
    import wandb

    from everstep.trainer.reporting.media_views import media_value

    picture = {"type": "image", "png": png(np.zeros((2, 2), np.uint8)), "caption": "c"}
    assert isinstance(media_value(picture), wandb.Image)
    assert isinstance(media_value({"type": "text", "text": "<a>"}), wandb.Html)
    assert isinstance(media_value({"type": "table", "columns": ["a"], "rows": [[1], ["x"]]}), wandb.Table)
    assert isinstance(media_value({"type": "histogram", "edges": [0, 1, 2], "counts": [1, 2]}), wandb.Histogram)


def test_without_pillow_wandb_shows_a_picture_as_html(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    from everstep.trainer.reporting import media_views

    monkeypatch.setattr(media_views.importlib.util, "find_spec", lambda name: None)
    data = png(np.zeros((2, 2), np.uint8))
    value = media_views.media_value({"type": "image", "png": data, "caption": "c"})
    assert isinstance(value, wandb.Html)
    assert base64.b64encode(data).decode() in value.html


def test_wandb_gets_each_picture_once_with_its_step_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from everstep.config import WandbConfig
    from everstep.trainer.reporting.trackers.wandb_sink import WandbSink, rows

    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = RunFolder(str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    for steps in ((1, 2), (2, 3)):  # the second attempt replays step 2
        sink = WandbSink(WandbConfig(enabled=True, mode="offline"), "run", folder, {})
        for step in steps:
            record = {
                "kind": "media",
                "type": "image",
                "name": "x",
                "step": step,
                "caption": "",
                "height": 2,
                "width": 2,
            }
            sink.media({**record, "png": png(np.zeros((2, 2), np.uint8))})
            sink.log({"kind": "train", "step": step, "loss": 1.0})
        sink.close()
    files = sorted((tmp_path / "run").glob("wandb/offline-*/*.wandb"))
    found = [row for file in files for row in rows(file)]
    assert sorted(row["step"] for row in found if any(key.startswith("media/x") for key in row)) == [1, 2, 3], found
    assert sorted(row["step"] for row in found if "train/loss" in row) == [1, 2, 3], (files, found)
