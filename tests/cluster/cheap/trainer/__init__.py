"""First on the path of a job, this makes `python -m everstep.trainer` a trial that costs no torch; all else is the real one."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
