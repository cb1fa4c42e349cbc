"""Prune in a Hugging Face Trainer: `Trainer(..., callbacks=[PrunerCallback(final_sparsity=0.9)])`."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from triton_sparse_rnn.integrations.pruned_training import PrunedTraining

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(
        "triton_sparse_rnn.integrations.huggingface needs transformers and accelerate: "
        "pip install 'triton-sparse-rnn[huggingface]'"
    ) from error


class PrunerCallback(PrunedTraining, TrainerCallback, ExportableState):
    """Drive a `Pruner` in a Trainer of transformers.

    The pruner is made when training starts, follows the Trainer's optimizer, and is taken off when training ends;
    `callback.pruner` stays. `sparsity` is added to what is logged: to `state.log_history`, and for the callbacks that
    come after this one. The masks are kept in trainer_state.json of each checkpoint (a bit for each block), so that
    `train(resume_from_checkpoint=...)` goes on as if never stopped, to the bit, from wherever the checkpoint lies.

    A model is best, and training no longer improves, only among equals: as long as weights are being pruned,
    `state.best_metric` is forgotten at every step. So load_best_model_at_end takes the best of the wanted sparsity, and
    EarlyStoppingCallback waits.

    A Trainer takes one of them; weights with schedules of their own are `targets`. It masks no averages of weights, for
    the Trainer makes none: a callback that does calls `pruner.apply_masks(average)`.

    Arguments are those of `PrunedTraining`: a schedule, or final_sparsity, and the keywords of `Pruner`.

    >>> PrunerCallback(final_sparsity=0.9, pattern=(16, 1)).pruner is None  # until train()
    True
    """

    _best_is_pruned = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **others: Any,
    ) -> None:
        if getattr(args, "restore_callback_states_from_checkpoint", False):
            raise ValueError(
                "restore_callback_states_from_checkpoint=True would make this callback anew, without its settings: "
                "leave it False, the pruner's progress is restored without it"
            )
        name = type(self).__name__
        held: Any = state.stateful_callbacks
        saved = held.get(name) if state.global_step else None  # at step 0 it is this object's own state
        progress = None if saved is None else self._read(saved)
        self._start(state, model, [optimizer], state.max_steps - state.global_step, progress)
        held.setdefault(name, self.state())  # the checkpoint may have been saved without this callback
        self._best_is_pruned = self.pruner is not None and self.pruner.finished

    def _read(self, saved: Any) -> Any:
        """Return of a state that was saved the progress, None if there was none yet."""
        try:
            progress = _from_json(saved["progress"])
            if not isinstance(progress, Mapping):
                raise TypeError("progress is no mapping")
            return progress or None
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self._not_its_progress(saved)} ({type(error).__name__}: {error})") from None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if self.pruner is not None and not self._best_is_pruned:
            self._best_is_pruned = self.pruner.finished
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, float] | None = None,
        **others: Any,
    ) -> None:
        if self._attachment is not None and self.pruner is not None and logs is not None:
            logs["sparsity"] = state.log_history[-1]["sparsity"] = self.pruner.sparsity

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._stop()

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into trainer_state.json."""
        return {"args": {}, "attributes": {}, "progress": _to_json(self._progress())}


def _to_json(value: Any) -> Any:
    """Make plain values of `_progress`: of each mask, a vector of bytes, a string in base 64."""
    if isinstance(value, Tensor):
        return {"base64": base64.b64encode(value.numpy().tobytes()).decode()}
    return {key: _to_json(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _from_json(value: Any) -> Any:
    """Undo `_to_json`."""
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"base64"}:
        return torch.frombuffer(bytearray(base64.b64decode(value["base64"], validate=True)), dtype=torch.uint8)
    return {key: _from_json(item) for key, item in value.items()}
