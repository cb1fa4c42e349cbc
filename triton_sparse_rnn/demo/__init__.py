"""A character language model trained sparse and dense on real text: `triton-sparse-rnn demo`, or `run.run_demo`."""
