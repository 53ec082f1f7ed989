"""Makes the helpers beside the tests importable, and the numbers of every run the same."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

from servers import s3, s3_server  # noqa: F401  (fixtures)


def pytest_collection_modifyitems(items: list) -> None:  # type: ignore[type-arg]
    """Forked ranks first: a fork is safe only while no test has left threads behind in this process."""
    items.sort(key=lambda item: item.get_closest_marker("dist") is None)
