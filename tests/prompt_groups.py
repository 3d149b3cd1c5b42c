"""Groups of random tokens as steps of training, with a shared prompt or without, and the gradients of such a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tiny_models import VOCAB
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from groupdpo_kernels import Objective, PreferenceLoss, forward_parts, group_backward, preference_loss
from groupdpo_kernels.data.batches import PreferenceBatch, TokenGroup
from groupdpo_kernels.models import SharedPromptForward

MPO = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)


def groups_of(*shapes: tuple[int, list[int]], seed: int = 0) -> list[TokenGroup]:
    """Groups of a prompt of p tokens and responses of n tokens each, given as (p, [n, ...])."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> Tensor:
        return torch.randint(10, VOCAB - 10, (n,), generator=generator).int()

    return [
        TokenGroup(tokens(p), [tokens(n) for n in sizes], [i % 2 == 0 for i in range(len(sizes))], row)
        for row, (p, sizes) in enumerate(shapes)
    ]


def ref_logps(step: PreferenceBatch) -> Tensor:  # (S,) float64
    S = step.groups.num_sequences
    return -20 * torch.rand(S, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Takes the gradients away from the model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def run(
    model: nn.Module, step: PreferenceBatch, forward: Any = None, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """seq_logps and gradients of a step, by group_backward."""
    forward = forward or SharedPromptForward(model)
    found: PreferenceLoss = group_backward(step.parts, forward, step.groups, MPO, ref_logps(step), **options)
    return found.seq_logps, gradients_of(model)


def coupled(model: nn.Module, step: PreferenceBatch, forward: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from the graph of everything at once."""
    token_logps, cu_seqlens, auxiliary = forward_parts(step.parts, forward or SharedPromptForward(model))
    found = preference_loss(token_logps, cu_seqlens, step.groups, MPO, ref_logps(step))
    sum(auxiliary, found.loss).backward()
    return found.seq_logps.detach(), gradients_of(model)


def check_same(
    found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], rtol: float = 1e-9
) -> None:
    """Values, and gradients on the scale of the largest one: that of a bias on keys is zero but for rounding."""
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=0)
    assert found[1].keys() == expected[1].keys() and found[1]
    largest = max(float(x.abs().max()) for x in expected[1].values())
    assert largest > 1e-3
    for name, x in expected[1].items():
        torch.testing.assert_close(found[1][name], x, rtol=0, atol=rtol * largest, msg=lambda m, n=name: f"{n}: {m}")


class Float64Throughout(TorchFunctionMode):
    """Code that asks for float32 gets float64: norms, softmaxes and rotary tables of a float64 model do not round."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(values: Iterable[Any]) -> list[Any]:
            return [torch.float64 if x is torch.float32 else x for x in values]

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*wide(args), **dict(zip(kwargs or {}, wide((kwargs or {}).values()))))


class InFloat64(SharedPromptForward):
    """The forward of a float64 model without any rounding to float32."""

    def prefix(self, prompts: Any) -> Any:
        with Float64Throughout():
            return super().prefix(prompts)

    def rows(self, mb: Any, prefix: Any = ()) -> Any:
        with Float64Throughout():
            return super().rows(mb, prefix)
