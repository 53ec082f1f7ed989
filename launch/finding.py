"""Result of one check by `everstep doctor`."""

from __future__ import annotations

from dataclasses import dataclass

WORDS = {True: "ok", None: "warn", False: "fail"}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: what was looked at, what was found, and what to do if it is not fine."""

    about: str
    text: str
    fine: bool | None = True
    """False for a problem; None for a doubt, or if it could not be determined."""

    def __str__(self) -> str:
        return f"{WORDS[self.fine]:<5} {self.about:<12} {self.text}"

    def plain(self) -> dict[str, str]:
        """Return the finding for `--json`."""
        return {"state": WORDS[self.fine], "about": self.about, "text": self.text}
