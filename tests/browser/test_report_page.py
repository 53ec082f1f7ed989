"""The page of `everstep report` in a real browser: it draws, asks for nothing, and runs nothing of the run's."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from everstep.launch.__main__ import main
from everstep.run_folder import MEDIA, METRICS, NODES
from support.browser import CHROMIUM, Browser, browser
from support.run_records import Records

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: the page is not opened in a browser")
RECORDED = Path(__file__).parents[1] / "recorded" / "run-killed-twice"
EVIL = "</script><script>window.pwned=1</script><img src=http://127.0.0.1:9/a onerror=window.pwned=1>\"'{{7*7}}"
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
TOKEN = "ghp_" + "a1B2" * 9


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def made(run: Path, out: Path) -> Path:
    assert main(["report", str(run), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    return made(Path(shutil.copytree(RECORDED, folder / "killed_twice")), folder / "report.html")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_draws_all_charts_without_an_error_or_a_request(
    opened: Browser, recorded: Path, width: int, dark: bool
) -> None:
    opened.open(recorded, width, dark)
    assert (opened.problems(), opened.requests()) == ([], [])
    assert int(opened.evaluate("document.documentElement.dataset.drawn")) >= 10
    assert opened.evaluate("document.querySelectorAll('.plot').length") == opened.evaluate(
        "[...document.querySelectorAll('.plot')].filter(each => each.querySelector('canvas')?.height > 50).length"
    )
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    ground = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(20, 24, 27)") is dark


def test_a_reader_without_a_mouse_or_without_charts_gets_all(opened: Browser, recorded: Path) -> None:
    opened.open(recorded)
    opened.key("Tab")
    assert opened.evaluate("document.activeElement.hash") == "#main"
    levels = opened.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(each => +each.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert opened.evaluate("document.querySelectorAll('main').length") == 1
    unnamed = "[...document.querySelectorAll('.plot')].filter(each => !each.getAttribute('aria-label')).length"
    assert opened.evaluate(unnamed) == 0
    without = (
        "[...document.querySelectorAll('.plot')].filter(e => !e.closest('figure, section').querySelector('table'))"
    )
    assert opened.evaluate(f"{without}.length") == 0


def test_the_smoothing_redraws_and_the_page_prints(opened: Browser, recorded: Path) -> None:
    opened.open(recorded)
    shown = "echarts.getInstanceByDom(document.querySelector('[data-kind=curve]')).getOption().series.map(e => e.name)"
    assert "train, raw" in opened.evaluate(shown)
    set_to_zero = "const s = document.getElementById('smoothing'); s.value = 0; s.dispatchEvent(new Event('input'))"
    opened.evaluate(f"{{{set_to_zero}}}")
    assert "train, raw" not in opened.evaluate(shown)
    assert "train, replayed" in opened.evaluate(shown)
    assert opened.pdf().startswith(b"%PDF")


def test_dragging_over_one_curve_zooms_all_and_a_double_click_ends_it(opened: Browser, recorded: Path) -> None:
    opened.open(recorded)
    zooms = (
        "[...document.querySelectorAll('[data-kind=curve]')].slice(0, 4).map(e => "
        "{const z = echarts.getInstanceByDom(e).getOption().dataZoom[0]; return Math.round(z.end - z.start)})"
    )
    assert opened.evaluate(zooms) == [100] * 4
    opened.evaluate("document.querySelector('[data-kind=curve]').scrollIntoView({block: 'center'})")
    box = opened.evaluate(
        "(b => [b.x, b.y, b.width, b.height])(document.querySelector('[data-kind=curve]').getBoundingClientRect())"
    )
    middle, left, right = box[1] + box[3] / 2, box[0] + box[2] * 0.4, box[0] + box[2] * 0.7
    opened.mouse(("mouseMoved", left, middle), ("mousePressed", left, middle), ("mouseMoved", left + 20, middle))
    opened.mouse(("mouseMoved", right, middle + 5), ("mouseReleased", right, middle + 5))
    found = opened.evaluate(zooms)
    assert len(set(found)) == 1
    assert 10 < found[0] < 60
    for clicks in (1, 2):
        opened.mouse(("mousePressed", right, middle), ("mouseReleased", right, middle), clicks=clicks)
    assert opened.evaluate(zooms) == [100] * 4


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of a run in which every text that a run folder has is hostile."""
    root = tmp_path_factory.mktemp("hostile")
    name = EVIL.replace("/", "|")
    task = {"_target_": EVIL, EVIL: EVIL, "nested": [EVIL, TOKEN]}
    records = Records(str(root / "evil"), task=task)
    records.attempt(1, 0, host=EVIL[:200])
    records.write(records.folder.attempt(1, METRICS), *(
        {"kind": kind, "step": step, "time": records.began + step, "loss": 1.0, EVIL: step, f"{EVIL}é\u2028": 2.0}
        for step in range(1, 30) for kind in ("train", "evaluate")))  # fmt: skip
    common = {"kind": "media", "name": EVIL, "step": 3, "time": 1.0}
    records.write(records.folder.attempt(1, MEDIA),
        {**common, "type": "text", "text": f"{EVIL} {TOKEN}"},
        {**common, "type": "image", "caption": EVIL, "file": "media/00000003-x-000001.png"},
        {**common, "type": "image", "name": "up", "caption": EVIL, "file": "../../../config.yaml"},
        {**common, "type": "table", "columns": [EVIL, "b"], "rows": [[EVIL, 1], [None, True]]},
        {**common, "type": "histogram", "edges": [0.0, 1.0, 2.0], "counts": [3, 4]},
        {**common, "type": EVIL})  # fmt: skip
    records.folder.storage.write(records.folder.attempt(1, "media/00000003-x-000001.png"), PIXEL)
    records.write(records.folder.attempt(1, f"{NODES}/0000.jsonl"), {"time": 1.5, "host": EVIL, "cpu_percent": 5.0})
    records.events(1, (3, "straggler", {"line": EVIL, "step": 3}), (4, "saved", {"step": 4, "seconds": 1.0}))
    records.log(1, f"{EVIL}\x1b]0;title\x07 {TOKEN}\n")
    records.end(1, 90, "crashed", 30, EVIL)
    records.decide(1, 95, False, EVIL)
    records.progress(90, 30, 100, metric=EVIL, metrics={EVIL: 1.0})
    code = {"commit": EVIL, "changed": True, "diff": EVIL}
    records.write("provenance.json", {"command": [EVIL, TOKEN], "code": code, "packages": {EVIL: EVIL}, "user": EVIL})
    records.write("data.json", {"sources": [{"place": EVIL, "digest": EVIL}, EVIL]})
    manifest = {"step": 4, "attempt": 1, "files": {EVIL: {"bytes": 5}}, "metric": 1.0, "time": 5.0, "world": EVIL}
    records.write("checkpoints/step-00000004-attempt-0001/manifest.json", manifest)
    return made((root / "evil").rename(root / name), root / "report.html")


def test_nothing_of_a_hostile_run_runs_or_is_fetched(opened: Browser, hostile: Path) -> None:
    opened.open(hostile)
    assert (opened.problems(), opened.requests()) == ([], [])
    assert opened.evaluate("typeof window.pwned") == "undefined"
    assert opened.evaluate("document.scripts.length") == 5
    assert opened.evaluate("[...document.images].map(each => each.src.slice(0, 15))") == ["data:image/png;"]
    assert opened.evaluate("document.querySelector('h1').textContent") == EVIL.replace("/", "|")
    assert opened.evaluate("JSON.parse(document.getElementById('everstep-report').textContent).status.why") == EVIL
    assert "{{7*7}}" in opened.evaluate("document.title")
    opened.open(hostile, 390)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390


def test_no_secret_and_no_control_character_of_a_run_is_in_its_page(hostile: Path) -> None:
    text = hostile.read_text()
    assert TOKEN not in text
    assert "(a secret was here)" in text
    assert "\x1b" not in text
    facts = text.partition('id="everstep-report">')[2].partition("</script>")[0]
    assert TOKEN not in json.dumps(json.loads(facts))


def test_even_a_script_that_got_into_the_page_would_not_run(opened: Browser, recorded: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.html"
    injected = "<script>window.pwned=1</script><img src='http://127.0.0.1:9/x' onerror='window.pwned=1'>"
    torn.write_text(recorded.read_text().replace("<header>", f"<header>{injected}"))
    opened.open(torn)
    assert opened.evaluate("typeof window.pwned") == "undefined"
    assert len([each for each in opened.problems() if "Content Security Policy" in each]) >= 2
