"""Modules that need an optional package are read for doctests only where it is installed."""

from importlib.util import find_spec

NEEDS = {
    "triton_sparse_rnn/integrations/huggingface.py": ("transformers",),
    "triton_sparse_rnn/integrations/lightning.py": ("lightning", "pytorch_lightning"),
    "tests/integrations/lightning_training.py": ("lightning",),
}
collect_ignore = [path for path, packages in NEEDS.items() if not any(map(find_spec, packages))]
