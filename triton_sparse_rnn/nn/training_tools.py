"""What torch's tools ask of a training module that they know only as nn.RNN, nn.GRU or nn.LSTM."""

from __future__ import annotations

from typing import Any

from torch.nn import RNNBase

from triton_sparse_rnn.nn.fx_tracing import record_call, tracer_of
from triton_sparse_rnn.nn.replace import added_members
from triton_sparse_rnn.notices import warn


class TrainingTools(RNNBase):
    """The part of SparseRNN, SparseGRU and SparseLSTM that torch.fx and torch.jit.script meet."""

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """Be a leaf to torch.fx, as torch.nn's layers are: before hooks, which then run when the graph does."""
        tracer = tracer_of(args, kwargs)
        return super()._call_impl(*args, **kwargs) if tracer is None else record_call(tracer, self, args, kwargs)

    def __prepare_scriptable__(self) -> RNNBase:
        """Give torch.jit.script, which cannot compile this class, torch.nn's own on the very same parameters."""
        from triton_sparse_rnn.nn.training import classes_of  # which imports this file

        dense_class, training_class = classes_of(self)
        ours, theirs = type(self).__name__, f"nn.{dense_class.__name__}"
        if lost := added_members(self, training_class):
            raise RuntimeError(
                f"torch.jit.script can take an {theirs} instead of this {ours}, but that would lose {', '.join(lost)}: "
                "undo a parametrization first, or script a model with an instance of the class without them"
            )
        if getattr(self, "gate_gradient", None) is not None:
            raise RuntimeError(
                f"torch.jit.script can take an {theirs} instead of this {ours}, but would put it into the model that "
                "it is given, too, which would lose its gate_gradient: script to_dense(model), a copy, or set "
                "layer.gate_gradient = None first"
            )
        warn(
            f"torch.jit.script takes an {theirs} on the same parameters instead of a {ours}, and puts it into the "
            "model that it is given, too: sparsify(model) changes that back, and to_dense(model) is a copy to script"
        )
        dense = dense_class.__new__(dense_class)
        vars(dense).update(vars(self))
        return dense
