"""What zeroed gate gradients cost and save; see `studies.runs.command_line`."""

import sys

from studies.gate_gradients.study import GATE_GRADIENTS
from studies.runs.command_line import main

if __name__ == "__main__":
    sys.exit(main(GATE_GRADIENTS))
