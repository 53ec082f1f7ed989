"""Output of a run in a notebook cell: one line that changes for progress, and the other lines below."""

from __future__ import annotations

import html
import re
import sys
from typing import Any

STEP = re.compile(r"step (\d+)/(\d+)(?:  (.*))?$")


def in_notebook() -> bool:
    """True under an IPython kernel, whose cells show HTML and can change what they have shown."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"


class NotebookProgress:
    """A bar with the newest figures, in place of a line for each record."""

    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, line: str) -> None:
        """Show a line of the launcher: a step in the bar, any other as text."""
        if (found := STEP.match(line)) is None:
            print(line, flush=True)
            return
        from IPython.display import HTML, display

        step, steps, figures = int(found[1]), int(found[2]), found[3] or ""
        bar = HTML(  # type: ignore[no-untyped-call]
            f'<progress value="{step}" max="{steps}" style="width:20em" aria-label="steps"></progress> '
            f"{step}/{steps} <code>{html.escape(figures)}</code>"
        )
        if self._bar is None:
            self._bar = display(bar, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._bar.update(bar)
