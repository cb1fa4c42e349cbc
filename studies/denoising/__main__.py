"""A trained denoiser pruned, fine-tuned and streamed; see `studies.runs.command_line`."""

import sys

from studies.denoising.study import DENOISING
from studies.runs.command_line import main

if __name__ == "__main__":
    sys.exit(main(DENOISING))
