"""Tensors of wrong kinds, and the C++ ops on them: an interpreter that dies is the worst that an input can do.

    python tests/fuzz_tensors.py 0 2000    # a seed, and a number of calls

The ops under torch.ops are called directly, without the Python that checks arguments for them. Each call either raises
an exception, or gives what plain copies of its tensors give, but for the rounding of a matrix library, which goes by
where a tensor begins. The last line that is written says what the process was at when it died.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from groupdpo_kernels.lm_head import ops as _ops  # noqa: F401  defines the schemas
from groupdpo_kernels.lm_head.extension import extension_why_not

# What an op may raise: torch's checks in C++ are RuntimeErrors, and its dispatcher's a NotImplementedError.
RAISED = (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError)
HUGE = 2**63 - 1


def _strided(x: Tensor) -> Tensor:
    wide = torch.repeat_interleave(x, 2, dim=-1) if x.dim() else x
    return wide[..., ::2] if x.dim() else x


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x


def _expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape) if x.dim() and len(x) else x


def _overlapping(x: Tensor) -> Tensor:
    if x.dim() != 2 or not x.numel():
        return x
    return torch.as_strided(x.contiguous(), (x.shape[0], x.shape[1]), (1, 1)) if x.numel() >= sum(x.shape) else x


def _set(x: Tensor, value: float) -> Tensor:
    x = x.detach().clone()
    if x.numel():
        x.view(-1)[x.numel() // 2] = value
    return x


def _ints(x: Tensor, value: int) -> Tensor:
    return _set(x, value) if not x.is_floating_point() else _set(x, float(value))


# Each keeps the numbers, or makes a tensor that an op must refuse or take as it is.
SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": _strided,
    "transposed": _transposed,
    "offset": lambda x: torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].view(x.shape) if x.numel() else x,
    "negated view": lambda x: torch._neg_view(-x) if x.is_floating_point() else x,  # type: ignore[attr-defined]
    "parameter": lambda x: torch.nn.Parameter(x) if x.is_floating_point() else x,
}
OTHER: dict[str, Callable[[Tensor], Any]] = {
    "expanded": _expanded,
    "overlapping": _overlapping,
    "empty": lambda x: x[:0] if x.dim() else x.reshape(0),
    "without columns": lambda x: x[..., :0] if x.dim() else x,
    "one more": lambda x: torch.cat([x, x[:1]]) if x.dim() else x[None],
    "one less": lambda x: x[:-1] if x.dim() else x,
    "wider": lambda x: torch.cat([x, x[..., :1]], -1) if x.dim() else x,
    "another dimension": lambda x: x[None],
    "flat": lambda x: x.reshape(-1),
    "scalar": lambda x: torch.zeros((), dtype=x.dtype),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.detach().to_sparse(),
    "double": lambda x: x.double(),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "integer": lambda x: x.int(),
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.to(torch.complex64),
    "float8": lambda x: x.float().to(torch.float8_e4m3fn),
    "NaN": lambda x: _set(x, float("nan")) if x.is_floating_point() else x,
    "infinite": lambda x: _set(x, float("inf")) if x.is_floating_point() else x,
    "huge": lambda x: _ints(x, HUGE),
    "negative": lambda x: _ints(x, -1),
    "most negative": lambda x: _ints(x, -(2**63)),
    "beyond": lambda x: _ints(x, 1000),
    "None": lambda x: None,
    "list": lambda x: x.tolist() if x.device.type == "cpu" else [],
    "numpy": lambda x: x.detach().numpy() if x.dtype not in (torch.bfloat16,) else None,
}
MANGLED = SAME | OTHER
NUMBERS: dict[str, list[Any]] = {
    "float": [0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e-320, 1e308, 2.5],
    "int": [0, -1, 1, 7, HUGE, -(2**63), 2**40],
    "bool": [True, False],
}


def head(rng: random.Random, T: int, D: int, V: int, R: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    bias = drawn(V) if rng.random() < 0.5 else drawn(0)
    return {
        "hidden": drawn(T, D),
        "weight": drawn(V, D),
        "bias": bias,
        "low_rank_hidden": drawn(T, R),
        "low_rank_weight": drawn(V, R),
        "targets": torch.randint(0, max(V, 1), (T,), generator=generator),
    }


def arguments(rng: random.Random, name: str) -> dict[str, Any]:
    """Arguments that the op takes, by name, in order."""
    T, D, V, R = rng.choice((1, 5, 40)), rng.choice((1, 8, 33)), rng.choice((1, 20, 300)), rng.choice((0, 0, 3))
    if name == "add_weighted_rows_cpu":
        entries = rng.randrange(0, 30)
        owned = torch.tensor(sorted(rng.randrange(0, entries + 1) for _ in range(T - 1)), dtype=torch.int64)
        owned = torch.cat([owned[:0].new_zeros(1), owned, owned.new_tensor([entries])])
        dtype = rng.choice((torch.float32, torch.bfloat16))
        index = torch.tensor([rng.randrange(V) for _ in range(entries)], dtype=torch.int64)
        source = torch.randn(V, D).to(dtype)
        return {"out": torch.zeros(T, D, dtype=dtype), "source": source, "owned": owned, "index": index} | {
            "coefficients": torch.randn(entries)
        }
    found = head(rng, T, D, V, R)
    rows = torch.randn(T)
    options: dict[str, Any] = {"logit_scale": 1.0, "softcap": rng.choice((None, 5.0)), "temperature": 1.0}
    options["workspace_bytes"] = rng.choice((1, 2**14, 2**24))
    cache = torch.zeros(T, rng.choice((0, V)))
    if name == "linear_logps_forward_cpu":
        return found | options | {"stats": rng.random() < 0.5, "logit_cache": cache}
    if name == "linear_logps_backward_cpu":
        given = {"lse": rows.double() + 9, "d_target": rows.clone(), "d_softmax": rows.clone(), "d_entropy": None}
        needs = {f"needs_{x}": rng.random() < 0.5 for x in ("hidden", "weight", "bias", "low_rank_hidden")}
        needs |= {"needs_low_rank_weight": R > 0, "needs_mass": True}
        needs["needs_bias"] &= found["bias"].numel() > 0
        return found | given | options | needs | {"logit_cache": cache[:, :0]}
    if name == "frozen_head_cpu":
        return found | {"target_logits": rows} | options | {"grad_tol": rng.choice((0.0, 0.01)), "least": 0.001}
    more = {"least": 0.01, "most": rng.choice((1, V)), "seed": rng.choice((None, 3))}
    return found | {"target_logits": rows} | options | more


OPS = (
    *("linear_logps_forward_cpu", "linear_logps_backward_cpu", "frozen_head_cpu", "sparse_forward_cpu"),
    "add_weighted_rows_cpu",
)


def mangled(rng: random.Random, given: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The arguments with one or two of them changed, and what was done."""
    changed, told = dict(given), []
    for name in rng.sample([*given], rng.choice((1, 1, 2))):
        value = given[name]
        if isinstance(value, Tensor):
            how = rng.choice([*MANGLED])
            try:
                changed[name] = MANGLED[how](value)
            except RAISED:  # torch itself has no such tensor
                continue
        else:
            kind = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"
            changed[name] = rng.choice([*NUMBERS[kind], None, "text"])
            how = repr(changed[name])
        told.append(f"{name}: {how}")
    return changed, ", ".join(told)


def called(name: str, given: dict[str, Any]) -> list[Any]:
    """What the op gives, and what it has written to."""
    copies = {
        k: v.detach().clone(memory_format=torch.preserve_format) if k in ("out", "logit_cache") else v
        for k, v in given.items()
        if isinstance(v, Tensor)
    }
    out = getattr(torch.ops.groupdpo_kernels, name)(*({**given, **copies}).values())
    return [*(out or ()), *(copies[k] for k in ("out", "logit_cache") if k in copies)]


def plain(given: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.detach().contiguous().resolve_neg().clone() if isinstance(v, Tensor) and v.layout == torch.strided else v
        for k, v in given.items()
    }


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=0.02, atol=0.02, equal_nan=True)


def one(rng: random.Random) -> str:
    """One call of a mangled op; what is wrong with it, or ""."""
    name = rng.choice(OPS)
    given, what = mangled(rng, arguments(rng, name))
    print(f"at {name}({what})", flush=True)
    torch.manual_seed(0)
    try:
        found = called(name, given)
    except RAISED:
        return ""
    except Exception as error:
        return f"{name}({what}) raised {type(error).__name__}: {error}"
    wanted = called(name, plain(given))
    if name == "sparse_forward_cpu":  # a candidate at the threshold may be on either side of it
        found, wanted = found[:4], wanted[:4]
    return "" if all(map(same, found, wanted)) else f"{name}({what}) differs from the same call on plain copies"


def main(seed: int, count: int) -> int:
    assert not extension_why_not()
    faults = [fault for i in range(count) if (fault := one(random.Random(f"{seed}:{i}")))]
    print("\n".join(["done", *faults]), flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main(*map(int, sys.argv[1:])))
