"""How much pods ask for, in the notation of Kubernetes."""

from __future__ import annotations

from support.kube.object_store import Plain

UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9}


def number(text: str) -> float:
    unit = next((unit for unit in UNITS if text.endswith(unit)), "")
    return float(text.removesuffix(unit)) * UNITS.get(unit, 1)


def words(value: float) -> str:
    """Whole numbers are said as such, memory in the largest unit that fits."""
    for unit in ("Ti", "Gi", "Mi", "Ki"):
        if value and value % UNITS[unit] == 0:
            return f"{int(value / UNITS[unit])}{unit}"
    return f"{int(value)}" if value == int(value) else f"{int(value * 1000)}m"


def requests(pod: Plain) -> dict[str, float]:
    """A limit counts as a request where there is none of its own."""
    resources = pod["spec"]["containers"][0].get("resources", {})
    wanted = {**resources.get("limits", {}), **resources.get("requests", {})}
    return {key: number(value) for key, value in wanted.items()}
