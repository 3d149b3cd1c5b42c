"""The second pass with a known lse: the same values and gradients without the head's forward, and drift that tells."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from groupdpo_kernels import Objective, PreferenceGroups, group_backward, linear_logp_stats, linear_logps, replay
from groupdpo_kernels.lm_head import ops
from groupdpo_kernels.replay import LseTape
from groupdpo_kernels.testing import Case, Inputs, check_budget, make_inputs, run, triton_on_cpu

CASES = [
    Case("plain", 33, 24, 300, "", ignored="none"),
    Case("everything", 21, 40, 130, "", torch.bfloat16, True, 5, 1.3, 12.0, 0.8, leading=(3, 7)),
    Case("half", 18, 16, 70, "", torch.float16, temperature=0.7, ignored="most"),
    Case("small_workspace", 40, 24, 200, "", torch.bfloat16, True, workspace_bytes=2**13),
    Case("all_ignored", 6, 8, 20, "", ignored="all"),
]
IMPLS = ("reference", "cpu", "triton")
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_impl = pytest.mark.parametrize("impl", IMPLS)


@contextlib.contextmanager
def able(impl: str) -> Iterator[None]:
    with triton_on_cpu(16, 64, 32, tma=True) if impl == "triton" else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def no_head_forward(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any) -> Any:
        raise AssertionError("the head's forward has run")

    with monkeypatch.context() as patch:
        patch.setattr(ops, "linear_logps_forward", refuse)
        yield


def arguments(inputs: Inputs, case: Case, impl: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    options = {name: getattr(case.options, name) for name in ("logit_scale", "softcap", "temperature")}
    options |= {"workspace_bytes": case.workspace_bytes, "low_rank": inputs.low_rank, "impl": impl}
    return (inputs.hidden, inputs.weight, inputs.targets, inputs.bias), options


@by_case
@by_impl
def test_the_same_without_the_forward(case: Case, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values within the error budget; gradients are functions of the lse alone: the same bits."""
    inputs, tape = make_inputs(case), LseTape()
    positional, options = arguments(inputs, case, impl)
    leaves = list(inputs.leaves.values())

    def gradients(logps: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((logps * inputs.d_token_logps).sum(), leaves)

    with able(impl):
        with torch.no_grad(), tape.record():
            first = linear_logps(*positional, **options)
        expected = gradients(linear_logps(*positional, **options))
        with no_head_forward(monkeypatch), tape.replay():
            again = linear_logps(*positional, **options)
        actual = gradients(again)

        def replayed(*_: Any) -> Any:
            with tape.replay():
                return linear_logp_stats(*positional, outputs=("lse",), **options)

        with no_head_forward(monkeypatch):
            check_budget(run(replayed, inputs, case.options), inputs, case.options)
    assert_close(again, first, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, actual, expected))
    assert float(tape.drift(1e-4)) == 0


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_rows_that_are_sure_of_their_target(impl: str) -> None:
    """At p_y = 1 - 1e-4 a logit that is computed again, less the lse of pass 1, has few digits of 1 - p_y."""
    case = Case("sure", 40, 64, 50, "", ignored="none")
    inputs, tape = make_inputs(case), LseTape()
    with torch.no_grad():
        rows = inputs.weight[inputs.targets]
        inputs.hidden.mul_(0.3).add_(11 * rows / rows.square().sum(1, keepdim=True))
    inputs = dataclasses.replace(inputs, d_lse=torch.zeros_like(inputs.d_lse))
    positional, options = arguments(inputs, case, impl)
    with torch.no_grad(), tape.record():
        linear_logps(*positional, **options)

    def replayed(*_: Any) -> Any:
        with tape.replay():
            return linear_logp_stats(*positional, outputs=("lse",), **options)

    check_budget(run(replayed, inputs, case.options), inputs, case.options)


@by_case
@by_impl
def test_the_drift_is_what_the_lse_moved(case: Case, impl: str) -> None:
    inputs, tape = make_inputs(case), LseTape()
    positional, options = arguments(inputs, case, impl)
    with able(impl):
        with torch.no_grad(), tape.record():
            linear_logps(*positional, **options)
        with torch.no_grad():
            inputs.weight[::2] *= 1.5
        with tape.replay():
            linear_logps(*positional, **options).sum().backward()
        (known,) = tape._calls
        now = linear_logp_stats(*positional, outputs=("lse",), **options).lse
    assert known.drift is not None and now is not None
    assert_close(known.drift.double(), now.detach() - known.lse, rtol=1e-4, atol=1e-4)
    assert (case.ignored == "all") == (float(tape.drift(1e-3)) == 0)


def test_what_a_tape_does_not_know_runs_in_full() -> None:
    inputs, tape = make_inputs(Case("plain", 9, 8, 30, "")), LseTape()
    h, w, y = inputs.hidden.detach(), inputs.weight.detach(), inputs.targets
    with tape.record():
        first = [linear_logps(h[:n], w, y[:n]) for n in (9, 4)]
    with tape.replay():
        assert replay.active() is tape
        stats = linear_logp_stats(h, w, y, outputs=("lse", "entropy"))  # more than the lse: in full
        other = linear_logps(h[:5], w, y[:5])  # another shape
        more = linear_logps(h, w, y)  # one call more than there were
    assert replay.active() is None
    assert stats.entropy is not None and stats.entropy.shape == (9,)
    assert torch.equal(stats.token_logps, first[0]) and torch.equal(more, first[0])
    assert torch.equal(other, linear_logps(h[:5], w, y[:5]))


def test_compiled_code_neither_records_nor_replays() -> None:
    torch._dynamo.reset()
    inputs, tape = make_inputs(Case("plain", 9, 8, 30, "")), LseTape()
    compiled = torch.compile(linear_logps, backend="aot_eager", fullgraph=True)
    for mode in (tape.record, tape.replay):
        with mode():
            logps = compiled(inputs.hidden, inputs.weight, inputs.targets)
            assert torch.equal(logps, compiled(inputs.hidden, inputs.weight, inputs.targets))
        assert tape._calls == []
    torch.autograd.grad(logps.sum(), inputs.hidden)


def test_wrong_ids_are_refused_in_the_second_pass_too() -> None:
    inputs, tape = make_inputs(Case("plain", 9, 8, 30, "", ignored="none")), LseTape()
    with tape.record():
        linear_logps(inputs.hidden, inputs.weight, inputs.targets)
    with tape.replay(), pytest.raises(ValueError, match=r"targets must be in \[0, V = 30\).*is 30"):
        linear_logps(inputs.hidden, inputs.weight, inputs.targets.index_fill(0, torch.tensor([3]), 30))


# ------------------------------------------------------------------------------------------------ in group_backward

GROUPS = PreferenceGroups.from_lists([[True, False, False], [False, True]])
LENGTHS = torch.tensor([0, 4, 7, 12, 13, 18])
OBJECTIVE = Objective("mpo", beta=2.0, average=True, nll_weight=1.0, reference_free=True)


def group(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    inputs = make_inputs(Case("group", 18, 16, 50, "", ignored="none"), seed=seed)
    return inputs.hidden, inputs.weight, inputs.targets


def test_one_head_forward_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy and a second head in one forward: each finds its own lse again."""
    hidden, weight, targets = group()
    calls = []
    real = ops.linear_logps_forward

    def counted(*args: Any) -> Any:
        calls.append(args[0].hidden.shape[0])
        return real(*args)

    monkeypatch.setattr(ops, "linear_logps_forward", counted)

    def forward(spans: tuple[int, int]) -> tuple[Tensor, Tensor]:
        t = slice(int(LENGTHS[spans[0]]), int(LENGTHS[spans[1]]))
        policy = linear_logps(hidden[t], weight, targets[t])
        other = linear_logps(hidden[t], weight.flip(0), targets[t])
        return policy - 0.5 * other, LENGTHS[spans[0] : spans[1] + 1] - LENGTHS[spans[0]]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group_backward([(0, 2), (2, 5)], forward, GROUPS, OBJECTIVE)
    assert calls == [7, 7, 11, 11]
    assert hidden.grad is not None and weight.grad is not None


def test_a_drift_that_no_target_shows_is_found() -> None:
    """Only the logits of other tokens move between the passes: seq_logps of pass 2 alone would not tell."""
    hidden, weight, targets = group()
    with torch.no_grad():
        targets.clamp_(max=40)
    passes = []

    def forward(_: int) -> tuple[Tensor, Tensor]:
        passes.append(None)
        if len(passes) == 2:
            with torch.no_grad():
                weight[41:] *= 2
        return linear_logps(hidden, weight, targets), LENGTHS

    with pytest.warns(UserWarning, match="pass 2 does not repeat pass 1: a log-probability differs by"):
        group_backward([0], forward, GROUPS, OBJECTIVE)
