"""Prune in a Lightning Trainer: `Trainer(callbacks=[PrunerCallback(final_sparsity=0.9)])`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from triton_sparse_rnn.integrations.pruned_training import PrunedTraining

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback
        except ImportError as error:
            raise ImportError(
                "triton_sparse_rnn.integrations.lightning needs Lightning: pip install 'triton-sparse-rnn[lightning]'"
            ) from error


class PrunerCallback(PrunedTraining, Callback):
    """Drive a `Pruner` in a Trainer of `lightning` or of `pytorch_lightning`.

    The pruner is made when training starts, follows the one optimizer that holds its weights, and is taken off when
    training ends; `callback.pruner` stays. `sparsity` is logged at every step. Checkpoints hold the masks, so that
    `fit(ckpt_path=...)` goes on as if never stopped, to the bit; their state_dict is the plain model's, zeros included.

    A model is best, and training no longer improves, only among equals: as long as weights are being pruned,
    EarlyStopping waits, and when the mask is final, every ModelCheckpoint that monitors something looks for the best
    anew. Files it wrote until then stay.

    What WeightAveraging, EMAWeightAveraging and StochasticWeightAveraging average is pruned as the model is, in
    whichever order the callbacks stand; of other averages call `pruner.apply_masks(average)`.

    A trainer takes one such callback; weights with schedules of their own are `targets`. With optimization by hand, a
    schedule that is chosen for you takes it that the optimizer of the weights steps once a batch, which is looked into
    after the first epoch; when several optimizers share max_steps, give a schedule.

    Arguments are those of `PrunedTraining`: a schedule, or final_sparsity, and the keywords of `Pruner`.

    >>> PrunerCallback(final_sparsity=0.9, pattern=(16, 1)).pruner is None  # until fit()
    True
    """

    _saved: dict[str, Any] | None = None
    _best_is_pruned = False
    _averages_at = 0.0  # the sparsity at which averages were masked
    _unchecked: tuple[int, int, float] | None = None  # steps, batches and steps left at the start of training by hand

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._saved = None  # a checkpoint that was only validated

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps_left = _steps_left(trainer, pl_module)
        self._start(trainer, pl_module, trainer.optimizers, steps_left, self._saved)
        self._saved = None
        if self.pruner is not None:
            self._best_is_pruned = self.pruner.finished
            by_hand = not pl_module.automatic_optimization and math.isfinite(steps_left)
            self._unchecked = (self.pruner.step_count, _batches(trainer), steps_left) if by_hand else None
        self._mask_averages(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.pruner is None:
            return
        if self.pruner.sparsity != self._averages_at:
            self._mask_averages(trainer)  # until then, an average of weights that are zero stays zero
        if not trainer.barebones:
            pl_module.log("sparsity", self.pruner.sparsity, on_step=True, on_epoch=False)
        if not self._best_is_pruned:
            self._best_is_pruned = self.pruner.finished
            _forget_best(trainer, finished=self.pruner.finished)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._unchecked is not None and self.pruner is not None:
            steps, batches, steps_left = self._unchecked
            self._unchecked = None
            rate = (self.pruner.step_count - steps) / max(1, _batches(trainer) - batches)
            self._check_end(steps + int(rate * steps_left))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._mask_averages(trainer)  # between a step and the end of its batch, too

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()  # after every on_train_end, in which others may write averages into the model

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def _mask_averages(self, trainer: Trainer) -> None:
        if self.pruner is not None:
            self._averages_at = self.pruner.sparsity
            for average in _averages(trainer):
                self.pruner.apply_masks(average)

    def state_dict(self) -> dict[str, Any]:
        return self._progress() if self._saved is None else self._saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict


def _steps_left(trainer: Trainer, pl_module: LightningModule) -> float:
    """How often the optimizer of the pruned weights will step; infinity if that cannot be known."""
    planned = trainer.estimated_stepping_batches
    if planned < 0:  # the max_steps of an iterable dataset, where -1 is none
        planned = math.inf
    for callback in _named(trainer, "StochasticWeightAveraging"):
        if getattr(callback, "_model_contains_batch_norm", False) and trainer.max_epochs != -1:
            # It adds an epoch for the statistics.
            epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            planned = min(planned, epoch * ((trainer.max_epochs or 1) - 1))
    if pl_module.automatic_optimization:
        return planned - trainer.global_step
    if trainer.max_steps == -1:
        return planned - _batches(trainer)
    # The trainer counts the steps of all optimizers together.
    return planned - trainer.global_step if len(trainer.optimizers) == 1 else math.inf


def _batches(trainer: Trainer) -> int:
    """How many were trained on, in all epochs."""
    return trainer.fit_loop.total_batch_idx + 1


def _named(trainer: Trainer, *names: str) -> Iterator[Any]:
    """Callbacks of Lightning's classes of these names, in either of its packages and in versions that have them."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if any(base.__name__ in names for base in type(callback).__mro__):
            yield callback


def _averages(trainer: Trainer) -> Iterator[nn.Module]:
    for callback in _named(trainer, "WeightAveraging", "StochasticWeightAveraging"):
        average = getattr(callback, "_average_model", None)
        if average is not None:
            yield average


def _forget_best(trainer: Trainer, *, finished: bool) -> None:
    for stopping in trainer.early_stopping_callbacks:
        worst = float("inf") if stopping.monitor_op is torch.lt else -float("inf")
        stopping.best_score = torch.tensor(worst, dtype=torch.float32, device="cpu")
        stopping.wait_count = 0
    checkpoints: list[Any] = trainer.checkpoint_callbacks if finished else []
    for checkpoint in checkpoints:
        if getattr(checkpoint, "monitor", None) is not None:
            checkpoint.best_k_models = {}
            checkpoint.best_model_score = None
            checkpoint.best_model_path = checkpoint.kth_best_model_path = ""
