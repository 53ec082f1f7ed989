"""A hook that draws from the global generators when it is made, as a user's module may."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

from everstep import StepInfo


class Draws:
    def __init__(self, file: str) -> None:
        with Path(file).open("a") as lines:
            lines.write(json.dumps({"random": random.random(), "numpy": float(np.random.random())}) + "\n")

    def __call__(self, info: StepInfo) -> None:
        pass
