"""Operations on fake tensors: the results that are made from memory are those that torch would work out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from groupdpo_kernels.memory import fake
from groupdpo_kernels.memory.fake import FakeRun, fake_copy, tensors_in

IDS = torch.tensor([[1, 0, 3], [2, 2, 1]])
OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "a new tensor": lambda x: x @ x.mT,
    "transposed": lambda x: (x.mT + x.mT).mT,
    "a view": lambda x: x.view(2, 12)[:, 3:],
    "a view of a view": lambda x: x[1:].mT[2:, 1:].unsqueeze(0).expand(2, -1, -1),
    "views": lambda x: x.split([1, 2, 1]),
    "a list": lambda x: torch._foreach_mul([x, x.clone()], 2.0),
    "several": lambda x: torch.native_layer_norm(x, [6], None, None, 1e-5),
    "in place": lambda x: x.mul_(2).add_(x),
    "its own shape changed": lambda x: x.t_(),
    "casts": lambda x: (x.bfloat16(), x.bfloat16().float() + x.bfloat16()),
    "an integer by 1": lambda x: (x > 0).long() * 1,
    "an integer by 1.0": lambda x: (x > 0).long() * 1.0,
    "an integer by True": lambda x: (x > 0) * True,
    "real ids": lambda x: torch.nn.functional.embedding(IDS, x),
    "written from what is real": lambda x: x[:2, :3].copy_(IDS),
    "not a number": lambda x: x.masked_fill(x > 0, float("nan")),
}


class Run(TorchDispatchMode):
    """What MemoryTracker does with operations, without counting."""

    def __init__(self) -> None:
        super().__init__()
        self.run = FakeRun()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})


def layouts(x: Tensor, found: Any) -> list[Any]:
    """Of each result: shape, strides, dtype and where it begins, and whether it is x or lies in x's memory."""
    memory = x.untyped_storage()._cdata
    return [
        (y.shape, y.stride(), y.dtype, y.storage_offset(), y is x, y.untyped_storage()._cdata == memory)
        for y in tensors_in((found,))
    ]


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=list(OPERATIONS))
def test_results_are_those_of_real_tensors(operation: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time, when torch works them out, and when they are made from memory."""
    monkeypatch.setattr(fake, "_known", {})
    x = torch.zeros(4, 6)
    expected = layouts(x, operation(x))
    sizes = []
    for _ in range(3):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, Run():
            x = torch.empty(4, 6)
            found = operation(x)
            assert all(type(y) is FakeTensor and y.fake_mode is mode for y in tensors_in((found,)))
            assert all(
                y.device == torch.device("cpu") and vars(y).keys() == vars(x).keys() for y in tensors_in((found,))
            )
            assert layouts(x, found) == expected
        sizes.append(len(fake._known))
    assert sizes[0] == sizes[1] == sizes[2]


def test_a_model_that_trains_on_fake_tensors_repeats_itself() -> None:
    """Gradients arrive, and a second step asks torch for nothing that the first has asked for."""
    made: list[str] = []

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made.append(str(func))
            return func(*args, **(kwargs or {}))

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    model = fake_copy(model, mode)
    for _ in range(2):
        made.clear()
        with mode, Asked(), Run():
            model(IDS).square().sum().backward()
        assert all(type(p.grad) is FakeTensor and p.grad.shape == p.shape for p in model.parameters())
        model.zero_grad()
    assert not [name for name in made if "prim.device" not in name], made


def test_reads_and_what_is_small_and_real() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), Run():
        x = torch.empty(3)
        assert x.sum().item() == 0.0 and (x > 0).all().item() is False
        ids = torch.arange(5)
        assert type(ids + 1) is Tensor and int((ids + 1).sum()) == 15
        for _ in range(2):  # the second time it is known which stay real
            small = torch.arange(2**11)[:, None] < torch.arange(2**11)
            large = torch.arange(2**11)[:, None] < torch.arange(2**11 + 1)
            assert type(small) is Tensor and type(large) is FakeTensor
