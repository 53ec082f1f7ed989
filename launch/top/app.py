"""The live table of runs, and the page of one run: a terminal application of textual."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any, ClassVar

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widgets import DataTable, Footer, Header, Label, Sparkline, Static

from everstep.errors import EverstepError, printable
from everstep.launch.report.curves import reduced
from everstep.launch.runs.cancellation import cancel_run
from everstep.launch.runs.status_text import rows
from everstep.launch.top.page import RunPage, read_page
from everstep.launch.top.table import COLUMNS, RunTable
from everstep.run_folder import RunFolder

POINTS = 76
"""Values of a curve, one for each column of a terminal of 80."""
Command = list[str]


class TopApp(App[None]):
    """All runs below a folder, read anew every `every_s` seconds by a thread."""

    TITLE = "everstep top"
    CSS = """
    DataTable { height: 1fr; }
    Confirm { align: center middle; }
    #said { height: 1; color: $warning; }
    #curve { height: 5; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "open", priority=True),
        Binding("c", "cancel", "cancel"),
        Binding("r", "resume", "resume"),
        Binding("q", "quit", "quit"),
    ]

    def __init__(self, root: str, every_s: float) -> None:
        super().__init__()
        self.runs = RunTable(root)
        self.every_s = every_s
        self.facts: list[dict[str, Any]] = []

    def compose(self) -> ComposeResult:
        yield Header()
        table: DataTable[Text] = DataTable(cursor_type="row", zebra_stripes=True, cell_padding=0)
        table.add_columns(*(f"{name} " for name in COLUMNS))
        yield table
        yield Static("", id="said", markup=False)
        yield Footer()

    def on_mount(self) -> None:
        self.sub_title = self.runs.root
        self.look()
        self.set_interval(self.every_s, self.look)

    @work(thread=True, exclusive=True, exit_on_error=False)
    def look(self) -> None:
        """Read all runs in a thread; show them in the application's own."""
        try:
            found = self.runs.refresh()
        except (OSError, EverstepError) as error:
            self.call_from_thread(self.say, str(error))
            return
        self.call_from_thread(self.show, found)

    def show(self, found: list[dict[str, Any]]) -> None:
        """Show the runs; the cursor stays on its run."""
        table: DataTable[Text] = self.query_one(DataTable)
        at = self.chosen()
        self.facts = found
        table.clear()
        for facts in found:
            table.add_row(*(Text(f"{printable(cell)} ") for cell in self.runs.cells(facts)), key=facts["url"])
        urls = [facts["url"] for facts in found]
        if at is not None and at.url in urls:
            table.move_cursor(row=urls.index(at.url))
        if self.runs.left_out:
            self.say(f"{self.runs.left_out} folders hold no run that can be read; 'everstep ls' says why")

    def say(self, text: str) -> None:
        self.query_one("#said", Static).update(printable(text))

    def chosen(self) -> RunFolder | None:
        """Return the run under the cursor."""
        row = self.query_one(DataTable).cursor_row
        return RunFolder(self.facts[row]["url"]) if 0 <= row < len(self.facts) else None

    def action_open(self) -> None:
        if isinstance(self.screen, Confirm):
            self.screen.dismiss(True)
        elif (folder := self.chosen()) is not None and not isinstance(self.screen, RunScreen):
            self.push_screen(RunScreen(folder, self.every_s))

    def action_cancel(self) -> None:
        self._confirmed("cancel", lambda folder: cancel_run(folder))

    def action_resume(self) -> None:
        self._confirmed("resume", resume)

    def _confirmed(self, verb: str, act: Callable[[RunFolder], str]) -> None:
        folder = self.chosen()
        if folder is None:
            return

        def answered(yes: bool | None) -> None:
            if yes:
                self.act(folder, act)

        self.push_screen(Confirm(f"{verb} {_name(folder)}?"), answered)

    @work(thread=True, exit_on_error=False)
    def act(self, folder: RunFolder, act: Callable[[RunFolder], str]) -> None:
        try:
            said = f"{_name(folder)}: {act(folder)}"
        except (OSError, EverstepError) as error:
            said = str(error)
        self.call_from_thread(self.say, said)
        self.call_from_thread(self.look)


def _name(folder: RunFolder) -> str:
    return folder.url.rpartition("/")[2]


def resume(folder: RunFolder) -> str:
    """Start `everstep resume` in a session of its own, which goes on without this terminal."""
    command = [sys.executable, "-m", "everstep.launch", "resume", folder.url]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                     start_new_session=True)  # fmt: skip
    return "everstep resume was started; its attempt shows here, and in everstep logs"


class Confirm(ModalScreen[bool]):
    """A question, answered by y or n."""

    BINDINGS: ClassVar[list[BindingType]] = [("y", "dismiss(True)", "yes"), ("n,escape", "dismiss(False)", "no")]

    def __init__(self, question: str) -> None:
        super().__init__()
        self.question = question

    def compose(self) -> ComposeResult:
        yield Label(printable(f"{self.question}  y / n"), markup=False)
        yield Footer()


class RunScreen(Screen[None]):
    """One run: its status, the curve of the loss, and the end of its log."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape,b", "app.pop_screen", "back")]

    def __init__(self, folder: RunFolder, every_s: float) -> None:
        super().__init__()
        self.folder = folder
        self.every_s = every_s

    def compose(self) -> ComposeResult:
        yield Header()
        with VerticalScroll():
            yield Static("", id="status", markup=False)
            yield Label("", id="scale", markup=False)
            yield Sparkline([], id="curve")
            yield Static("", id="log", markup=False)
        yield Footer()

    def on_mount(self) -> None:
        self.look()
        self.set_interval(self.every_s, self.look)

    @work(thread=True, exclusive=True, exit_on_error=False)
    def look(self) -> None:
        try:
            found = read_page(self.folder)
        except (OSError, EverstepError) as error:
            self.app.call_from_thread(self.query_one("#status", Static).update, printable(str(error)))
            return
        self.app.call_from_thread(self.show, found)

    def show(self, page: RunPage) -> None:
        told = "\n".join(f"{name:<12} {value}" if name else value for name, value in rows(page.report))
        self.query_one("#status", Static).update(printable(told))
        values = [value for _, value in reduced(page.points, POINTS // 2)]
        scale = f"{page.metric}, {min(values):.4g} to {max(values):.4g}" if values else "no curve yet"
        self.query_one("#scale", Label).update(printable(scale))
        self.query_one("#curve", Sparkline).data = values
        self.query_one("#log", Static).update("\n" + printable("\n".join(page.log)))
