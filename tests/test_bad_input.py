"""Wrong arguments raise before anything is computed, with a message that names the argument, what is expected, and the
value; what a device cannot check without reading values back gives NaN, never a plausible number."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from groupdpo_kernels import explain, linear_logp_stats, linear_logps, seq_logps
from groupdpo_kernels.testing import Case, make_inputs, triton_on_cpu

T, D, V, R = 6, 8, 20, 3


def good(**changes: Any) -> dict[str, Any]:
    """Arguments that work, but for the changes."""
    arguments: dict[str, Any] = {
        "hidden": torch.randn(T, D),
        "weight": torch.randn(V, D),
        "targets": torch.arange(T),
        "bias": torch.randn(V),
        "low_rank": (torch.randn(T, R), torch.randn(V, R)),
    }
    return arguments | changes


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # shapes
    "hidden_scalar": ({"hidden": torch.tensor(1.0)}, ValueError, "hidden must be (..., D); got a scalar"),
    "weight_vector": ({"weight": torch.randn(D)}, ValueError, "weight must be (V, D = 8)"),
    "weight_other_D": ({"weight": torch.randn(V, 9)}, ValueError, "hidden (6, 8); got (20, 9)"),
    "weight_transposed": ({"weight": torch.randn(D, V)}, ValueError, "weight must be (V, D = 8)"),
    "weight_empty": ({"weight": torch.randn(0, D)}, ValueError, "both at least 1"),
    "hidden_of_no_width": ({"hidden": torch.randn(T, 0), "weight": torch.randn(V, 0)}, ValueError, "both at least 1"),
    "targets_shorter": (
        {"targets": torch.arange(5)},
        ValueError,
        "targets must have the leading shape of hidden, (6,); got (5,)",
    ),
    "targets_of_hidden_shape": ({"targets": torch.zeros(T, D).long()}, ValueError, "(6,); got (6, 8)"),
    "targets_not_flat": ({"targets": torch.arange(T)[:, None]}, ValueError, "(6,); got (6, 1)"),
    "bias_other_V": ({"bias": torch.randn(19)}, ValueError, "bias must be (V,) = (20,); got (19,)"),
    "bias_of_two_dimensions": ({"bias": torch.randn(1, V)}, ValueError, "bias must be (V,) = (20,); got (1, 20)"),
    "low_rank_other_V": (
        {"low_rank": (torch.randn(T, R), torch.randn(19, R))},
        ValueError,
        "low_rank[1] must be (V = 20, R) with R at least 1; got (19, 3)",
    ),
    "low_rank_other_R": (
        {"low_rank": (torch.randn(T, 4), torch.randn(V, R))},
        ValueError,
        "low_rank[0] must be (..., R) = (6, 3); got (6, 4)",
    ),
    "low_rank_other_T": (
        {"low_rank": (torch.randn(5, R), torch.randn(V, R))},
        ValueError,
        "low_rank[0] must be (..., R) = (6, 3); got (5, 3)",
    ),
    "low_rank_empty": ({"low_rank": (torch.randn(T, 0), torch.randn(V, 0))}, ValueError, "R at least 1; got (20, 0)"),
    # dtypes
    "hidden_integer": ({"hidden": torch.ones(T, D).int()}, TypeError, "hidden must be one of torch.bfloat16"),
    "hidden_complex": ({"hidden": torch.ones(T, D) * 1j}, TypeError, "got torch.complex64"),
    "hidden_float8": ({"hidden": torch.ones(T, D).to(torch.float8_e4m3fn)}, TypeError, "got torch.float8_e4m3fn"),
    "targets_floating": (
        {"targets": torch.ones(T)},
        TypeError,
        "targets must be an integer tensor; got torch.float32",
    ),
    "targets_bool": (
        {"targets": torch.ones(T).bool()},
        TypeError,
        "targets must be an integer tensor; got torch.bool",
    ),
    "weight_mixed": (
        {"weight": torch.randn(V, D).bfloat16()},
        TypeError,
        "weight must have the dtype of hidden, torch.float32 (torch.autocast mixes dtypes); got torch.bfloat16",
    ),
    "bias_mixed": ({"bias": torch.randn(V).half()}, TypeError, "bias must have the dtype of hidden"),
    "low_rank_0_mixed": (
        {"low_rank": (torch.randn(T, R).half(), torch.randn(V, R))},
        TypeError,
        "low_rank[0] must have the dtype of hidden",
    ),
    "low_rank_1_mixed": (
        {"low_rank": (torch.randn(T, R), torch.randn(V, R).double())},
        TypeError,
        "low_rank[1] must have the dtype of hidden",
    ),
    # devices
    "weight_elsewhere": (
        {"weight": torch.randn(V, D, device="meta")},
        ValueError,
        "weight must be on the device of hidden, cpu; got meta",
    ),
    "targets_elsewhere": ({"targets": torch.arange(T, device="meta")}, ValueError, "targets must be on the device of"),
    "bias_elsewhere": ({"bias": torch.randn(V, device="meta")}, ValueError, "bias must be on the device of hidden"),
    "low_rank_elsewhere": (
        {"low_rank": (torch.randn(T, R), torch.randn(V, R, device="meta"))},
        ValueError,
        "low_rank[1] must be on the device of hidden, cpu; got meta",
    ),
    # options
    "softcap_zero": ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, or None; got 0.0"),
    "softcap_negative": ({"softcap": -30.0}, ValueError, "softcap must be positive and finite, or None; got -30.0"),
    "softcap_infinite": ({"softcap": float("inf")}, ValueError, "got inf"),
    "softcap_nan": ({"softcap": float("nan")}, ValueError, "softcap must be positive and finite, or None; got nan"),
    "temperature_zero": ({"temperature": 0.0}, ValueError, "temperature must be positive and finite; got 0.0"),
    "temperature_negative": ({"temperature": -1}, ValueError, "temperature must be positive and finite; got -1"),
    "temperature_nan": ({"temperature": float("nan")}, ValueError, "temperature must be positive and finite; got nan"),
    "logit_scale_nan": ({"logit_scale": float("nan")}, ValueError, "logit_scale must be finite; got nan"),
    "logit_scale_infinite": ({"logit_scale": float("-inf")}, ValueError, "logit_scale must be finite; got -inf"),
    "grad_tol_one": ({"grad_tol": 1.0}, ValueError, "grad_tol must be in [0, 1); got 1.0"),
    "grad_tol_negative": ({"grad_tol": -0.1}, ValueError, "grad_tol must be in [0, 1); got -0.1"),
    "grad_tol_nan": ({"grad_tol": float("nan")}, ValueError, "grad_tol must be in [0, 1); got nan"),
    "workspace_zero": ({"workspace_bytes": 0}, ValueError, "workspace_bytes must be positive; got 0"),
    "workspace_negative": ({"workspace_bytes": -1}, ValueError, "workspace_bytes must be positive; got -1"),
    "impl_unknown": (
        {"impl": "tritn"},
        ValueError,
        "impl must be 'auto' or one of ('triton', 'cpu', 'reference'); got 'tritn'",
    ),
    "impl_none": ({"impl": None}, ValueError, "got None"),
    # kinds
    "hidden_list": ({"hidden": [[0.0] * D] * T}, TypeError, "hidden must be a tensor; got list"),
    "weight_module": ({"weight": torch.nn.Linear(D, V)}, TypeError, "weight must be a tensor; got Linear"),
    "targets_list": ({"targets": [0] * T}, TypeError, "targets must be a tensor; got list"),
    "bias_flag": ({"bias": True}, TypeError, "bias must be a tensor; got bool"),
    "low_rank_tensor": ({"low_rank": torch.randn(T, R)}, TypeError, "low_rank must be a pair of tensors"),
    "low_rank_of_nothing": ({"low_rank": (None, None)}, TypeError, "low_rank[0] must be a tensor; got NoneType"),
    "temperature_text": ({"temperature": "1"}, TypeError, "temperature must be a number; got '1'"),
    "temperature_trained": (
        {"temperature": torch.tensor(2.0, requires_grad=True)},
        TypeError,
        "temperature must be a number, and gets no gradient; got a tensor that requires one",
    ),
    "logit_scale_none": ({"logit_scale": None}, TypeError, "logit_scale must be a number; got None"),
    "softcap_flag": ({"softcap": True}, TypeError, "softcap must be a number; got True"),
    "grad_tol_text": ({"grad_tol": "0.1"}, TypeError, "grad_tol must be a number; got '0.1'"),
    "workspace_infinite": ({"workspace_bytes": float("inf")}, ValueError, "workspace_bytes must be positive; got inf"),
    "ignore_index_fraction": ({"ignore_index": -100.5}, ValueError, "ignore_index must be an integer of 64 bits"),
    "ignore_index_text": ({"ignore_index": "-100"}, TypeError, "ignore_index must be a number; got '-100'"),
    # ids
    "target_too_large": (
        {"targets": torch.tensor([0, 1, 20, 3, 25, 5])},
        ValueError,
        "targets must be in [0, V = 20) or ignore_index = -100; targets.view(-1)[2] is 20 (2 such rows)",
    ),
    "target_negative": (
        {"targets": torch.tensor([0, 1, 2, 3, 4, -1])},
        ValueError,
        "targets.view(-1)[5] is -1 (1 such rows)",
    ),
    "target_other_ignore_index": (
        {"targets": torch.tensor([0, 1, 2, 3, 4, -100]), "ignore_index": -1},
        ValueError,
        "ignore_index = -1; targets.view(-1)[5] is -100",
    ),
}


@pytest.mark.parametrize("function", [linear_logps, linear_logp_stats], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", BAD)
def test_it_raises(name: str, function: Callable[..., Any]) -> None:
    changes, kind, message = BAD[name]
    function(**good())
    with pytest.raises(kind, match=re.escape(message)) as raised:
        function(**good(**changes))
    # The argument is named first, and the value is there.
    argument = next(iter(changes)) if name != "hidden_of_no_width" else "weight"
    assert str(raised.value).startswith(argument) and ("got" in str(raised.value) or " is " in str(raised.value))


@pytest.mark.parametrize("name", [name for name, (changes, _, _) in BAD.items() if not name.startswith("target_")])
def test_explain_raises_alike(name: str) -> None:
    """explain answers for the call that would be made: it takes the same arguments and refuses the same ones."""
    changes, kind, message = BAD[name]
    with pytest.raises(kind, match=re.escape(message)):
        explain(**good(**changes))
    with pytest.raises(TypeError, match="sofcap"):
        explain(**good(sofcap=30.0))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_wrong_ids_raise_on_the_host_whatever_the_implementation(impl: str) -> None:
    """Also in a batch, and also where the tensor would not be read otherwise: the position counts over all rows."""
    hidden, targets = torch.randn(2, 3, D), torch.tensor([[0, 1, 2], [3, V, -100]])
    with pytest.raises(ValueError, match=re.escape("targets.view(-1)[4] is 20 (1 such rows)")):
        linear_logps(hidden, torch.randn(V, D), targets, impl=impl)


def test_outputs() -> None:
    arguments = good()
    with pytest.raises(
        ValueError, match=re.escape("outputs must be taken from ('lse', 'entropy', ") + ".*got 'entropi'"
    ):
        linear_logp_stats(**arguments, outputs=("lse", "entropi"))
    assert linear_logp_stats(**arguments, outputs=("token_logps",)).lse is None
    with pytest.raises(ValueError, match="outputs must be taken from"):  # a string is a sequence of its letters
        linear_logp_stats(**arguments, outputs="lse")


# ------------------------------------------------------------------------------------------------ capabilities


def test_an_explicit_choice_never_falls_back() -> None:
    """It raises with every reason, not the first."""
    arguments = good()
    message = "impl='triton' cannot run here: hidden is on cpu: the Triton kernels want a GPU"
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_logps(**arguments, impl="triton")
    double = {
        "hidden": arguments["hidden"].double(),
        "weight": arguments["weight"].double(),
        "targets": arguments["targets"],
    }
    for impl, *reasons in (("triton", "hidden is on cpu", "hidden is float64"), ("cpu", "hidden is float64")):
        with pytest.raises(ValueError, match=f"^impl='{impl}' cannot run here: ") as raised:
            linear_logps(**double, impl=impl)
        assert all(reason in str(raised.value) for reason in reasons)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says that it is not built and how to build it; auto takes the reference."""
    real = importlib.import_module

    def import_module(name: str, *rest: Any) -> Any:
        if name == "groupdpo_kernels._C":
            raise ModuleNotFoundError("No module named 'groupdpo_kernels._C'", name=name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", import_module)
    message = "C++ extension is not built: with a C++ compiler and Python's headers, run `pip install cmake ninja"
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_logps(**good(), impl="cpu")
    explanation = explain(**good())
    assert explanation.impl == "reference" and explanation.why_not["cpu"][0].startswith("C++ extension is not built")
    assert linear_logps(**good()).shape == (T,)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def import_module(name: str, *rest: Any) -> Any:
        if name.startswith("groupdpo_kernels.kernels"):
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ValueError, match="triton does not import: No module named 'triton'; run `pip install"):
        linear_logps(**good(), impl="triton")


def test_meta_tensors_have_shapes() -> None:
    """Planning without memory: the answer is a shape, for meta inputs as for fake ones."""
    leaf = torch.empty(2, 3, D, device="meta", requires_grad=True)
    stats = linear_logp_stats(
        leaf, torch.empty(V, D, device="meta"), torch.empty(2, 3, dtype=torch.int64, device="meta")
    )
    assert stats.token_logps.shape == stats.entropy.shape == (2, 3) and stats.token_logps.device.type == "meta"  # type: ignore[union-attr]
    stats.token_logps.sum().backward()
    assert leaf.grad is not None and leaf.grad.shape == leaf.shape


# --------------------------------------------------------------------------------------------------- seq_logps


@pytest.mark.parametrize(
    ("values", "offsets", "message"),
    [
        (torch.zeros(2, 3), [0, 2], "token_logps must be a floating (T,) tensor; got (2, 3) torch.float32"),
        (torch.zeros(3).int(), [0, 3], "token_logps must be a floating (T,) tensor; got (3,) torch.int32"),
        (torch.zeros(3), [[0, 3]], "cu_seqlens must be an integer (S+1,) tensor; got (1, 2) torch.int64"),
        (torch.zeros(3), [], "cu_seqlens must be an integer (S+1,) tensor; got (0,)"),
        (torch.zeros(3), [0.0, 3.0], "cu_seqlens must be an integer tensor; got torch.float32"),
        (torch.zeros(3), [1, 3], "cu_seqlens must start at 0 and end at the number of tokens, 3; got 1 and 3"),
        (torch.zeros(3), [0, 2], "cu_seqlens must start at 0 and end at the number of tokens, 3; got 0 and 2"),
        (torch.zeros(3), [0, 4], "got 0 and 4"),
        (torch.zeros(3), [0, 2, 1, 3], "cu_seqlens must not decrease; cu_seqlens[1] is 2 and cu_seqlens[2] is 1"),
        (torch.zeros(3), [-1, 3], "got -1 and 3"),
    ],
    ids=str,
)
def test_seq_logps(values: Tensor, offsets: list[Any], message: str) -> None:
    with pytest.raises(
        TypeError if "float32" in message and "cu_" in message else ValueError, match=re.escape(message)
    ):
        seq_logps(values, torch.tensor(offsets))


def test_seq_logps_elsewhere() -> None:
    message = "cu_seqlens must be on the device of token_logps, cpu; got meta"
    with pytest.raises(ValueError, match=re.escape(message)):
        seq_logps(torch.zeros(3), torch.zeros(2, dtype=torch.int64, device="meta"))


# ------------------------------------------------------------------------------------ what a device cannot raise


@pytest.mark.parametrize("tma", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("wrong", [V, V + 300, -1, 2**40, -(2**40)])
def test_a_wrong_id_on_a_device_is_nan(wrong: int, tma: bool) -> None:
    """Values are not read back: NaN in the row's log-probability and gradient and in the head's gradients, and not a
    bit of any other row changes."""
    case = Case("wrong_id", 20, 16, V, "", bias=True, R=4)
    inputs = make_inputs(case)
    assert inputs.low_rank is not None
    targets = inputs.targets.clone()
    targets[7], targets[8] = wrong, 3
    others = torch.arange(20) != 7
    results = []
    with triton_on_cpu(tma=tma):
        for y in (targets.index_fill(0, torch.tensor(7), 3), targets):
            stats = linear_logp_stats(
                inputs.hidden,
                inputs.weight,
                y,
                inputs.bias,
                low_rank=inputs.low_rank,
                outputs=("lse", "is_top1"),
                impl="triton",
            )
            assert stats.lse is not None and stats.is_top1 is not None
            # A gradient of lse alone would be a plausible one: the row is wrong all the same.
            loss = (stats.token_logps * inputs.d_token_logps)[others].sum() + stats.token_logps[7] + stats.lse.sum()
            g = dict(zip(inputs.leaves, torch.autograd.grad(loss, list(inputs.leaves.values()))))
            results.append((stats, g))
    (clean, d_clean), (dirty, d_dirty) = results
    assert dirty.token_logps[7].isnan() and not dirty.is_top1[7]
    assert torch.equal(dirty.token_logps[others], clean.token_logps[others]) and torch.equal(dirty.lse, clean.lse)
    for name in ("hidden", "low_rank_hidden"):
        assert d_dirty[name][7].isnan().all() and torch.equal(d_dirty[name][others], d_clean[name][others])
    for name in ("weight", "bias", "low_rank_weight"):
        assert d_dirty[name].isnan().all()
