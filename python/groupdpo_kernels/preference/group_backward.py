"""The backward of a group of responses at the memory of one micro-batch: the chain rule at the vector of seq_logps.

A preference loss depends on the parameters through seq_logps s alone. So with c = d loss / d s its gradient is that of
sum_i c_i s_i, and a sum splits over micro-batches anywhere.

    two_pass    It runs every micro-batch forward without a graph, which gives the loss and c, then each forward and
                backward. It takes the memory of one micro-batch, whatever the group size, and one more forward of the
                model, but not of its LM head: pass 2 is given the lse (log-sum-exp of the logits) of pass 1.
    one_pass    It runs each micro-batch forward once, each response backward by itself, and combines these gradients
                with c. It saves the second forward but keeps S copies of the gradient, so it suits few trainable
                parameters (LoRA) and micro-batches of one response: each backward walks its whole micro-batch's graph.

Sequences that begin with the same prompt may share it. A SharedPrompt holds the prompt and the micro-batches of its
sequences; forward is then an object with two methods, prefix(prompt) and rows(micro_batch, prefix). The prompt runs
forward once for all of its micro-batches: in two_pass once a pass, or once in all if the step of one process has
nothing else. They
add their gradients at leaves of the prefix's tensors (keys and values), and one backward takes the sum through the
prompt, together with that of the last micro-batch. Only one prompt's graph is alive at a time, but for one_pass, which
keeps all until the loss is known. Where FSDP or DeepSpeed shards the model, a forward with a graph must be followed by
its backward, so that a prompt of pass 2 runs without a graph for its micro-batches, and with one after them.

Both give the gradient of the whole group, dropout included: two_pass saves the random state of each micro-batch and
replays it. Gradients are of first order only. distributed.py describes several processes.
It never keeps the graph of a whole group, knows a loss or a model, or hides a loss that is not finite.
It needs a forward that depends on its micro-batch, on parameters that stay as they are during the call, and on torch's
global random state, nothing else; two_pass compares its passes and warns.
The source is GroupDPO (arXiv 2604.15602); docs/math.md, section 4, derives the method.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..checks import check_callable, check_group, check_iterable, check_kind, check_number, one_of
from ..distributed import Ranks, is_dtensor
from ..replay import LseTape, RandomState
from .groups import PreferenceGroups, check_groups
from .objective import Objective, PreferenceLoss, preference_loss
from .segments import seq_logps

M = TypeVar("M")


class SharedPrompt(NamedTuple):
    """Micro-batches whose sequences begin with the same prompt, or with one of a few, which runs once for all."""

    prompt: Any  # what forward.prefix takes
    micro_batches: Sequence[Any]  # each what forward.rows takes


class SharedForward(Protocol):
    """A forward in two parts, for micro-batches that share a prompt."""

    def prefix(self, prompt: Any) -> Sequence[Tensor | None]:
        """All that the rows read of the prompt, as tensors: what does not pass through them gets no gradient.

        Where the model is sharded, one of them must lead through the model's outputs, whose hooks gather the weights
        for the backward: `attach(model).prefix` sees to it.
        """

    def rows(self, micro_batch: Any, prefix: Sequence[Tensor | None]) -> Sequence[Tensor]:
        """What a forward without a shared prompt returns; `prefix` is empty for a micro-batch without one."""


def group_backward(
    micro_batches: Iterable[M | SharedPrompt],
    forward: Callable[[M], Sequence[Tensor]] | SharedForward,
    groups: PreferenceGroups,
    objective: Objective,
    ref_logps: Tensor | None = None,  # (S,) or (T,), as in preference_loss
    *,
    strategy: str = "two_pass",
    scale: float | Tensor = 1.0,
    parameters: Iterable[Tensor] | None = None,
    no_sync: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
    gradient_bytes: int = 2**30,
    model: nn.Module | None = None,
    process_group: Any = None,
) -> PreferenceLoss:
    """Accumulates into .grad what `(scale * preference_loss(...).loss).backward()` would, a micro-batch at a time.

        def forward(micro_batch):
            input_ids, targets, cu_seqlens = micro_batch
            return model_logps(model, input_ids, targets)[targets != -100], cu_seqlens

        objective = Objective("mpo", beta=5.0, average=True, nll_weight=1.0)
        loss = group_backward(micro_batches, forward, groups, objective, ref_logps).loss

    Args:
        micro_batches: a list, or anything else that gives the same micro-batches each time it is iterated. A
            SharedPrompt stands for its micro-batches, in their place.
        forward: micro-batch -> (token_logps (t,), cu_seqlens (s+1,)), or with a third item, a scalar auxiliary loss
            that is added as it is, times `scale`. The sequences of all micro-batches, in order, are those of
            `groups`; a micro-batch may hold parts of several groups. For a SharedPrompt it is a SharedForward.
        groups, objective, ref_logps: as in `preference_loss`.
        strategy: "two_pass" or "one_pass"; the module's docstring compares them.
        scale: factor on the gradient, not on the result: 1 / accumulation steps, or the scale of a gradient scaler.
        parameters: the leaves whose .grad is filled. None takes all that the graph leads to.
        no_sync: the context of every micro-batch but the last, in which gradients are not reduced. None takes that of
            the wrapper: `ddp.no_sync`, or DeepSpeed's set_gradient_accumulation_boundary.
        gradient_bytes: the most bytes that the S copies of the gradient may take in one_pass. Where a prompt is shared,
            these copies include the gradients of its tensors.
        model: the wrapper that forward calls, so that ranks agree before anything runs and hear of errors in the
            arguments. None waits until forward calls the wrapper.
        process_group: the ranks that must agree. None takes those of the wrapper; without a wrapper no rank talks to
            another, but for those that `groups` span. A wrapper other than DistributedDataParallel, FSDP and DeepSpeed
            needs a process_group.

    With several processes, every rank calls group_backward with groups of its own. Wrappers average the gradient over
    ranks, so it is that of one process with all groups where ranks have equally many (else pass scale = ranks * own
    groups / all groups). Under FSDP and DeepSpeed each micro-batch and each prompt is a collective call, so a rank with
    fewer of them runs its smallest one again with weight zero. Prompts run there once more, without a graph, before
    their micro-batches of pass 2. one_pass works with DistributedDataParallel alone.

    Where `groups` themselves span ranks, micro-batches hold this rank's responses, or its tokens of each. Ranks
    exchange three numbers a response between the passes, and the average of their gradients is that of one process,
    however many responses each has (`PreferenceGroups`). A rank without a response gives one micro-batch without a
    sequence.

    Returns the PreferenceLoss, detached, without auxiliary losses. A loss that is not finite comes out as it is, and so
    do its gradients. A module that counts its forwards (batch normalisation) counts both passes.

    Raises ValueError or TypeError for what preference_loss refuses, for micro-batches that cannot be iterated twice or
    do not hold the sequences of groups, for a forward that returns something else or, with a SharedPrompt, lacks its
    two methods, for reentrant checkpoints with `parameters`, for parameters or one_pass where FSDP or DeepSpeed shards,
    for ranks with different strategies. Before pass 2 an error of one rank is raised on all (under FSDP and ZeRO-3 not
    if forward itself raised it); where groups span ranks by a process_group alone and nothing wraps the model, in pass
    2 too. It warns if pass 2 does not repeat pass 1, on all ranks that groups span.
    """
    check_groups(groups)
    check_group("process_group", process_group)
    if model is not None:
        check_kind("model", model, nn.Module, "a torch.nn.Module or None")
    names = list(STRATEGIES)
    at = names.index(strategy) if isinstance(strategy, str) and strategy in names else -1
    ranks = Ranks(
        process_group,
        lambda: _count(micro_batches),
        lambda: calls_of(micro_batches),
        at,
        strategy == "one_pass",
        no_sync is not None,
        [group for group in (groups.context_parallel_group, groups.process_group) if group is not None],
        groups.context_parallel_group is None,
    )
    wrong: Exception | None = None
    leaves: list[Tensor] | None = None
    try:
        _check_kinds(micro_batches, forward, no_sync)
        leaves = _trained(parameters)
        _check(strategy, micro_batches, scale, leaves)
    except (ValueError, TypeError) as error:
        wrong = error
    ranks.begin(model, wrong)
    step = _Step(micro_batches, forward, groups, objective, ref_logps, scale, leaves, no_sync, gradient_bytes, ranks)
    return STRATEGIES[strategy](step)


def _check_kinds(micro_batches: Any, forward: Any, no_sync: Any) -> None:
    check_iterable("micro_batches", micro_batches, "a list of what forward takes")
    if not (hasattr(forward, "prefix") and hasattr(forward, "rows")):
        check_callable("forward", forward, "a function of a micro-batch")
    if no_sync is not None:
        check_callable("no_sync", no_sync, "a function that gives a context")


def _trained(parameters: Any) -> list[Tensor] | None:
    if parameters is None:
        return None
    check_iterable("parameters", parameters, "tensors")
    found = [*parameters]
    for i, p in enumerate(found):
        check_kind(f"parameters[{i}]", p, Tensor, "a tensor")
    return [p for p in found if p.requires_grad]


def _check(strategy: str, micro_batches: Any, scale: float | Tensor, leaves: list[Tensor] | None) -> None:
    one_of("strategy", strategy, STRATEGIES)
    if isinstance(micro_batches, Iterator):
        got = type(micro_batches).__name__
        raise TypeError(f"micro_batches must be a list or another iterable that can be iterated twice; got a {got}")
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(f"scale must be a number or a tensor of one; got shape {tuple(scale.shape)}")
    if not isinstance(scale, Tensor):
        check_number("scale", scale)
    if leaves is not None and not (leaves and all(p.is_leaf for p in leaves)):
        raise ValueError("parameters must be leaves, at least one of which requires grad")
    if leaves is not None and any(map(is_dtensor, leaves)):
        raise ValueError(
            "parameters must be None, and strategy 'two_pass', for a model sharded by FSDP2 or tensor parallelism: its"
            " parameters are not the leaves of the graph; got DTensors"
        )


def _count(micro_batches: Any) -> int:
    return len(micro_batches) if isinstance(micro_batches, Sized) else sum(1 for _ in micro_batches)


def calls_of(parts: Iterable[Any]) -> list[int]:
    """The calls of micro-batches and SharedPrompts, forward and backward: how many before the first prompt, from it on,
    from the second on, and so forth. Each micro-batch is one, and each prompt another one for its own backward.
    """
    calls = [0]
    for item in parts:
        part = item if isinstance(item, SharedPrompt) else SharedPrompt(None, [item])
        if part.prompt is not None:
            calls.append(1)
        calls[-1] += len(part.micro_batches)
    return calls


def forward_parts(
    micro_batches: Iterable[M | SharedPrompt],
    forward: Callable[[M], Sequence[Tensor]] | SharedForward,
    *,
    no_sync: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Every micro-batch forward, and nothing else: (token_logps (T,), cu_seqlens (S+1,), auxiliary losses).

    It scores a reference or, where gradients are on, makes the graph of a whole step, prompts included. Arguments and
    errors are those of `group_backward`; `no_sync` is around every forward but the last.
    """
    _check_kinds(micro_batches, forward, no_sync)
    quiet = contextlib.nullcontext if no_sync is None else no_sync
    runs: list[_Run] = []
    for part, last in _parts(micro_batches, forward):
        prefix: Sequence[Tensor | None] = ()
        if part.prompt is not None:
            with quiet():
                prefix = _checked_prefix(forward.prefix(part.prompt))  # type: ignore[union-attr]
        for micro_batch, ends in _marking_last(part.micro_batches):
            with contextlib.nullcontext() if last and ends else quiet():
                runs.append(_checked_run(_rows(forward, prefix, micro_batch), len(runs)))
    if not runs:
        raise ValueError("micro_batches must hold at least one; got none")
    token_logps = torch.cat([run.token_logps for run in runs])
    return token_logps, _joined(runs), [run.auxiliary for run in runs if run.auxiliary is not None]


def _parts(micro_batches: Iterable[Any], forward: Any) -> Iterator[tuple[SharedPrompt, bool]]:
    """Yields each prompt with its micro-batches (None with one that has no prompt), and whether it is the last."""
    for item, last in _marking_last(micro_batches):
        part = item if isinstance(item, SharedPrompt) else SharedPrompt(None, [item])
        if part.prompt is not None and not (hasattr(forward, "prefix") and hasattr(forward, "rows")):
            got = getattr(forward, "__name__", type(forward).__name__)
            raise TypeError(f"forward must have the methods prefix and rows for a SharedPrompt; got {got}")
        if not part.micro_batches:
            raise ValueError("micro_batches must hold at least one for each SharedPrompt; got none")
        yield part, last


def _rows(forward: Any, prefix: Sequence[Tensor | None], micro_batch: Any) -> Any:
    return forward.rows(micro_batch, prefix) if hasattr(forward, "rows") else forward(micro_batch)


def _checked_prefix(tensors: Any) -> Sequence[Tensor | None]:
    if not isinstance(tensors, (tuple, list)) or not all(x is None or isinstance(x, Tensor) for x in tensors):
        raise TypeError(f"forward.prefix must give a tuple of tensors or None; got {type(tensors).__name__}")
    return tensors


def _checked_run(outputs: Any, at: int) -> _Run:
    """What forward returned for micro-batch `at`, after a check of its number and shapes."""
    what = f"forward(micro_batches[{at}])"
    if not isinstance(outputs, (tuple, list)) or len(outputs) not in (2, 3):
        got = f"{len(outputs)} items" if isinstance(outputs, (tuple, list)) else type(outputs).__name__
        raise TypeError(f"{what} must be (token_logps, cu_seqlens) or those and an auxiliary loss; got {got}")
    token_logps, cu_seqlens, auxiliary = (*outputs, None)[:3]
    if auxiliary is not None and auxiliary.numel() != 1:
        raise ValueError(f"{what}[2], the auxiliary loss, must be a scalar; got shape {tuple(auxiliary.shape)}")
    sums = seq_logps(token_logps, cu_seqlens)
    return _Run(token_logps, cu_seqlens.long(), sums, auxiliary)  # int64: a narrower dtype may not hold all tokens


def _joined(runs: list[_Run]) -> Tensor:  # (S+1,) int64
    """The offsets of all runs' sequences in their joined token_logps."""
    offsets, T = [runs[0].cu_seqlens[:1]], 0
    for run in runs:
        offsets.append(run.cu_seqlens[1:] + T)
        T += run.size[1]
    return torch.cat(offsets)


class _Run(NamedTuple):
    """The results of forward for one micro-batch."""

    token_logps: Tensor  # (t,)
    cu_seqlens: Tensor  # (s+1,)
    seq_logps: Tensor  # (s,)
    auxiliary: Tensor | None  # ()

    @property
    def size(self) -> tuple[int, int]:
        return self.seq_logps.shape[0], self.token_logps.shape[0]


class _Prefix:
    """The tensors of a shared prompt, and leaves of the same values, at which its micro-batches add their gradients.

    without_graph: the tensors come without their graph, which `again` brings.
    """

    def __init__(self, tensors: Sequence[Tensor | None], without_graph: bool = False) -> None:
        self.tensors = tensors
        trains = [x for x in tensors if x is not None and (x.is_floating_point() if without_graph else x.requires_grad)]
        copies = {x: x.detach().requires_grad_() for x in trains}
        self.roots, self.leaves = [*copies], [*copies.values()]
        self.detached = [None if x is None else copies.get(x, x) for x in tensors]

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        return [(x, leaf.grad) for x, leaf in zip(self.roots, self.leaves) if leaf.grad is not None]

    def again(self, tensors: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
        """The same tensors with their graph, each with its gradient."""
        if len(tensors) != len(self.tensors):
            raise ValueError(
                f"forward.prefix must give the same tensors when called again; got {len(self.tensors)}, and then"
                f" {len(tensors)}"
            )
        pairs = {x: leaf for x, leaf in zip(tensors, self.detached) if x is not None and leaf is not None}
        trains = {x: leaf.grad for x, leaf in pairs.items() if x.requires_grad}
        return [(x, torch.zeros_like(x) if gradient is None else gradient) for x, gradient in trains.items()]


@dataclass(frozen=True)
class _Step:
    """The arguments of group_backward, and what both strategies do with them."""

    micro_batches: Iterable[Any]
    forward: Any
    groups: PreferenceGroups
    objective: Objective
    ref_logps: Tensor | None
    scale: float | Tensor
    leaves: list[Tensor] | None
    no_sync: Callable[[], contextlib.AbstractContextManager[Any]] | None
    gradient_bytes: int
    ranks: Ranks

    @contextlib.contextmanager
    def sync(self, last: bool) -> Iterator[None]:
        with self.ranks.syncing(last), contextlib.nullcontext() if last or self.no_sync is None else self.no_sync():
            yield

    def parts(self) -> Iterator[tuple[SharedPrompt, bool]]:
        return _parts(self.micro_batches, self.forward)

    def prefix(self, prompt: Any, at: int) -> Sequence[Tensor | None]:
        """Calls forward.prefix on the prompt of micro-batch `at` and those after it; () where it has none."""
        if prompt is None:
            return ()
        with self.ranks.watching() if at == 0 else contextlib.nullcontext():
            tensors = self.ranks.call(self.forward.prefix, prompt)
        return _checked_prefix(tensors)

    def prefix_with_graph(self, prompt: Any, at: int) -> _Prefix:
        # Autocast caches casts of the weights: those of pass 1 have no graph, and a backward frees that of others.
        torch.clear_autocast_cache()
        with self.sync(last=False) if prompt is not None else contextlib.nullcontext():
            return _Prefix(self.prefix(prompt, at))

    def run(self, micro_batch: Any, at: int, prefix: Sequence[Tensor | None] = ()) -> _Run:
        """Calls forward on one micro-batch, and checks the number and shapes of its results."""
        with self.ranks.watching() if at == 0 else contextlib.nullcontext():
            outputs = self.ranks.call(functools.partial(_rows, self.forward, prefix), micro_batch)
        return _checked_run(outputs, at)

    def run_for_others(self, smallest: SharedPrompt) -> list[Tensor]:
        """Runs a prompt, or the one micro-batch without a prompt, as another rank runs one; returns what requires grad.

        A rank that has nothing left to run does this where each forward is a collective call.
        """
        if smallest.prompt is not None:
            found = _checked_prefix(self.ranks.call(self.forward.prefix, smallest.prompt))
        else:
            run = self.run(smallest.micro_batches[0], -1)
            found = (run.token_logps, run.auxiliary)
        return [x for x in found if x is not None and x.requires_grad]

    def check_copies(self, leaves: list[Tensor], of_prompts: int) -> None:
        """ValueError unless the S gradients of the leaves, and `of_prompts` bytes of gradients of shared prompts, fit
        gradient_bytes, and no leaf has hooks of its own.
        """
        S, size = self.groups.num_sequences, sum(p.numel() * p.element_size() for p in leaves)
        if S * size + of_prompts > self.gradient_bytes:
            more = f" and {of_prompts:,} bytes for the prompts they share" if of_prompts else ""
            raise ValueError(
                f"one_pass keeps {S} gradients of {size:,} bytes{more}, more than gradient_bytes ="
                f" {self.gradient_bytes:,}: raise it, train fewer parameters (LoRA), or take two_pass"
            )
        if any(p._backward_hooks for p in leaves):
            raise ValueError("one_pass cannot run a parameter's register_hook once per step: take two_pass")

    def loss(self, run_all: Callable[[], list[_Run]]) -> tuple[PreferenceLoss, tuple[Tensor, ...]]:
        """Runs the micro-batches: their loss together, and scale * d loss / d token_logps, split again."""
        with self.ranks.failing_together():
            runs = run_all()
            S, found = self.groups.num_sequences, sum(run.size[0] for run in runs)
            if found != S:
                raise ValueError(f"micro_batches must hold the {S} sequences of groups; these {len(runs)} hold {found}")
            if not self.groups.spans:
                return self._loss(runs)
        return self._loss(runs)  # a collective call that raises on all ranks by itself

    def _loss(self, runs: list[_Run]) -> tuple[PreferenceLoss, tuple[Tensor, ...]]:
        with torch.enable_grad():
            token_logps = torch.cat([run.token_logps.detach() for run in runs]).requires_grad_()
            result = preference_loss(token_logps, _joined(runs), self.groups, self.objective, self.ref_logps)
            (d_token_logps,) = torch.autograd.grad(self.scale * result.loss, token_logps)
        return result._replace(loss=result.loss.detach()), d_token_logps.split([run.size[1] for run in runs])


def _two_pass(step: _Step) -> PreferenceLoss:
    first = _FirstPass(step)
    result, gradients = step.loss(first.run_all)
    second = _SecondPass(step, first, gradients)
    step.ranks.again = True
    error: Exception | None = None
    drift = 0.0
    try:
        second.run_all()
    except Exception as raised:
        if not step.ranks.forwards_apart:  # the other ranks may wait in a collective call of the model
            raise
        error = raised
    finally:
        first.after.restore()
    if error is None:
        error = second.incomplete()
    if error is None:
        drift = _drift(first.runs, second.seq_logps, first.tapes)
    _warn_of(step.ranks.close(drift, error))
    return result


class _FirstPass:
    """Runs every micro-batch without a graph, and keeps what the second pass needs to repeat it.

    A prompt that is the only one runs once for both passes: the second would have its graph alive all the time anyway.
    With other ranks it does not: under FSDP and ZeRO no graph may be alive while others run, and the first forward with
    a graph through DistributedDataParallel, a collective call, must be in pass 2 on all ranks.
    """

    def __init__(self, step: _Step) -> None:
        self.step = step
        self.runs: list[_Run] = []
        self.tapes: list[LseTape] = []
        self.states: list[RandomState] = []  # before each micro-batch
        self.prompt_states: list[RandomState] = []  # before each part
        self.smallest: Any = None  # a SharedPrompt of what takes least to run by itself
        self._sizes: list[tuple[bool, int]] = []
        self.prefix: _Prefix | None = None  # of the only prompt, with its graph
        self.with_graph = torch.is_grad_enabled()

    def run_all(self) -> list[_Run]:
        with torch.no_grad():
            for part, last in self.step.parts():
                self.run(part, alone=last and not self.runs)
            self.after = RandomState()
            for _ in range(self.step.ranks.missing()):
                self.step.run_for_others(self.smallest)
        return self.runs

    def run(self, part: SharedPrompt, alone: bool) -> None:
        before = RandomState()  # 5 kB
        self.prompt_states.append(before)
        if alone and part.prompt is not None and self.step.ranks.free:
            with torch.set_grad_enabled(self.with_graph):
                self.prefix = self.step.prefix_with_graph(part.prompt, 0)
        prefix = self.prefix.detached if self.prefix else self.step.prefix(part.prompt, len(self.runs))
        if part.prompt is not None:
            self._note(part, sum(x.numel() for x in prefix if x is not None))
        for k, micro_batch in enumerate(part.micro_batches):
            self.states.append(before if k == 0 and part.prompt is None else RandomState())
            self.tapes.append(LseTape())
            with self.tapes[-1].record():
                self.runs.append(self.step.run(micro_batch, len(self.runs), prefix))
            if part.prompt is None:
                self._note(SharedPrompt(None, [micro_batch]), self.runs[-1].size[1])

    def _note(self, part: SharedPrompt, size: int) -> None:
        """Notes what takes least: the micro-batch of the fewest tokens or, if all have prompts, the shortest prompt."""
        self._sizes.append((part.prompt is not None, size))
        if self._sizes[-1] == min(self._sizes):
            self.smallest = part


class _SecondPass:
    """Runs every micro-batch again, with its graph, and each backward. No graph outlives `run`.

    Where forwards are collective calls, a forward and its backward are never apart: a prompt runs without a graph for
    its micro-batches, and once more, with its graph, after the last of them. What a rank has fewer than others it adds
    before its next prompt, with gradients of zero.
    """

    def __init__(self, step: _Step, first: _FirstPass, gradients: Sequence[Tensor]) -> None:
        self.step, self.first = step, first
        self.gradients = gradients  # of each micro-batch's token_logps
        self.seq_logps: list[Tensor] = []
        self.parts = self.section = 0
        self.calls = 0  # forwards with a backward so far, where these are counted
        self.reached = False  # whether a backward has run

    def run_all(self) -> None:
        for part, last in self.step.parts():
            self.run(part, last)
        self.finish()

    def incomplete(self) -> Exception | None:
        """The error of a pass that has run to its end, but did not see all micro-batches, or nothing that trains."""
        if len(self.seq_logps) != len(self.first.runs):
            return ValueError(f"{_AGAIN}; there were {len(self.first.runs)}, and then {len(self.seq_logps)}")
        return None if self.reached else ValueError(_NO_GRAPH)

    def run(self, part: SharedPrompt, last: bool) -> None:
        step, first = self.step, self.first
        if self.parts == len(first.prompt_states) or len(self.seq_logps) == len(first.runs):
            raise ValueError(f"{_AGAIN}; there were {len(first.runs)}, and then more")
        again = part.prompt is not None and step.ranks.counted
        if again:
            self._complete_section()
        before = first.prompt_states[self.parts]
        before.restore()
        self.parts += 1
        if again:
            with torch.no_grad():
                prefix = _Prefix(step.prefix(part.prompt, len(self.seq_logps)), without_graph=True)
        else:
            prefix = first.prefix or step.prefix_with_graph(part.prompt, len(self.seq_logps))
        for micro_batch, ends in _marking_last(part.micro_batches):
            at = len(self.seq_logps)
            if at == len(first.runs):
                raise ValueError(f"{_AGAIN}; there were {at}, and then more")
            ends = ends and not again
            torch.clear_autocast_cache()
            first.states[at].restore()
            with self._sync(last and ends):
                with first.tapes[at].replay():
                    run = step.run(micro_batch, at, prefix.tensors if ends else prefix.detached)
                if run.size != first.runs[at].size:
                    was, now = (f"{s} sequences, {t} tokens" for s, t in (first.runs[at].size, run.size))
                    raise ValueError(f"{_AGAIN}; number {at} had {was}, and then {now}")
                self.seq_logps.append(run.seq_logps.detach())
                self._backward(run, self.gradients[at], prefix, ends)
        if again:
            before.restore()
            torch.clear_autocast_cache()
            with self._sync(last):
                self._backward_through(prefix.again(step.prefix(part.prompt, len(self.seq_logps))))

    def finish(self) -> None:
        """Runs what other ranks have run more."""
        ranks = self.step.ranks
        if ranks.sections:
            self._complete_section()
        while self.section < ranks.sections:
            with torch.no_grad():
                self.step.run_for_others(self.first.smallest)
            self._complete_section()

    def _complete_section(self) -> None:
        for _ in range(self.step.ranks.missing(self.section)):
            with self._sync(False):
                roots = self.step.run_for_others(self.first.smallest)
                self._backward_through([(x, torch.zeros_like(x)) for x in roots])
        self.section += 1

    @contextlib.contextmanager
    def _sync(self, last: bool) -> Iterator[None]:
        """A context for a forward and its backward. last: whether it is the last one of this rank."""
        self.calls += 1
        if self.step.ranks.counted:
            last = self.calls == self.step.ranks.all_calls
        with self.step.sync(last):
            yield

    def _backward(self, run: _Run, d_token_logps: Tensor, prefix: _Prefix, ends: bool) -> None:
        """Runs the backward of one micro-batch and, with the last one of a prompt, the prompt's own for all of them."""
        upstream = [(run.token_logps, d_token_logps.to(run.token_logps.dtype))]
        if run.auxiliary is not None:
            upstream.append((run.auxiliary, torch.ones_like(run.auxiliary) * self.step.scale))
        live = [(x, g) for x, g in upstream if x.requires_grad] + (prefix.gradients() if ends else [])
        self._backward_through(live, [] if ends else prefix.leaves)

    def _backward_through(self, live: list[tuple[Tensor, Tensor]], more_leaves: Sequence[Tensor] = ()) -> None:
        """Runs the backward of tensors with these gradients."""
        if not live:
            return
        inputs = self.step.leaves
        if inputs is not None and not self.reached:
            _check_reachable([x for x, _ in live])
        if inputs is not None:
            inputs = [*inputs, *more_leaves]
        torch.autograd.backward([x for x, _ in live], [g for _, g in live], inputs=inputs)
        self.reached = True


_AGAIN = "micro_batches must give the same micro-batches when iterated again"
_NO_GRAPH = "forward must give token_logps that require grad: nothing that trains leads to them, or gradients are off"


# Kernels may round differently with a graph and without. A gap above this, relative to 1 + |value|, is not rounding,
# even in bfloat16.
_TOLERANCE = 1e-3


def _drift(runs: list[_Run], again: list[Tensor], tapes: list[LseTape]) -> float:
    """How far pass 2 found other seq_logps, or its LM heads another lse, beyond rounding. It reads one number back,
    after all work is queued.
    """
    first, then = torch.cat([run.seq_logps for run in runs]), torch.cat(again)
    same = (first == then) | (first.isnan() & then.isnan())
    gap = torch.where(same, 0, (first - then).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    gaps = torch.where(gap > _TOLERANCE * (1 + first.abs()), gap, 0)
    return float(torch.cat([gaps, *(tape.drift(_TOLERANCE).to(gaps).reshape(1) for tape in tapes)]).max())


def _warn_of(drift: float) -> None:
    if drift > 0:
        # The text has one digit so that it repeats: Python then shows the warning once, not at each step.
        warnings.warn(
            f"pass 2 does not repeat pass 1: a log-probability differs by {drift:.0e}, and the gradient is off"
            " accordingly. Did parameters change meanwhile, or does forward draw from other generators than torch's"
            " global ones?",
            stacklevel=4,
        )


def _one_pass(step: _Step) -> PreferenceLoss:
    runs: list[_Run] = []
    by_response: dict[Tensor, list[tuple[int, int, Tensor]]] = {}  # target -> (micro-batch, response in it, gradient)
    total: dict[Tensor, Tensor] = {}  # target -> gradient, in at least float32
    shared = False

    def run_all() -> list[_Run]:
        nonlocal shared
        shared = _gradients_by_response(step, runs, by_response, total)
        return runs

    result, d_token_logps = step.loss(run_all)
    # Every token of a response has the same gradient, c. The zero at the end serves a response without a token here.
    c = [
        torch.nn.functional.pad(g, (0, 1))[run.cu_seqlens[:-1].clamp(max=len(g))] for g, run in zip(d_token_logps, runs)
    ]
    for target, kept in by_response.items():
        for at, k, gradient in kept:
            _add(total, target, gradient, c[at][k])
        kept.clear()
    if not total:
        raise ValueError(_NO_GRAPH)
    # The leaves' own accumulation runs the hooks that reduce gradients over ranks. Tensors of a prompt lead to leaves.
    gradients = [g.to(target.dtype) for target, g in total.items()]
    torch.autograd.backward(list(total), gradients, inputs=step.leaves if shared else None)
    return result


def _gradients_by_response(
    step: _Step,
    runs: list[_Run],
    by_response: dict[Tensor, list[tuple[int, int, Tensor]]],
    total: dict[Tensor, Tensor],
) -> bool:
    """Runs each micro-batch forward and each of its responses backward, and fills the three containers given.

    The target of a gradient is a leaf, or a tensor of a shared prompt, whose graph stays alive. Returns whether there
    is one of the second kind.
    """
    of_prompts = 0  # bytes of the gradients of prompts' tensors
    for part, last in step.parts():
        prefix = step.prefix_with_graph(part.prompt, len(runs))
        copies = {*prefix.leaves}
        for micro_batch, ends in _marking_last(part.micro_batches):
            torch.clear_autocast_cache()
            with step.sync(last and ends):
                run = step.run(micro_batch, len(runs), prefix.detached)
                # Without a sequence it takes part in the reduction of gradients, with zeros.
                scored = run.seq_logps.unbind() or (run.token_logps.sum(),)
                roots = [x for x in (*scored, run.auxiliary) if x is not None and x.requires_grad]
                leaves = [x for x in step.leaves or _leaves(roots) if x not in copies]
                if step.leaves is not None and not runs:
                    _check_reachable(roots)
                of_prompts += run.size[0] * sum(x.nbytes for x in prefix.leaves)
                step.check_copies(leaves, of_prompts)
                for k, root in enumerate(roots):
                    more = k < len(roots) - 1
                    gradients = torch.autograd.grad(
                        root.sum(), [*leaves, *prefix.leaves], retain_graph=more, allow_unused=True
                    )
                    for target, gradient in zip([*leaves, *prefix.roots], gradients):
                        if gradient is not None and k < run.size[0]:
                            by_response.setdefault(target, []).append((len(runs), k, gradient))
                        elif gradient is not None:
                            _add(total, target, gradient, step.scale)
            runs.append(_Run(run.token_logps.detach(), run.cu_seqlens, run.seq_logps.detach(), None))
    return of_prompts > 0


def _add(total: dict[Tensor, Tensor], leaf: Tensor, gradient: Tensor, factor: Tensor | float) -> None:
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    wide = wide * (factor.to(wide.device, wide.dtype) if isinstance(factor, Tensor) else factor)
    total[leaf] = total[leaf].add_(wide) if leaf in total else wide


def _marking_last(items: Iterable[M]) -> Iterator[tuple[M, bool]]:
    """Yields each item, and whether it is the last one."""
    iterator = iter(items)
    for item in iterator:
        for following in iterator:
            yield item, False
            item = following
        yield item, True


def _leaves(roots: list[Tensor]) -> list[Tensor]:
    """All leaves that a backward from `roots` would fill."""
    return list(dict.fromkeys(node.variable for node in _nodes(roots) if hasattr(node, "variable")))  # AccumulateGrad


def _check_reachable(roots: list[Tensor]) -> None:
    """ValueError for reentrant checkpoints. They hide the leaves inside them from a backward that is told its leaves:
    those gradients would be missing, without an error where no leaf comes before the checkpoint (LoRA).
    """
    if any(node.name() == "CheckpointFunctionBackward" for node in _nodes(roots)):
        raise ValueError(
            "forward must not use reentrant checkpoints where parameters is given: take use_reentrant=False, or"
            " two_pass with parameters=None"
        )


def _nodes(roots: list[Tensor]) -> Iterator[Any]:
    """Yields every node of the graph behind `roots` once."""
    seen: set[Any] = set()
    stack = [torch.autograd.graph.get_gradient_edge(x).node for x in roots]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack += [parent for parent, _ in node.next_functions if parent is not None]


STRATEGIES: dict[str, Callable[[_Step], PreferenceLoss]] = {"two_pass": _two_pass, "one_pass": _one_pass}
