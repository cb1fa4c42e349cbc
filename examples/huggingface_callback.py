"""A GRU tagger pruned by the Trainer of transformers, which keeps the best pruned model; then converted and saved.

The model reads Python source, byte by byte, and tags every byte that belongs to a comment: a small task that needs a
memory, with data that is already on the machine. `PrunerCallback` is the one line that pruning takes. The table shows
the share of bytes tagged right in text that was not trained on, by which the best model was chosen (tagging none is the
yardstick), the bytes of the recurrent layer, and the time of a step of a single stream, on one thread.

About a minute; --quick about 8 seconds, too short to learn much.
"""

from __future__ import annotations

import argparse
import io
import os
import time
import tokenize
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from triton_sparse_rnn import load_sparse, save_sparse, to_sparse
from triton_sparse_rnn.integrations.huggingface import PrunerCallback

LENGTH = 96  # bytes of a sample
warnings.filterwarnings("ignore", ".*pin_memory")  # there may be no GPU


class TaggerConfig(PretrainedConfig):
    model_type = "comment-tagger"

    def __init__(self, hidden_size: int = 192, **others: Any) -> None:
        super().__init__(**others)
        self.hidden_size = hidden_size


class Tagger(PreTrainedModel):
    config_class = TaggerConfig

    def __init__(self, config: TaggerConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(256, 64)
        self.rnn = nn.GRU(64, config.hidden_size, batch_first=True)
        self.head = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave what torch.nn drew."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.rnn(self.embedding(input_ids))[0])[..., 0]
        if labels is None:
            return {"logits": logits}
        return {"loss": F.binary_cross_entropy_with_logits(logits, labels), "logits": logits}


def load_samples(count: int) -> list[dict[str, Tensor]]:
    """Cut modules of the standard library into samples: bytes, and 1.0 for each that belongs to a comment."""
    samples: list[dict[str, Tensor]] = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if not text.isascii():
            continue
        starts = [0]
        for line in text.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        tags = torch.zeros(len(text))
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                start = starts[token.start[0] - 1] + token.start[1]
                tags[start : start + len(token.string)] = 1.0
        ids = torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8).long()
        cut = len(ids) // LENGTH * LENGTH
        columns = zip(ids[:cut].view(-1, LENGTH), tags[:cut].view(-1, LENGTH), strict=True)
        samples += [{"input_ids": ids, "labels": tags} for ids, tags in columns]
        if len(samples) >= count:
            break
    return samples[:count]


@torch.inference_mode()
def show(name: str, model: Any, samples: list[dict[str, Tensor]]) -> None:
    ids, tags = (torch.stack([sample[key] for sample in samples]) for key in ("input_ids", "labels"))
    right = ((model(ids)["logits"] > 0) == (tags > 0)).float().mean().item()
    stream = ids[:4].view(1, -1)
    model(stream)
    start = time.perf_counter()
    model(stream)
    microseconds = (time.perf_counter() - start) / stream.shape[1] * 1e6
    stored = sum(tensor.nbytes for tensor in model.rnn.state_dict().values())
    print(f"{name:30} {right:8.2%} {stored:10,} {microseconds:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model and a short training")
    parser.add_argument("--output", type=Path, default=Path("pruned-by-transformers"), help="a folder [%(default)s]")
    options = parser.parse_args()
    hidden_size, count = (64, 640) if options.quick else (192, 8000)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    samples = load_samples(count + count // 5)
    held_out = samples[count:]

    arguments = TrainingArguments(
        str(options.output),
        num_train_epochs=4,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,  # the best of those that are pruned to the end
        logging_strategy="epoch",
        disable_tqdm=True,
        use_cpu=True,
        report_to=[],
    )
    callback = PrunerCallback(final_sparsity=0.9)
    model = Tagger(TaggerConfig(hidden_size))
    Trainer(model, arguments, train_dataset=samples[:count], eval_dataset=held_out, callbacks=[callback]).train()
    print(callback.pruner)

    silent = 1 - torch.cat([sample["labels"] for sample in held_out]).mean().item()
    print(f"\n{'':30} {'right':>8} {'bytes':>10} {'µs/step':>8}\n{'no byte is a comment':30} {silent:8.2%}")
    show("pruned, as nn.GRU", model.eval(), held_out)
    save_sparse(to_sparse(model), options.output / "sparse.safetensors")
    loaded = load_sparse(Tagger(TaggerConfig(hidden_size)).eval(), options.output / "sparse.safetensors")
    show("converted, saved and loaded", loaded, held_out)


if __name__ == "__main__":
    main()
