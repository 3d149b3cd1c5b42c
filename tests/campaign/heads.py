"""The LM head: every implementation and every path of lm_head/dispatch.py, over shapes, dtypes, options and regimes."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from groupdpo_kernels import reference, testing

from .frame import Family


@dataclass(frozen=True)
class HeadCase:
    number: int
    regime: str
    impl: str
    shape: testing.Case

    @property
    def rows(self) -> tuple[str, ...]:
        return (f"regime: {self.regime}", f"dtype: {str(self.shape.dtype).removeprefix('torch.')}")

    @property
    def column(self) -> str:
        return self.impl


def draw(number: int) -> HeadCase:
    chance = random.Random(number)
    T, D, V = chance.randint(1, 40), chance.randint(1, 70), chance.randint(1, 600)
    dtype = chance.choice([torch.float32, torch.bfloat16, torch.float16])
    return HeadCase(number, "plain", "specification", testing.Case("drawn", T, D, V, "", dtype))


def judge(case: HeadCase) -> dict[str, float]:
    inputs = testing.make_inputs(case.shape, seed=case.number)
    actual = testing.run(reference.linear_logp_stats, inputs, case.shape.options)
    actual.pop("is_top1")
    return {"all": testing.check_budget(actual, inputs, case.shape.options)}


FAMILY = Family(
    name="head",
    title="The LM head",
    count=10_000,
    draw=draw,
    judge=judge,
    sources=(
        "tests/campaign/heads.py",
        "python/groupdpo_kernels/*.py",
        "python/groupdpo_kernels/lm_head/*.py",
        "kernels/triton/*.py",
        "csrc/**/*.[ch]*",
    ),
)
