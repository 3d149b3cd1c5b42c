"""The backward of a group of responses at the memory of one micro-batch: the chain rule at the vector of seq_logps.

A preference loss depends on the parameters through seq_logps s alone. So with c = d loss / d s its gradient is that of
sum_i c_i s_i, and a sum splits over micro-batches anywhere.

    two_pass    It runs every micro-batch forward without a graph, which gives the loss and c, then each forward and
                backward. It takes the memory of one micro-batch, whatever the group size, and one more forward of the
                model, but not of its LM head: pass 2 is given the lse (log-sum-exp of the logits) of pass 1.
    one_pass    It runs each micro-batch forward once, each response backward by itself, and combines these gradients
                with c. It saves the second forward but keeps S copies of the gradient, so it suits few trainable
                parameters (LoRA) and micro-batches of one response: each backward walks its whole micro-batch's graph.

Both give the gradient of the whole group, dropout included: two_pass saves the random state of each micro-batch and
replays it. Gradients are of first order only. distributed.py describes several processes.
It never keeps the graph of a whole group, knows a loss or a model, or hides a loss that is not finite.
It needs a forward that depends on its micro-batch, on parameters that stay as they are during the call, and on torch's
global random state, nothing else; two_pass compares its passes and warns.
The source is GroupDPO (arXiv 2604.15602); docs/math.md, section 4, derives the method.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..distributed import Ranks, is_dtensor
from ..replay import LseTape, RandomState
from .groups import PreferenceGroups
from .objective import Objective, PreferenceLoss, preference_loss
from .segments import seq_logps

M = TypeVar("M")


def group_backward(
    micro_batches: Iterable[M],
    forward: Callable[[M], Sequence[Tensor]],
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
        micro_batches: a list, or anything else that gives the same micro-batches each time it is iterated.
        forward: micro-batch -> (token_logps (t,), cu_seqlens (s+1,)), or with a third item, a scalar auxiliary loss
            that is added as it is, times `scale`. The sequences of all micro-batches, in order, are those of
            `groups`; a micro-batch may hold parts of several groups.
        groups, objective, ref_logps: as in `preference_loss`.
        strategy: "two_pass" or "one_pass"; the module's docstring compares them.
        scale: factor on the gradient, not on the result: 1 / accumulation steps, or the scale of a gradient scaler.
        parameters: the leaves whose .grad is filled. None takes all that the graph leads to.
        no_sync: the context of every micro-batch but the last, in which gradients are not reduced. None takes that of
            the wrapper: `ddp.no_sync`, or DeepSpeed's set_gradient_accumulation_boundary.
        gradient_bytes: the most bytes that the S copies of the gradient may take in one_pass.
        model: the wrapper that forward calls, so that ranks agree before anything runs and hear of errors in the
            arguments. None waits until forward calls the wrapper.
        process_group: the ranks that must agree. None takes those of the wrapper; without a wrapper no rank talks to
            another. A wrapper other than DistributedDataParallel, FSDP and DeepSpeed needs a process_group.

    With several processes, every rank calls group_backward with groups of its own. Wrappers average the gradient over
    ranks, so it is that of one process with all groups where ranks have equally many (else pass scale = ranks * own
    groups / all groups). Under FSDP and DeepSpeed each micro-batch is a collective call, so a rank with fewer of them
    runs its smallest one again with weight zero. one_pass works with DistributedDataParallel alone.

    Returns the PreferenceLoss, detached, without auxiliary losses. A loss that is not finite comes out as it is, and so
    do its gradients. A module that counts its forwards (batch normalisation) counts both passes.

    Raises ValueError or TypeError for what preference_loss refuses, for micro-batches that cannot be iterated twice or
    do not hold the sequences of groups, for a forward that returns something else, for reentrant checkpoints with
    `parameters`, for parameters or one_pass where FSDP or DeepSpeed shards, for ranks with different strategies. Before
    pass 2 an error of one rank is raised on all (under FSDP and ZeRO-3 not if forward itself raised it). It warns if
    pass 2 does not repeat pass 1.
    """
    names = list(STRATEGIES)
    at = names.index(strategy) if strategy in names else -1
    ranks = Ranks(process_group, lambda: _count(micro_batches), at, strategy == "one_pass", no_sync is not None)
    wrong: Exception | None = None
    leaves = None if parameters is None else [p for p in parameters if p.requires_grad]
    try:
        _check(strategy, micro_batches, scale, leaves)
    except (ValueError, TypeError) as error:
        wrong = error
    ranks.begin(model, wrong)
    step = _Step(micro_batches, forward, groups, objective, ref_logps, scale, leaves, no_sync, gradient_bytes, ranks)
    return STRATEGIES[strategy](step)


def _check(strategy: str, micro_batches: Any, scale: float | Tensor, leaves: list[Tensor] | None) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}")
    if isinstance(micro_batches, Iterator):
        got = type(micro_batches).__name__
        raise TypeError(f"micro_batches must be a list or another iterable that can be iterated twice; got a {got}")
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(f"scale must be a number or a tensor of one; got shape {tuple(scale.shape)}")
    if leaves is not None and not (leaves and all(p.is_leaf for p in leaves)):
        raise ValueError("parameters must be leaves, at least one of which requires grad")
    if leaves is not None and any(map(is_dtensor, leaves)):
        raise ValueError(
            "parameters must be None, and strategy 'two_pass', for a model sharded by FSDP2 or tensor parallelism: its"
            " parameters are not the leaves of the graph; got DTensors"
        )


def _count(micro_batches: Any) -> int:
    return len(micro_batches) if isinstance(micro_batches, Sized) else sum(1 for _ in micro_batches)


class _Run(NamedTuple):
    """The results of forward for one micro-batch."""

    token_logps: Tensor  # (t,)
    cu_seqlens: Tensor  # (s+1,)
    seq_logps: Tensor  # (s,)
    auxiliary: Tensor | None  # ()

    @property
    def size(self) -> tuple[int, int]:
        return self.seq_logps.shape[0], self.token_logps.shape[0]


@dataclass(frozen=True)
class _Step:
    """The arguments of group_backward, and what both strategies do with them."""

    micro_batches: Iterable[Any]
    forward: Callable[[Any], Sequence[Tensor]]
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

    def run(self, micro_batch: Any, at: int) -> _Run:
        """Calls forward on one micro-batch, and checks the number and shapes of its results."""
        with self.ranks.watching() if at == 0 else contextlib.nullcontext():
            outputs = self.ranks.call(self.forward, micro_batch)
        what = f"forward(micro_batches[{at}])"
        if not isinstance(outputs, (tuple, list)) or len(outputs) not in (2, 3):
            got = f"{len(outputs)} items" if isinstance(outputs, (tuple, list)) else type(outputs).__name__
            raise TypeError(f"{what} must be (token_logps, cu_seqlens) or those and an auxiliary loss; got {got}")
        token_logps, cu_seqlens, auxiliary = (*outputs, None)[:3]
        if auxiliary is not None and auxiliary.numel() != 1:
            raise ValueError(f"{what}[2], the auxiliary loss, must be a scalar; got shape {tuple(auxiliary.shape)}")
        sums = seq_logps(token_logps, cu_seqlens)
        return _Run(token_logps, cu_seqlens.long(), sums, auxiliary)  # int64: a narrower dtype may not hold all tokens

    def check_copies(self, leaves: list[Tensor]) -> None:
        """ValueError unless the S gradients of the leaves fit gradient_bytes and no leaf has hooks of its own."""
        S, size = self.groups.num_sequences, sum(p.numel() * p.element_size() for p in leaves)
        if S * size > self.gradient_bytes:
            raise ValueError(
                f"one_pass keeps {S} gradients of {size:,} bytes, more than gradient_bytes = {self.gradient_bytes:,}:"
                " raise it, train fewer parameters (LoRA), or take two_pass"
            )
        if any(p._backward_hooks for p in leaves):
            raise ValueError("one_pass cannot run a parameter's register_hook once per step: take two_pass")

    def loss(self, runs: list[_Run]) -> tuple[PreferenceLoss, tuple[Tensor, ...]]:
        """The loss of all micro-batches together, and scale * d loss / d token_logps, split again."""
        S, found = self.groups.num_sequences, sum(run.size[0] for run in runs)
        if found != S:
            raise ValueError(f"micro_batches must hold the {S} sequences of groups; these {len(runs)} hold {found}")
        offsets, T = [runs[0].cu_seqlens[:1]], 0
        for run in runs:
            offsets.append(run.cu_seqlens[1:] + T)
            T += run.size[1]
        with torch.enable_grad():
            token_logps = torch.cat([run.token_logps.detach() for run in runs]).requires_grad_()
            result = preference_loss(token_logps, torch.cat(offsets), self.groups, self.objective, self.ref_logps)
            (d_token_logps,) = torch.autograd.grad(self.scale * result.loss, token_logps)
        return result._replace(loss=result.loss.detach()), d_token_logps.split([run.size[1] for run in runs])


def _two_pass(step: _Step) -> PreferenceLoss:
    first: list[_Run] = []
    states: list[RandomState] = []
    tapes: list[LseTape] = []
    smallest: Any = None
    with step.ranks.failing_together():
        with torch.no_grad():
            for at, micro_batch in enumerate(step.micro_batches):
                states.append(RandomState())
                tapes.append(LseTape())
                with tapes[at].record():
                    first.append(step.run(micro_batch, at))
                if first[at].size[1] <= min(run.size[1] for run in first):
                    smallest = micro_batch
            after = RandomState()
            for _ in range(step.ranks.missing):
                step.run(smallest, len(first))
        result, gradients = step.loss(first)
    again: list[Tensor] = []
    reached = False
    try:
        for at, micro_batch in enumerate(step.micro_batches):
            if at == len(first):
                raise ValueError(f"{_AGAIN}; there were {at}, and then more")
            # Autocast caches casts of the weights: those of pass 1 have no graph, and a backward frees that of others.
            torch.clear_autocast_cache()
            states[at].restore()
            with step.sync(last=at == len(first) - 1 and step.ranks.missing == 0):
                with tapes[at].replay():
                    run = step.run(micro_batch, at)
                if run.size != first[at].size:
                    was, now = (f"{s} sequences, {t} tokens" for s, t in (first[at].size, run.size))
                    raise ValueError(f"{_AGAIN}; number {at} had {was}, and then {now}")
                again.append(run.seq_logps.detach())
                upstream = [(run.token_logps, gradients[at].to(run.token_logps.dtype))]
                if run.auxiliary is not None:
                    upstream.append((run.auxiliary, torch.ones_like(run.auxiliary) * step.scale))
                live = [(x, g) for x, g in upstream if x.requires_grad]
                if live:
                    if step.leaves is not None and not reached:
                        _check_reachable([x for x, _ in live])
                    torch.autograd.backward([x for x, _ in live], [g for _, g in live], inputs=step.leaves)
                    reached = True
        for left in reversed(range(step.ranks.missing if reached else 0)):
            with step.sync(last=left == 0):
                run = step.run(smallest, len(first))
                live = [(x, torch.zeros_like(x)) for x in (run.token_logps, run.auxiliary) if x is not None]
                live = [(x, g) for x, g in live if x.requires_grad]
                torch.autograd.backward([x for x, _ in live], [g for _, g in live], inputs=step.leaves)
    finally:
        after.restore()
    if len(again) != len(first):
        raise ValueError(f"{_AGAIN}; there were {len(first)}, and then {len(again)}")
    if not reached:
        raise ValueError(_NO_GRAPH)
    _warn_of_drift(result.seq_logps, torch.cat(again), tapes)
    return result


_AGAIN = "micro_batches must give the same micro-batches when iterated again"
_NO_GRAPH = "forward must give token_logps that require grad: nothing that trains leads to them, or gradients are off"


# Kernels may round differently with a graph and without. A gap above this, relative to 1 + |value|, is not rounding,
# even in bfloat16.
_TOLERANCE = 1e-3


def _warn_of_drift(first: Tensor, again: Tensor, tapes: list[LseTape]) -> None:
    """Warns if pass 2 found other seq_logps, or its LM heads another lse. It reads one number back, after all work is
    queued.
    """
    again = again.to(first.dtype)
    same = (first == again) | (first.isnan() & again.isnan())
    gap = torch.where(same, 0, (first - again).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    gaps = [torch.where(gap > _TOLERANCE * (1 + first.abs()), gap, 0).max()]
    drift = float(torch.stack([x.to(gaps[0]) for x in (*gaps, *(tape.drift(_TOLERANCE) for tape in tapes))]).max())
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
    by_response: dict[Tensor, list[tuple[int, int, Tensor]]] = {}  # leaf -> (micro-batch, response in it, gradient)
    total: dict[Tensor, Tensor] = {}  # leaf -> gradient, in at least float32
    with step.ranks.failing_together():
        _gradients_by_response(step, runs, by_response, total)
        result, d_token_logps = step.loss(runs)
    # Every token of a response has the same gradient, c. The clamp serves an empty response, whose c is NaN already.
    c = [g[run.cu_seqlens[:-1].long().clamp(max=g.shape[0] - 1)] for g, run in zip(d_token_logps, runs)]
    for leaf, kept in by_response.items():
        for at, k, gradient in kept:
            _add(total, leaf, gradient, c[at][k])
        kept.clear()
    if not total:
        raise ValueError(_NO_GRAPH)
    # The leaves' own accumulation runs the hooks that reduce gradients over ranks.
    torch.autograd.backward(list(total), [g.to(leaf.dtype) for leaf, g in total.items()])
    return result


def _gradients_by_response(
    step: _Step,
    runs: list[_Run],
    by_response: dict[Tensor, list[tuple[int, int, Tensor]]],
    total: dict[Tensor, Tensor],
) -> None:
    """Runs each micro-batch forward and each of its responses backward, and fills the three containers given."""
    for at, (micro_batch, last) in enumerate(_marking_last(step.micro_batches)):
        torch.clear_autocast_cache()
        with step.sync(last):
            run = step.run(micro_batch, at)
            roots = [x for x in (*run.seq_logps.unbind(), run.auxiliary) if x is not None and x.requires_grad]
            leaves = step.leaves or _leaves(roots)
            if step.leaves is not None and at == 0:
                _check_reachable(roots)
            step.check_copies(leaves)
            for k, root in enumerate(roots):
                gradients = torch.autograd.grad(root.sum(), leaves, retain_graph=k < len(roots) - 1, allow_unused=True)
                for leaf, gradient in zip(leaves, gradients):
                    if gradient is not None and k < run.size[0]:
                        by_response.setdefault(leaf, []).append((at, k, gradient))
                    elif gradient is not None:
                        _add(total, leaf, gradient, step.scale)
        runs.append(_Run(run.token_logps.detach(), run.cu_seqlens, run.seq_logps.detach(), None))


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
