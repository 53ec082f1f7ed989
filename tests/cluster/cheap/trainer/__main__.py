"""What a node of the test cluster starts for a trial: the one of tests/cheap_trial.py."""

import sys

from cheap_trial import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[sys.argv.index("--frozen") + 1]))
