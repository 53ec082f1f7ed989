"""First on the path of a job, makes `python -m everstep.trainer --frozen URL` the fake trainer."""

import os
import sys

words = sys.orig_argv
if "-m" in words and words[words.index("-m") + 1] == "everstep.trainer" and "--frozen" in words:
    from support.fake_trainer import main

    code = main(words[words.index("--frozen") + 1])
    sys.stdout.flush()
    os._exit(code)  # Python takes SystemExit at this place for a failure to start
