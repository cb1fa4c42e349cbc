"""What all persistent modules share beside their weights: how a dense layer becomes one, and one a dense layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from triton_sparse_rnn.nn.advice import warn_if_slow
from triton_sparse_rnn.nn.conversion_options import ConversionOptions, complete
from triton_sparse_rnn.nn.independent_copy import copy_with_replacements
from triton_sparse_rnn.nn.instance_state import check_nothing_is_lost
from triton_sparse_rnn.nn.persistent_tools import PersistentTools
from triton_sparse_rnn.ops.dispatch import check_backend
from triton_sparse_rnn.ops.validation import check_activation_dtype, check_num_threads
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix, check_storage_dtype
from triton_sparse_rnn.sparse.linear_config import Config, config_of
from triton_sparse_rnn.sparse.patterns import Pattern, as_pattern

if TYPE_CHECKING:
    from typing_extensions import Self

# What layers of a class, and of those derived from it, are converted to: one entry for each class with a `dense_class`.
PERSISTENT_CLASSES: dict[type[nn.Module], type[PersistentModule]] = {}


def persistent_class(layer: nn.Module) -> type[PersistentModule]:
    """Return the entry of the layer's own class, or of the nearest one that this derives from."""
    return next(PERSISTENT_CLASSES[cls] for cls in type(layer).__mro__ if cls in PERSISTENT_CLASSES)


def shown_name(dense_class: type[nn.Module]) -> str:
    """Return what messages call a class.

    >>> shown_name(nn.GRU), shown_name(type("Stateful", (nn.LSTM,), {}))
    ('nn.GRU', 'Stateful')
    """
    name = dense_class.__name__
    return f"nn.{name}" if getattr(nn, name, None) is dense_class else name


class PersistentModule(PersistentTools):
    """A module for inference from stored weights. Layers of `dense_class` are converted to it.

    A layer of a subclass of nn.LSTM, whose own methods a PersistentLSTM lacks, is converted once a subclass of
    PersistentLSTM has them too and names it:

        class PersistentStateful(PersistentLSTM):
            dense_class = Stateful  # a subclass of nn.LSTM

            def initial_state(self): ...

    The last class that names a `dense_class` takes it over, for all models of the process. `to_dense()` builds that
    class with the arguments of nn.LSTM.
    """

    dense_class: ClassVar[type[Any]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "dense_class" in vars(cls):
            PERSISTENT_CLASSES[cls.dense_class] = cls

    def __init__(
        self,
        config: Config,
        weights: Mapping[str, BlockMatrix | Tensor],
        *,
        dtype: torch.dtype,
        backend: str | None = None,
        activation_dtype: torch.dtype | None = None,
        num_threads: int = 1,
    ) -> None:
        """Hold weights that are stored already; `from_dense` makes one from a dense layer.

        Args:
            config: of the dense layer.
            weights: one for each name of `config.weight_names()`: a BlockMatrix for each matrix, that or a tensor of
                `dtype` for weight_ih, a tensor for biases.
            dtype: of inputs and outputs.
            backend, activation_dtype, num_threads: as for `from_dense`.
        Raises:
            TypeError, ValueError: an argument is wrong.
            BackendUnavailableError: `backend` is named and cannot run this layer.
        """
        super().__init__(config, weights, dtype)
        self.backend = check_backend(backend)
        self.activation_dtype = activation_dtype
        self.num_threads = check_num_threads(num_threads)
        for weight in self.stored_weights().values():
            if isinstance(weight, BlockMatrix):
                check_activation_dtype(activation_dtype, weight.values.dtype)
        if backend is not None:
            self.chosen_backends()

    @classmethod
    def _converted(cls, dense: nn.Module, options: ConversionOptions) -> Self:
        """Convert a layer with what was added to it: what `from_dense` of each class does with the options it got."""
        persistent = cls._from_weights(dense, complete(f"{cls.__name__}.from_dense", options))
        copy_with_replacements(dense, {"": persistent})
        return persistent

    @classmethod
    def _from_weights(cls, dense: nn.Module, options: Mapping[str, Any]) -> Self:
        """Convert a layer without what was added to it, with all options; see `from_dense`."""
        if not isinstance(dense, cls.dense_class):
            wanted = shown_name(cls.dense_class)
            raise TypeError(f"{cls.__name__}.from_dense takes a layer of class {wanted}, got {type(dense).__name__}")
        check_nothing_is_lost(dense, cls)
        config = config_of(dense)
        run = {name: options[name] for name in ("backend", "activation_dtype", "num_threads")}
        backend, activation_dtype = check_backend(run["backend"]), run["activation_dtype"]
        check_num_threads(run["num_threads"])
        pattern = None if options["storage"] is None else as_pattern(options["storage"], "storage")
        dtype: torch.dtype = getattr(dense, config.weight_names()[0]).dtype
        weight_dtype = dtype if options["weight_dtype"] is None else options["weight_dtype"]
        check_activation_dtype(activation_dtype, check_storage_dtype(weight_dtype, "weight_dtype"))
        weights = cls._store(dense, weight_dtype, pattern, backend=backend, activation_dtype=activation_dtype)
        persistent = cls(config, weights, dtype=dtype, **run)
        persistent.training = dense.training  # train() would say that it changes nothing
        if backend is None and "reference" in persistent.chosen_backends():
            wanted = "triton" if persistent.device.type == "cuda" else "cpu"
            warn_if_slow(wanted, persistent._reason_against(wanted))
        return persistent

    @classmethod
    def _store(
        cls,
        dense: Any,
        dtype: torch.dtype,
        pattern: Pattern | None,
        *,
        backend: str | None,
        activation_dtype: torch.dtype | None,
    ) -> dict[str, BlockMatrix | Tensor]:
        """Return copies of all weights of a dense layer by name, stored; arguments as of `storage.store_weights`."""
        raise NotImplementedError

    def chosen_backends(self) -> list[str]:
        """The backend that runs each layer where it is now: the named one, or the fastest that fits."""
        raise NotImplementedError

    def _reason_against(self, backend: str) -> str | None:
        """Why a backend cannot run the first of its layers that it cannot run; None if it can run all."""
        raise NotImplementedError

    def warm_up(self) -> None:
        """Do now what the first call would do besides: check and prepare the weights, and compile kernels."""
        raise NotImplementedError

    def to_dense(self) -> Any:
        """Return a layer of the dense class with these weights: bit for bit the original ones for an unchanged dtype.

        The one exception is -0.0 that is not stored: it comes back as 0.0. What was added to this layer is
        taken over as `from_dense` does.

        Raises:
            TypeError, ValueError: what was added cannot be copied or taken over, or indices of weights are wrong.
        """
        dense = self._to_weights()
        copy_with_replacements(self, {"": dense})
        return dense

    def _to_weights(self) -> nn.Module:
        """Return the dense layer without what was added to this one; see `to_dense`."""
        check_nothing_is_lost(self, self.dense_class)
        dense = self._config.build(self.dense_class, device="meta", dtype=self.dtype).to_empty(device=self.device)
        with torch.no_grad():
            for name, weight in self.stored_weights().items():
                if isinstance(weight, BlockMatrix):
                    weight.check()  # somebody may have written into its indices
                    weight = weight.to_dense()
                held = getattr(dense, name)
                held.copy_(weight.view(held.shape))  # an nn.Conv1d has a third axis
        return dense.train(self.training)
