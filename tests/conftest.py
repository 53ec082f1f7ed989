"""Makes the helpers beside the tests importable, and the numbers of every run the same."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

from servers import s3, s3_server  # noqa: F401  (fixtures)
