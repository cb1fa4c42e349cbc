"""What pruning costs and saves on real tasks; see `studies.runs.command_line`."""

import sys

from studies.accuracy.study import ACCURACY
from studies.runs.command_line import main

if __name__ == "__main__":
    sys.exit(main(ACCURACY))
