"""The pruner: masks recurrent and input weights gradually while any training loop trains them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from triton_sparse_rnn.pruning.masks import kept_bits, prune_to_sparsity, prune_to_threshold, zero_pruned
from triton_sparse_rnn.pruning.schedules import ConstantMask, Schedule
from triton_sparse_rnn.pruning.scores import block_scores, block_weight_counts, check_score, combine_gates
from triton_sparse_rnn.pruning.state import pack_state, unpack_state
from triton_sparse_rnn.pruning.targets import Target, Weight, match_weights, warn_of_emptied_gates
from triton_sparse_rnn.sparse.blocks import check_block_size


class Pruner:
    """Prune weights block by block during training, as a schedule says; used like a learning-rate scheduler.

    After every optimizer step pruned weights, and what the optimizer remembers of them (momentum and the like), are
    set to zero in place; their gradients are zero as soon as they are accumulated, so that clipping sees the truth.
    A pruned weight never comes back. After the last update of the schedule the mask is frozen, and still applied.
    The parameters stay the model's own: a state_dict of it holds plain weights, zeros among them.

    Masks depend on weights alone, so every rank of DistributedDataParallel finds the same ones without communication.
    A weight that is NaN is pruned last, and NaN or infinity in a pruned place becomes zero. The pruner holds about as
    much memory as the weights that it prunes. It cannot be copied or pickled: its `state_dict` can.

    >>> from triton_sparse_rnn import pruning
    >>> model = nn.GRU(8, 32)
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> schedule = pruning.PolynomialDecay(final_sparsity=0.9, begin_step=0, end_step=4, frequency=1)
    >>> pruner = Pruner(model, schedule, block_size=(4, 1))
    >>> handle = pruner.attach(optimizer)
    >>> for _ in range(4):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(5, 2, 8))[0].square().mean().backward()
    ...     optimizer.step()
    >>> pruner
    Pruner(2 weights, block_size=(4, 1), score='l2', step 4, 90.0 % sparse, finished)
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule | None,
        *,
        block_size: tuple[int, int] = (16, 1),
        score: str = "l2",
        targets: Mapping[str, Target] | None = None,
        tie_gates: bool = False,
        balanced: bool = False,
        include: Iterable[str] = (),
    ) -> None:
        """Find the weights; nothing is pruned before a step of the schedule.

        Names are those of `model.named_parameters()`, without the prefixes that torch.compile and
        DistributedDataParallel add. Globs are `fnmatch`'s; "*.weight_hh_l0" also matches a layer that is the model.

        Args:
            model: every nn.RNN, nn.GRU and nn.LSTM in it has its recurrent and input weights (not biases, not
                weight_hr) pruned, each gate scored apart from the others.
            schedule: for each weight that `targets` does not match; None leaves those dense.
            block_size: (BR, BC), BR hidden units of one gate by BC inputs. Blocks at the edge of a gate may be smaller.
            score: "max", "mean" or "l2" of the weights in a block; see `block_scores`. Narang et al. take "max"; "l2"
                was 1 to 5 % more accurate on the tasks of docs/results.md.
            targets: {glob: schedule, None for dense, or {gate: schedule or None}}; the first glob that matches counts.
                Gates are "r" "z" "n" of a GRU, "i" "f" "g" "o" of an LSTM, "h" of an RNN; one that is not named
                follows `schedule`.
            tie_gates: one mask for all gates of a unit group; their scores are combined.
            balanced: prune the same number of blocks in each unit group of each gate. Needs schedules by rank.
            include: globs of further parameters to prune, as `weight.flatten(1)`, such as ("decoder.weight",); not of
                an nn.Embedding(sparse=True), whose backward raises a TypeError.

        Raises:
            TypeError, ValueError: a bad argument, nothing to prune, a glob that matches nothing, or a weight that
                cannot be pruned: frozen, tied, parametrized, or sharded (DTensor).

        Warns:
            UserWarning: a gate, or with `balanced` a block row, has so few blocks that all of them will be pruned.
        """
        self.block_size = check_block_size(block_size)
        self.score = check_score(score)
        self.tie_gates = _checked_flag("tie_gates", tie_gates)
        self.balanced = _checked_flag("balanced", balanced)
        self._model = model
        self._weights = match_weights(model, schedule, targets, include)
        self._check_options()
        warn_of_emptied_gates(self._weights, self.block_size, balanced=self.balanced)
        self._step_count = 0
        self._started = False
        self._attachment: Attachment | None = None
        self._gradient_hooks: list[Any] = []
        self._block_masks = {weight.name: self.full_block_mask(weight) for weight in self._weights}
        self._pruned_counts = dict.fromkeys(self._block_masks, 0)
        self._bits: dict[str, Tensor] = {}  # what `zero_pruned` takes, for each weight of which something is pruned
        self._hook_gradients()

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What is pruned, and by which schedules."""
        return self._weights

    @property
    def step_count(self) -> int:
        """Optimizer steps finished so far."""
        return self._step_count

    @property
    def finished(self) -> bool:
        """Whether the last update of every schedule is done."""
        schedules = {schedule for weight in self._weights for schedule in weight.schedules if schedule is not None}
        return self._started and self._step_count >= max(schedule.last_step for schedule in schedules)

    @property
    def masks(self) -> dict[str, Tensor]:
        """By name, a copy of each mask: bool of the weight's shape and device, True = kept."""
        return {
            weight.name: self._bits[weight.name].ne(0)
            if weight.name in self._bits
            else torch.ones_like(weight.parameter, dtype=torch.bool)
            for weight in self._weights
        }

    @property
    def sparsities(self) -> dict[str, float]:
        """By name, the fraction of each weight that is pruned."""
        return {weight.name: self._pruned_counts[weight.name] / weight.parameter.numel() for weight in self._weights}

    @property
    def sparsity(self) -> float:
        """The fraction of all matched weights that is pruned."""
        total = sum(weight.parameter.numel() for weight in self._weights)
        return sum(self._pruned_counts.values()) / total

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Step by itself after every `optimizer.step()`, those that a `GradScaler` skips left out.

        Returns:
            A handle; `handle.remove()`, or leaving it as a context manager, ends the pruner's work: masks are kept,
            but not applied any more until the next `attach` or `step`.

        Raises:
            RuntimeError: it is attached already.
            ValueError: the optimizer lacks a parameter that is to be pruned.
        """
        if self._attachment is not None:
            raise RuntimeError("the pruner is attached already: call remove() of the handle that attach() returned")
        self._check_optimizer(optimizer)
        self._hook_gradients()
        self._attachment = Attachment(self, optimizer)
        return self._attachment

    def step(self, optimizer: Optimizer) -> None:
        """Count one finished step of the optimizer, update masks if one is due, and apply them.

        For loops that do not `attach`: call it after each `optimizer.step()`. It counts every call; a step that a
        `GradScaler` skipped is known only to an attached pruner.

        Raises:
            RuntimeError: the pruner is attached, or the model no longer has a parameter that is pruned.
            ValueError: the optimizer lacks a parameter that is pruned.
        """
        if self._attachment is not None:
            raise RuntimeError("the pruner is attached, so optimizer.step() calls it: do not call pruner.step() too")
        self._check_optimizer(optimizer)
        self._hook_gradients()
        self._advance(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on as if never stopped: plain values and tensors, one bit for each block.

        `torch.load(weights_only=True)` reads it. Save the model's and the optimizer's state with it.
        """
        return pack_state(self._step_count, self._settings(), self._weights, self._block_masks)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over masks and step count, and apply the masks to the weights.

        Everything is checked first; if anything is wrong, nothing changes.

        Raises:
            TypeError, ValueError: it is no state of a pruner, or of one with other weights, schedules or settings.
        """
        step_count, block_masks = unpack_state(state_dict, self._settings(), self._weights, self._block_masks)
        self._step_count, self._started = step_count, step_count > 0
        self._bits.clear()
        for weight in self._weights:
            self._set_block_mask(weight, block_masks[weight.name])
            self._apply(weight, weight.parameter)

    def full_block_mask(self, weight: Weight) -> Tensor:
        """Return the block mask of a weight before anything is pruned: all True, see `update_block_mask`."""
        gates, rows, columns = weight.block_grid(self.block_size)
        return torch.ones(1 if self.tie_gates else gates, rows, columns, dtype=torch.bool, device="cpu")

    def update_block_mask(self, weight: Weight, tensor: Tensor, block_mask: Tensor, step: int) -> Tensor:
        """Return what an update at `step` makes of a block mask, given the weights in `tensor`.

        Args:
            weight: one of `weights`; its schedules decide. Gates without an update at `step` keep their mask.
            tensor: of the weight's shape.
            block_mask: [G, block rows, block columns], or [1, ...] with `tie_gates`, bool, True = kept.
            step: any, not only the present one.
        """
        scores = block_scores(weight.stacked(tensor), self.block_size, self.score)
        if self.tie_gates:
            scores = combine_gates(scores, self.score)
        updated = block_mask.clone()
        for gate, schedule in enumerate(weight.schedules[: len(scores)]):
            if schedule is None or not schedule.updates_at(step):
                continue
            sparsity, threshold = schedule.sparsity_at(step), schedule.threshold_at(step)
            if sparsity is not None:
                updated[gate] = prune_to_sparsity(scores[gate], block_mask[gate], sparsity, balanced=self.balanced)
            elif threshold is not None:
                updated[gate] = prune_to_threshold(scores[gate], block_mask[gate], threshold)
        return updated

    def _check_options(self) -> None:
        for weight in self._weights:
            if self.tie_gates and len(set(weight.schedules)) > 1:
                raise ValueError(f"tie_gates=True gives all gates one mask, but targets gives {weight.name} several")
            for schedule in weight.schedules:
                if self.balanced and schedule is not None and schedule.sparsity_at(schedule.last_step) is None:
                    raise ValueError(
                        f"balanced=True needs a schedule by rank, PolynomialDecay or OneShot: a "
                        f"{type(schedule).__name__} (for {weight.name}) does not choose how many blocks it prunes"
                    )

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [weight.name for weight in self._weights if id(weight.parameter) not in held]
        if missing:
            raise ValueError(
                f"optimizer lacks {', '.join(missing)}: give it these parameters, "
                f"or leave them dense by targets={{{missing[0]!r}: None}}"
            )

    def _hook_gradients(self) -> None:
        """Mask gradients as they come, unless that is so already."""
        if not self._gradient_hooks:
            self._gradient_hooks = [
                weight.parameter.register_post_accumulate_grad_hook(_GradientHook(self, weight))
                for weight in self._weights
            ]

    def _detach(self) -> None:
        self._attachment = None
        while self._gradient_hooks:
            self._gradient_hooks.pop().remove()

    def _start(self) -> None:
        """Do the update of step 0, once, when the first gradient or else the first step arrives."""
        if self._started:
            return
        self._update_masks(0)
        constant = [weight for weight in self._weights if any(isinstance(s, ConstantMask) for s in weight.schedules)]
        if constant and all(weight.name not in self._bits for weight in constant):
            raise ValueError(
                f"ConstantMask found no {self.block_size} block of zeros in {', '.join(w.name for w in constant)}: "
                "load the pruned checkpoint before training, and give the block_size it was pruned with"
            )
        self._started = True

    def _advance(self, optimizer: Optimizer) -> None:
        replaced = [weight.name for weight in self._weights if not weight.in_model(self._model)]
        if replaced:
            raise RuntimeError(
                f"the model no longer has the parameters {', '.join(replaced)} that the pruner was made for: they were "
                "replaced, parametrized or sharded. Make the pruner after that, and load_state_dict() its progress"
            )
        self._start()
        self._step_count += 1
        self._update_masks(self._step_count)
        for weight in self._weights:
            parameter = weight.parameter
            for tensor in (parameter, parameter.grad, *optimizer.state.get(parameter, {}).values()):
                if isinstance(tensor, Tensor) and tensor.shape == parameter.shape and tensor.is_floating_point():
                    self._apply(weight, tensor)

    def _update_masks(self, step: int) -> None:
        for weight in self._weights:
            if any(schedule is not None and schedule.updates_at(step) for schedule in weight.schedules):
                parameter, block_mask = weight.parameter.detach(), self._block_masks[weight.name]
                updated = self.update_block_mask(weight, parameter, block_mask.to(parameter.device), step)
                self._set_block_mask(weight, updated)

    def _set_block_mask(self, weight: Weight, block_mask: Tensor) -> None:
        parameter = weight.parameter
        self._block_masks[weight.name] = block_mask = block_mask.to(parameter.device)
        every_gate = block_mask.expand(weight.gates, -1, -1)
        counts = block_weight_counts(weight.matrix_shape, self.block_size, parameter.device)
        self._pruned_counts[weight.name] = int((counts * ~every_gate).sum())
        if self._pruned_counts[weight.name]:
            self._bits[weight.name] = kept_bits(every_gate, self.block_size, parameter.shape, parameter.dtype)

    def _apply(self, weight: Weight, tensor: Tensor) -> None:
        if tensor.layout != torch.strided:
            raise TypeError(
                f"{weight.name} must have dense gradients and optimizer state, got {tensor.layout}: "
                "give its nn.Embedding sparse=False, or leave it out of include"
            )
        bits = self._bits.get(weight.name)
        if bits is None:
            return
        if bits.device != tensor.device:
            bits = self._bits[weight.name] = bits.to(weight.parameter.device)  # the model has moved
        zero_pruned(tensor, bits.to(tensor.device))

    def _settings(self) -> dict[str, Any]:
        return {
            "block_size": list(self.block_size),
            "score": self.score,
            "tie_gates": self.tie_gates,
            "balanced": self.balanced,
        }

    def __repr__(self) -> str:
        return (
            f"Pruner({len(self._weights)} weights, block_size={self.block_size}, score={self.score!r}, "
            f"step {self._step_count}, {100 * self.sparsity:.1f} % sparse{', finished' if self.finished else ''})"
        )

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "a Pruner cannot be copied or pickled, since its hooks stay in the model that it was made for: "
            "make one for the other model, and pass it this one's state_dict() by load_state_dict()"
        )


class Attachment:
    """What `Pruner.attach` returns: the hooks in an optimizer that call the pruner, until `remove()`."""

    def __init__(self, pruner: Pruner, optimizer: Optimizer) -> None:
        self._pruner: Pruner | None = pruner
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def remove(self) -> None:
        """Take the pruner off the optimizer and off the gradients. A second call does nothing."""
        self._hook.remove()
        if self._pruner is not None:
            self._pruner._detach()
            self._pruner = None

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A fused optimizer skips a step inside its kernel, by the found_inf that GradScaler gives it for the call.
        found_inf = getattr(optimizer, "found_inf", None)
        if self._pruner is not None and (found_inf is None or not found_inf.item()):
            self._pruner._advance(optimizer)


class _GradientHook:
    """Holds the pruner weakly: a pruner that is dropped without being attached has no effect and no memory."""

    def __init__(self, pruner: Pruner, weight: Weight) -> None:
        self._pruner = weakref.ref(pruner)
        self._weight = weight

    def __call__(self, parameter: Tensor) -> None:
        pruner = self._pruner()
        if pruner is None or parameter.grad is None:
            return
        pruner._start()
        pruner._apply(self._weight, parameter.grad)


def _checked_flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value
