"""What the repr of a persistent module shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from triton_sparse_rnn.nn.weight_storage import describe_storage

if TYPE_CHECKING:
    from triton_sparse_rnn.nn.persistent import PersistentLayer


def shown_options(module: PersistentLayer) -> str:
    """Return sizes and options as nn.RNNBase shows them, how the weights are stored, and what runs them."""
    options = {
        "proj_size": (module.proj_size, 0),
        "num_layers": (module.num_layers, 1),
        "bias": (module.bias, True),
        "batch_first": (module.batch_first, False),
        "dropout": (module.dropout, 0),
        "bidirectional": (module.bidirectional, False),
        "activation_dtype": (module.activation_dtype, None),
        "num_threads": (module.num_threads, 1),
    }
    changed = [f"{name}={value}" for name, (value, default) in options.items() if value != default]
    stored = describe_storage(module.stored_weights())
    backend = module.backend or "/".join(sorted(set(module.chosen_backends())))
    runs = [f"backend={backend!r}"]
    if (plan := module._plan) is not None and plan.holds(module):
        runs += [f"kernels={text!r}" for text in plan.descriptions()]
    return ", ".join([str(module.input_size), str(module.hidden_size), *changed, *stored, *runs])
