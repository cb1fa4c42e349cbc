"""What torch.utils.flop_counter counts for the operators of recurrent and linear layers.

That module loads Triton, so it is not imported here; by the time it counts, somebody has.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from triton_sparse_rnn.ops.layer_weights import NAMES


def count_operations(x_shape: Sequence[int], states: Any, weights: Sequence[Any], *args: Any, **kwargs: Any) -> int:
    """Return the operations of one call, two for each stored weight and row of x: of products, as torch.mm's are.

    Args:
        x_shape: [N, I].
        weights: shapes of what `recurrent_layer` takes.
        states, args, kwargs: what else it takes; they make no difference.

    >>> count_operations((5, 4), [(1, 1, 3)], [(12, 4), *[None] * 5, (2, 1, 16), *[None] * 13])
    800
    """
    names = itertools.cycle(NAMES)
    values = (shape for name, shape in zip(names, weights) if name.endswith("_values") and shape is not None)  # noqa: B905
    return 2 * x_shape[0] * sum(map(math.prod, values))


def count_linear(x_shape: Sequence[int], weight: Sequence[Any], *args: Any, **kwargs: Any) -> int:
    """Return the operations of one call of `linear`, as `count_operations` does.

    >>> count_linear((5, 4), [(2, 1, 16), *[None] * 5], None, 12)
    320
    """
    return 2 * x_shape[0] * math.prod(weight[0])


def count_in_active_modes() -> None:
    """Let every FlopCounterMode that is on now, and those made later, count the operators."""
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    operators = torch.ops.triton_sparse_rnn
    for operator, formula in ((operators.recurrent_layer, count_operations), (operators.linear, count_linear)):
        if operator not in counting.flop_registry:
            counting.register_flop_formula(operator)(formula)
        for mode in _get_current_dispatch_mode_stack():
            registry = getattr(getattr(mode, "counter", mode), "flop_registry", None)  # a mode copies it when made
            if isinstance(registry, dict):
                registry.setdefault(operator, counting.flop_registry[operator])
