"""A clock that is off: on the second node of a job, Python and torchrun's rendezvous see SKEW_S more seconds."""

import datetime
import importlib.abc
import importlib.util
import os
import sys
import time

SKEW_S = float(os.environ.get("SKEW_S", "0"))
RENDEZVOUS = "torch.distributed.elastic.rendezvous.dynamic_rendezvous"


class Shifted:
    @staticmethod
    def now(zone=None):
        return datetime.datetime.now(zone) + datetime.timedelta(seconds=SKEW_S)

    @staticmethod
    def utcnow():
        return datetime.datetime.utcnow() + datetime.timedelta(seconds=SKEW_S)


class Finder(importlib.abc.MetaPathFinder):
    """Gives the rendezvous a `datetime` of its own, whose class cannot be patched."""

    def find_spec(self, name, path=None, target=None):
        if name != RENDEZVOUS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def shifting(module):
            load(module)
            module.datetime = Shifted

        spec.loader.exec_module = shifting
        return spec


if SKEW_S and os.environ.get("SLURM_NODEID") == "1":
    true = time.time
    time.time = lambda: true() + SKEW_S
    sys.meta_path.insert(0, Finder())
