"""The pruner: masks recurrent and input weights gradually while any training loop trains them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, SupportsIndex

from torch import Tensor, nn
from torch.optim import Optimizer

from triton_sparse_rnn.notices import warn
from triton_sparse_rnn.pruning.attachment import Attachment, GradientHook, check_not_pruned_by_another
from triton_sparse_rnn.pruning.budgets import check_split
from triton_sparse_rnn.pruning.mask_rule import MaskRule
from triton_sparse_rnn.pruning.optimizers import is_optimizer, optimizers_in, parameter_ids, states_of
from triton_sparse_rnn.pruning.schedules import ConstantMask, Schedule
from triton_sparse_rnn.pruning.state import pack_state, unpack_state
from triton_sparse_rnn.pruning.targets import Target, Weight, find_weights, match_weights
from triton_sparse_rnn.pruning.weight_masks import WeightMasks
from triton_sparse_rnn.sparse.patterns import PatternLike, as_pattern, check_score
from triton_sparse_rnn.sparse.picks import DEFAULT_PATTERN


class Pruner:
    """Prune weights, in blocks or picks, during training, as a schedule says; used like a learning-rate scheduler.

    After every optimizer step pruned weights, and what the optimizer remembers of them (momentum and the like), are
    set to zero in place; their gradients are zero as soon as they are accumulated, so that clipping sees the truth.
    A pruned weight never comes back. After the last update of the schedule the mask is frozen, and still applied.
    The parameters stay the model's own: a state_dict of it holds plain weights, zeros among them.

    Masks depend on weights alone, so every rank of DistributedDataParallel finds the same ones without communication.
    A weight that is NaN is pruned last, and NaN or infinity in a pruned place becomes zero. The pruner holds about as
    much memory as the weights that it prunes. It cannot be copied or pickled: its `state_dict` can.

    >>> import torch
    >>> from triton_sparse_rnn import pruning
    >>> model = nn.GRU(8, 32)
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> schedule = pruning.PolynomialDecay(final_sparsity=0.9, begin_step=0, end_step=4, frequency=1)
    >>> pruner = Pruner(model, schedule, pattern=(4, 1))
    >>> handle = pruner.attach(optimizer)
    >>> for _ in range(4):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(5, 2, 8))[0].square().mean().backward()
    ...     optimizer.step()
    >>> pruner
    Pruner(2 weights, pattern=Blocks(rows=4, columns=1), score='l2', step 4, 90.0 % sparse, finished)
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule | None,
        *,
        pattern: PatternLike = DEFAULT_PATTERN,
        score: str = "l2",
        targets: Mapping[str, Target] | None = None,
        tie_gates: bool = False,
        balanced: bool | None = None,
        split: str = "gate",
        include: Iterable[str] = (),
    ) -> None:
        """Find the weights; nothing is pruned before a step of the schedule.

        Names are those of `model.named_parameters()`, without what wrappers add: torch.compile,
        DistributedDataParallel, checkpoint_wrapper, FullyShardedDataParallel, Lightning Fabric. Globs are `fnmatch`'s;
        "*.weight_hh_l0" also matches a layer that is the model.

        Args:
            model: every nn.RNN, nn.GRU and nn.LSTM in it has its recurrent and input weights (not biases, not
                weight_hr) pruned, each gate scored apart from the others.
            schedule: for each weight that `targets` does not match; None leaves those dense.
            pattern: which weights are pruned together, here called a unit: `Picks`, of which each hidden unit has its
                own inputs, or, as for a GPU, `Blocks`, or a pair (BR, BC) for these, BR hidden units of one gate by BC
                inputs. Units at the edge of a gate may be smaller. Both sizes are up to 4096, or as many as it has.
            score: "max", "mean" or "l2" of the weights of a unit; see `Pattern.scores`. Narang et al. take "max"; "l2"
                was 1 to 5 % more accurate on the tasks of docs/results.md.
            targets: {glob: schedule, None for dense, or {gate: schedule or None}}; the first glob that matches counts.
                Gates are "r" "z" "n" of a GRU, "i" "f" "g" "o" of an LSTM, "h" of an RNN; one that is not named
                follows `schedule`.
            tie_gates: one mask for all gates of a unit group; their scores are combined.
            balanced: prune the same number in each unit group of each gate; with `Picks` the same or one more, and so
                in each bank. Needs schedules by rank; None is False for blocks, and for `Picks` True where it can be.
            split: "gate" makes each gate of each weight as sparse as its schedule says; "layer" only all that follow
                one schedule in a layer and direction, weight_ih and weight_hh, together. Their units are ranked as one,
                by score relative to the root mean square of their own weight, but no gate has less than a quarter of
                an even share. Needs schedules by rank.
            include: globs of further parameters to prune, as `weight.flatten(1)`, such as ("decoder.weight",); not of
                an nn.Embedding(sparse=True), whose backward raises a TypeError.

        Raises:
            TypeError, ValueError: a bad argument, nothing to prune, a glob that matches nothing, or a weight that
                cannot be pruned: frozen, tied, parametrized, or sharded (DTensor).

        Warns:
            UserWarning: a gate, or with `balanced` a unit group of it, has so few that all will be pruned; or with
                split="layer" would, and is kept from it, so that the layer is less sparse than its schedule says.
        """
        self.pattern = as_pattern(pattern)
        self.score = check_score(score)
        self.tie_gates = _checked_flag("tie_gates", tie_gates)
        self.balanced = self.pattern.balanced if balanced is None else _checked_flag("balanced", balanced)
        self._model = model
        self.split = check_split(split)
        self.rule = MaskRule(self.pattern, self.score, self.tie_gates, self.balanced, self.split)
        self._weights = match_weights(model, schedule, targets, include)
        self.rule.check(self._weights, balanced=bool(balanced))
        self._step_count = 0
        self._started = False
        self._attachment: Attachment | None = None
        self._gradient_hooks: list[Any] = []
        full = {weight.name: self.rule.full_mask(weight) for weight in self._weights}
        self._masks = WeightMasks(self._weights, self.pattern, full)
        self._told_of_writes = False
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
        return {weight.name: self._masks.spread(weight) for weight in self._weights}

    @property
    def sparsities(self) -> dict[str, float]:
        """By name, the fraction of each weight that is pruned."""
        counts = self._masks.pruned_counts
        return {weight.name: counts[weight.name] / max(1, weight.parameter.numel()) for weight in self._weights}

    @property
    def sparsity(self) -> float:
        """The fraction of all matched weights that is pruned."""
        total = sum(weight.parameter.numel() for weight in self._weights)
        return sum(self._masks.pruned_counts.values()) / max(1, total)

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Step by itself after every `optimizer.step()`, those that a `GradScaler` skips left out.

        Args:
            optimizer: of optimizers in each other (Lookahead, SAM, what accelerate, Fabric and others prepare) the
                outermost. The one inside that writes the weights counts the steps, whoever calls it; where several
                inside write them, the one around these. What others around it write when it is done, such as
                Lookahead's slow weights, is masked too.

        Returns:
            A handle; `handle.remove()`, or leaving it as a context manager, ends the pruner's work: masks are kept,
            but not applied any more until the next `attach` or `step`.

        Raises:
            RuntimeError: it is attached already.
            ValueError: the optimizer lacks a parameter that is to be pruned, or another attached pruner prunes it.

        Warns:
            UserWarning: later, once: another optimizer makes many steps in a row with the weights, they change though
                this one never steps, or pruned weights were written to by somebody else.
        """
        if self._attachment is not None:
            raise RuntimeError("the pruner is attached already: call remove() of the handle that attach() returned")
        self._check_optimizer(optimizer)
        self._attachment = Attachment(self, optimizer)
        self._hook_gradients()
        return self._attachment

    def step(self, optimizer: Optimizer) -> None:
        """Count one finished step of the optimizer, update masks if one is due, and apply them.

        For loops that do not `attach`: call it after each `optimizer.step()`. It counts every call; a step that a
        `GradScaler` skipped is known only to an attached pruner.

        Raises:
            RuntimeError: the pruner is attached, or the model no longer has a parameter that is pruned, or a
                ConstantMask could not read the zeros before the optimizer wrote.
            ValueError: the optimizer lacks a parameter that is pruned, or another attached pruner prunes it.
        """
        if self._attachment is not None:
            raise RuntimeError("the pruner is attached, so optimizer.step() calls it: do not call pruner.step() too")
        self._check_optimizer(optimizer)
        check_not_pruned_by_another(self)
        if not self._started and (constant := self._constant_weights()):
            raise RuntimeError(
                f"ConstantMask did not see the zeros of {', '.join(weight.name for weight in constant)} before "
                "optimizer.step() wrote them: no backward() came first, as when .grad is set by hand. Load the weights "
                "again, and call pruner.attach(optimizer) before the first step in place of pruner.step()"
            )
        self._hook_gradients()
        self._advance(states_of(optimizers_in(optimizer)))

    def apply_masks(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        """Set what is pruned to zero in another model, in place: in an average of the weights, or a copy of the model.

        An average remembers weights from before they were pruned. Call this after each `update_parameters` of
        `torch.optim.swa_utils.AveragedModel`, or once at the end.

        Args:
            model: an nn.Module or a state_dict, with the weights under the names of `weights`; what comes before them
                in a wrapper, as "module." in an AveragedModel, is left out.

        Raises:
            TypeError, ValueError: a weight is missing, of another shape, or no dense tensor with values. Nothing is
                changed then.
        """
        found = find_weights("model", model, self._weights)
        for weight in self._weights:
            self._masks.apply(weight, found[weight.name])

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on as if never stopped: plain values and tensors, one bit for each unit.

        With `Picks` the zeros of the model tell the rest; where some kept weights are zero, one bit for each weight is
        added. `torch.load(weights_only=True)` reads it. Save the model's and the optimizer's state with it. Pruned
        weights that somebody else wrote to are set to zero again first, so that both fit together.

        Warns:
            UserWarning: that this was so, unless it was said before.
        """
        self._look(wait=True)
        return pack_state(self._step_count, self.rule.settings(), self._weights, self._masks)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over masks and step count, and apply the masks to the weights.

        With `Picks` load the model's state_dict first, with blocks before or after.
        Everything is checked first; if anything is wrong, nothing changes.

        Raises:
            TypeError, ValueError: it is no state of a pruner, or of one with other weights, schedules or settings, or
                its masks of `Picks` do not fit the weights.
        """
        step_count, masks = unpack_state(state_dict, self.rule.settings(), self._weights, self._masks)
        self._step_count, self._started = step_count, step_count > 0
        for weight in self._weights:
            self._masks.load(weight, *masks[weight.name])
            self._masks.apply(weight, weight.parameter)

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        if not is_optimizer(optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        held = parameter_ids(optimizer)
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
                weight.parameter.register_post_accumulate_grad_hook(GradientHook(self, weight))
                for weight in self._weights
            ]

    def _detach(self) -> None:
        self._attachment = None
        while self._gradient_hooks:
            self._gradient_hooks.pop().remove()
        for weight in self._weights:
            self._masks.samples.forget(weight)  # nobody masks it any more

    def _start(self) -> None:
        """Do the update of step 0, once, when the first gradient or else the first step arrives."""
        if self._started:
            return
        self._update_masks(0)
        constant = self._constant_weights()
        dense = [weight.name for weight in constant if self._is_kept_whole(weight)]
        if dense:
            found = f"ConstantMask found no {self.pattern.describe()} that is all zeros in {', '.join(dense)}: "
            if len(dense) == len(constant):
                raise ValueError(
                    f"{found}load the pruned checkpoint before training, and give the pattern it was pruned with"
                )
            warn(
                f"{found}it stays dense. targets={{{dense[0]!r}: None}} says that this is meant; else load the pruned "
                "checkpoint before training, and give the pattern it was pruned with"
            )
        self._started = True

    def _constant_weights(self) -> list[Weight]:
        return [weight for weight in self._weights if any(isinstance(one, ConstantMask) for one in weight.schedules)]

    def _is_kept_whole(self, weight: Weight) -> bool:
        """Whether ConstantMask prunes nothing in the gates that it was given for."""
        mask = self._masks.of_units[weight.name]
        gates = [gate for gate, one in enumerate(weight.schedules[: len(mask)]) if isinstance(one, ConstantMask)]
        return bool(mask[gates].all())

    def _before_step(self) -> None:
        self._start()
        self._look()

    def _look(self, *, wait: bool = False) -> None:
        """Mask again what somebody else wrote to since it was masked, and say so once."""
        if names := self._masks.samples.written(self._weights, wait=wait):
            self._masks.apply_everywhere(())
            self._tell_of_writes(names)

    def _tell_of_writes(self, names: list[str]) -> None:
        if self._told_of_writes or not names:
            return
        self._told_of_writes = True
        after = "pruner.step()" if self._attachment is None else f"the step of {self._attachment.name}"
        warn(
            f"pruned weights of {', '.join(names)} were written to since {after} set them to zero, and are set to zero "
            "again: by a wrapper around the optimizer, such as Lookahead, by averaged weights that were copied into "
            "the model, or by load_state_dict(). Attach the outermost optimizer, pruner.attach(lookahead), call "
            "pruner.apply_masks(average) before an average is copied, and pruner.load_state_dict() with a checkpoint"
        )

    def _advance(self, states: Iterable[Mapping[Any, Any]]) -> None:
        replaced = [weight.name for weight in self._weights if not weight.in_model(self._model)]
        if replaced:
            raise RuntimeError(
                f"the model no longer has the parameters {', '.join(replaced)} that the pruner was made for: they were "
                "replaced, parametrized or sharded. Make the pruner after that, and load_state_dict() its progress"
            )
        self._start()
        self._step_count += 1
        self._update_masks(self._step_count)
        self._masks.apply_everywhere(states)

    def _update_masks(self, step: int) -> None:
        for group in self.rule.together(self._weights):
            schedules = {schedule for weight in group for schedule in weight.schedules}
            if not any(schedule is not None and schedule.updates_at(step) for schedule in schedules):
                continue
            tensors = [weight.parameter.detach() for weight in group]
            for weight, tensor in zip(group, tensors, strict=True):
                self._masks.apply(weight, tensor)  # somebody else may have written there
            masks = [self._masks.of_units[weight.name].to(weight.parameter.device) for weight in group]
            for weight, mask in zip(group, self.rule.update(group, tensors, masks, step), strict=True):
                self._masks.set(weight, mask)

    def __repr__(self) -> str:
        return (
            f"Pruner({len(self._weights)} weights, pattern={self.pattern}, score={self.score!r}, "
            f"step {self._step_count}, {100 * self.sparsity:.1f} % sparse{', finished' if self.finished else ''})"
        )

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "a Pruner cannot be copied or pickled, since its hooks stay in the model that it was made for: "
            "make one for the other model, and pass it this one's state_dict() by load_state_dict()"
        )


def _checked_flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value
