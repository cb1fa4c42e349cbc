"""Small trainings by Lightning, for the tests beside this file."""

import functools
import importlib
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from triton_sparse_rnn.integrations.lightning import PrunerCallback

STEPS = 8  # batches of an epoch


@functools.cache
def model_class(package="lightning.pytorch") -> Any:
    class Model(importlib.import_module(package).LightningModule):
        def __init__(self, optimizers=1):
            super().__init__()
            torch.manual_seed(0)
            self.rnn = nn.GRU(3, 16, batch_first=True)
            self.head = nn.Linear(16, 1)
            self.automatic_optimization = optimizers == 1

        def forward(self, x):
            return self.head(self.rnn(x)[0])

        def loss(self, batch):
            return (self(batch) - batch.cumsum(1)[..., :1]).square().mean()

        def training_step(self, batch, index):
            loss = self.loss(batch)
            if self.automatic_optimization:
                return loss
            optimizers: Any = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()
            return None

        def validation_step(self, batch, index):
            self.log("val_loss", self.loss(batch))

        def configure_optimizers(self):
            if self.automatic_optimization:
                return torch.optim.Adam(self.parameters(), lr=0.01)
            return [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.head, self.rnn)]

    return Model


def loader():
    x = torch.randn(4 * STEPS, 5, 3, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(x, batch_size=4)  # type: ignore[arg-type]


def make_trainer(*callbacks, package="lightning.pytorch", **options):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    options = {"max_epochs": 2, "accelerator": "cpu", **quiet, **options}
    options["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return importlib.import_module(package).Trainer(callbacks=list(callbacks), **options)


def pruner_callback(**options) -> Any:
    settings: dict[str, Any] = {"pattern": (4, 1)} | ({} if "schedule" in options else {"final_sparsity": 0.8})
    return PrunerCallback(**settings | options)


def fit(callback, *others, model=None, **options):
    model = model_class()() if model is None else model
    trainer = make_trainer(callback, *others, **options)
    trainer.fit(model, loader(), loader())
    return model, trainer


def masked(callback, model):
    """Whether what the masks prune is zero, and something is pruned."""
    weights = dict(model.named_parameters())
    zeros = [not weights[name][~mask].any() for name, mask in callback.pruner.masks.items()]
    return callback.pruner.sparsity > 0 and all(zeros)
