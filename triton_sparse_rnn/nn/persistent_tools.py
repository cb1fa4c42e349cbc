"""What torch's tools, and code written for torch.nn, ask of a persistent module, which has no parameters of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from triton_sparse_rnn.nn.fx_tracing import record_call, record_method, tracer_of
from triton_sparse_rnn.nn.persistent_weights import PersistentWeights
from triton_sparse_rnn.notices import warn

if TYPE_CHECKING:
    from typing_extensions import Self


class PersistentTools(PersistentWeights):
    """The part of a persistent module that is there for others: idioms, torch.fx, torch.jit.script, a state's dtype."""

    _said_train_changes_nothing: ClassVar[bool] = False
    _marker: Tensor

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield what was added to this module; if there is nothing, one empty parameter of its dtype and device.

        So `next(rnn.parameters()).new_zeros(...)`, by which many models make their first state, goes on working. The
        weights are buffers: `named_parameters()` and the parameters of the whole model have none of them.
        """
        nothing = True
        for parameter in super().parameters(recurse):
            nothing = False
            yield parameter
        if nothing:
            # torch.compile makes no Parameter, and what is to be asked of this one the marker tells as well.
            yield self._marker if is_compiling() else nn.Parameter(self._marker.new_empty(0), requires_grad=False)  # type: ignore[misc]

    def train(self, mode: bool = True) -> Self:
        """Set the flag that nn.Module.train sets; it changes nothing here, and a warning says so, once."""
        if mode and not PersistentTools._said_train_changes_nothing:
            PersistentTools._said_train_changes_nothing = True
            warn(
                f"{type(self).__name__} is for inference: train() changes nothing, dropout stays off and there is no "
                "backward"
            )
        return super().train(mode)

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse torch.jit.script, which would say something obscure."""
        raise RuntimeError(
            f"torch.jit.script cannot compile a {type(self).__name__}, which was converted by to_sparse(): script "
            "to_dense(model), with nn.GRU and the zeros but without the speed, or use torch.export.export"
        )

    def _refuse_graphs_of_others(self) -> None:
        """Raise where a call is recorded in a form that has no place for the operator of this layer."""
        torch_nn_only = "use to_dense(model), with torch.nn's layer and the zeros but without the speed"
        if torch.jit.is_tracing():  # type: ignore[reportPrivateImportUsage] - it is documented
            raise RuntimeError(
                "torch.jit.trace, which torch.onnx.export(dynamo=False) uses too, cannot record a "
                f"{type(self).__name__}, which was converted by to_sparse(): {torch_nn_only}, or torch.export.export"
            )
        # torch.onnx.is_in_onnx_export() is False to torch.compile, by which a strict export traces this.
        exporter = sys.modules.get("torch.onnx._internal.exporter._flags")
        if exporter is not None and getattr(exporter, "_is_onnx_exporting", False):
            raise RuntimeError(
                f"ONNX has no operator for a {type(self).__name__}, which was converted by to_sparse(): {torch_nn_only}"
            )

    def _recorded(self, method: str, *args: Any) -> Any:
        """Return a node of the graph that torch.fx is making of this call; None for a call that is to run.

        Hooks that torch.fx has traced on the way here are in the graph already; then it must not call them again.

        Raises:
            RuntimeError: torch.jit.trace or torch.onnx.export records it.
        """
        self._refuse_graphs_of_others()
        tracer = tracer_of(args, {})
        if tracer is None:
            return None
        args = args[:1] if len(args) > 1 and args[1] is None else args
        if method == "forward" and not (self._forward_pre_hooks or self._forward_hooks):
            return record_call(tracer, self, args, {})
        return record_method(tracer, self, method, args, {})
