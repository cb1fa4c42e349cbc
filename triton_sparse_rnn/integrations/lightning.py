"""Prune in a Lightning Trainer: `Trainer(callbacks=[PrunerCallback(final_sparsity=0.9)])`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

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

    Arguments are those of `PrunedTraining`: a schedule, or final_sparsity, and the keywords of `Pruner`.

    >>> PrunerCallback(final_sparsity=0.9, block_size=(16, 1)).pruner is None  # until fit()
    True
    """

    _saved: dict[str, Any] | None = None
    _best_is_pruned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._saved = None  # a checkpoint that was only validated

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps_left = trainer.estimated_stepping_batches - trainer.global_step
        self._start(pl_module, trainer.optimizers, steps_left, self._saved)
        self._saved = None
        self._best_is_pruned = self.pruner is not None and self.pruner.finished

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.pruner is None:
            return
        if not trainer.barebones:
            pl_module.log("sparsity", self.pruner.sparsity, on_step=True, on_epoch=False)
        if not self._best_is_pruned:
            self._best_is_pruned = self.pruner.finished
            _forget_best(trainer, finished=self.pruner.finished)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        return self._progress() if self._saved is None else self._saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict


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
