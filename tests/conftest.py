"""Settings and servers of all tests: the random numbers of every run are the same."""

import os
import signal
import tempfile
from pathlib import Path

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
# The key of the tests' user, not of the developer's own account.
os.environ["XDG_STATE_HOME"] = str(Path(tempfile.gettempdir()) / f"everstep-tests-{os.getuid()}")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes would compile the same modules
# A shell starts background jobs with SIGINT ignored, and children would inherit that; these tests send it to them.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time, and no deadline: how long one takes says more of the machine than of the code.
settings.register_profile("everstep", deadline=None, derandomize=True)
# `make fuzz`: other examples every time.
settings.register_profile("fuzz", deadline=None, database=None)
settings.load_profile("fuzz" if "EVERSTEP_FUZZ" in os.environ else "everstep")

from support.metadata_server import trap  # noqa: E402, F401  (fixtures)
from support.ordering import (  # noqa: E402, F401  (hooks)
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_xdist_make_scheduler,
)
from support.other_user import open_folder  # noqa: E402, F401
from support.store_servers import azure, azure_server, gcs, gcs_server, s3, s3_server  # noqa: E402, F401
from support.warm import warm  # noqa: E402, F401
