"""Public functions and constructors with one argument that is wrong.

    python tests/fuzz_arguments.py    # all of them, each argument with each wrong value

Each call either works or raises an error that its documentation names, whose message names the argument.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fuzz_tensors import MANGLED, RAISED
from preference_rows import EXAMPLES
from tiny_models import make
from tiny_tokenizers import byte_level_bpe

import groupdpo_kernels as package
from groupdpo_kernels import AdaBalance, Objective, PreferenceGroups, data
from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer, OnlineGroupDPOConfig

ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        0,
        -1,
        3,
        2.5,
        10**400,
        math.nan,
        math.inf,
        "",
        "text",
        "\ud800",
        b"bytes",
        [],
        {},
        (),
        [None],
        {"a": 1},
    ),
    *({1}, object(), int, len, torch.zeros(()), torch.zeros(2), torch.zeros(2, 2), torch.zeros(2, device="meta")),
    torch.zeros(2, dtype=torch.complex64),
)


@functools.cache
def model() -> Any:
    return make("llama")


@functools.cache
def tokens() -> list[Any]:
    return [*data.tokenize_groups(groups(), byte_level_bpe())]


def groups() -> list[Any]:
    return [*data.read_groups(EXAMPLES["sets"][0])]


def _head() -> dict[str, Any]:
    hidden, weight = torch.randn(6, 8), torch.randn(20, 8)
    low_rank = torch.randn(6, 3), torch.randn(20, 3)
    return {"hidden": hidden, "weight": weight, "targets": torch.arange(6), "bias": torch.randn(20)} | {
        "logit_scale": 1.0,
        "softcap": None,
        "temperature": 1.0,
        "ignore_index": -100,
        "grad_tol": 0.01,
        "workspace_bytes": 2**20,
        "process_group": None,
        "impl": "auto",
        "low_rank": low_rank,
        "grad_tail": "exact",
    }


def _pairs() -> dict[str, Any]:
    return {
        "token_logps": -torch.rand(6),
        "cu_seqlens": torch.tensor([0, 1, 3, 4, 6]),
        "groups": PreferenceGroups.pairs(2),
        "objective": Objective(),
        "ref_logps": -torch.rand(4),
        "impl": "auto",
    }


def _ragged() -> dict[str, Any]:
    return {
        "cu_groups": torch.tensor([0, 2, 5]),
        "positive": torch.tensor([True, False, True, False, False]),
        "weights": torch.ones(2),
        "response_weights": torch.ones(5),
        "process_group": None,
        "context_parallel_group": None,
    }


def _lists() -> dict[str, Any]:
    sides = [[True, False], [True, False, False]]
    given = {
        "positive": sides,
        "device": None,
        "weights": [1.0, 2.0],
        "response_weights": [[1.0, 1.0], [1.0, 1.0, 2.0]],
    }
    return given | {"process_group": None, "context_parallel_group": None}


def _batch() -> dict[str, Any]:
    ids = torch.randint(5, 50, (2, 7))
    options = {"ignore_index": -100, "temperature": 1.0, "grad_tol": 0.0, "workspace_bytes": 2**20, "impl": "auto"}
    given = {"model": model(), "input_ids": ids, "targets": ids.clone(), "strict": False, "prefix": None}
    return given | options


def _step() -> dict[str, Any]:
    lengths = torch.tensor([0, 2, 4])

    def forward(x: Any) -> Any:
        return x * 1.0, lengths

    parts = [-torch.rand(4, requires_grad=True), -torch.rand(4, requires_grad=True)]
    given = {"micro_batches": parts, "forward": forward, "groups": PreferenceGroups.pairs(2), "objective": Objective()}
    given |= {"ref_logps": -torch.rand(4), "strategy": "two_pass", "scale": 1.0, "parameters": None, "no_sync": None}
    return given | {"gradient_bytes": 2**20, "model": None, "process_group": None}


def _fields(cls: Any, **given: Any) -> dict[str, Any]:
    """The fields that the class itself has; those that it inherits belong to another project."""
    own = [f for f in dataclasses.fields(cls) if f.name in inspect.get_annotations(cls)]
    return {f.name: given.get(f.name, f.default) for f in own}


def _config(cls: Any, **more: Any) -> Callable[..., Any]:
    return lambda **given: cls(tempfile.gettempdir(), use_cpu=True, report_to=[], **{**more, **given})


def _trainer() -> dict[str, Any]:
    config = GroupDPOConfig(tempfile.gettempdir(), use_cpu=True, report_to=[], bf16=False, strategy="two_pass")
    given = {"model": model(), "ref_model": None, "args": config, "train_dataset": [EXAMPLES["sets"][0]]}
    given |= {
        "eval_dataset": None,
        "processing_class": byte_level_bpe(),
        "objective": Objective("mpo", reference_free=True),
    }
    return given | {"ref_logps": None, "peft_config": None}


def _all(generator: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **given: [*generator(**given)]


COLLATE = {name: p.default for name, p in inspect.signature(data.collate).parameters.items() if name != "groups"}
# name: the function, arguments that work, and those of them whose value nobody checks, with the reason
CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "linear_logps": (package.linear_logps, _head),
    "linear_logp_stats": (package.linear_logp_stats, lambda: {**_head(), "outputs": ("lse",)}),
    "explain": (package.explain, _head),
    "seq_logps": (
        package.seq_logps,
        lambda: {k: _pairs()[k] for k in ("token_logps", "cu_seqlens")} | {"process_group": None},
    ),
    "preference_loss": (package.preference_loss, _pairs),
    "PreferenceGroups": (PreferenceGroups, _ragged),
    "PreferenceGroups.from_lists": (PreferenceGroups.from_lists, _lists),
    "PreferenceGroups.pairs": (
        PreferenceGroups.pairs,
        lambda: {"n": 2, "device": None, "context_parallel_group": None},
    ),
    "Objective": (Objective, lambda: _fields(Objective)),
    "AdaBalance": (AdaBalance, lambda: _fields(AdaBalance)),
    "model_logps": (package.model_logps, _batch),
    "attach": (
        package.attach,
        lambda: {k: v for k, v in _batch().items() if k not in ("input_ids", "targets", "prefix")},
    ),
    "group_backward": (package.group_backward, _step),
    "forward_parts": (package.forward_parts, lambda: {k: _step()[k] for k in ("micro_batches", "forward", "no_sync")}),
    "read_groups": (
        _all(data.read_groups),
        lambda: {
            "rows": [EXAMPLES["listed"][0]],
            "format": "auto",
            "rule": "best_vs_rest",
            "rename": {},
            "on_bad": "drop",
            "report": None,
        },
    ),
    "merge_prompts": (_all(data.merge_prompts), lambda: {"groups": groups(), "on_bad": "drop", "report": None}),
    "tokenize_groups": (
        _all(data.tokenize_groups),
        lambda: {
            "groups": groups(),
            "tokenizer": byte_level_bpe(),
            "max_length": 40,
            "too_long": "drop",
            "chat": None,
            "template_options": None,
            "add_eos": True,
            "assistant_only": True,
            "both_sides": True,
            "on_bad": "drop",
            "report": None,
        },
    ),
    "collate": (data.collate, lambda: {"groups": tokens(), **COLLATE}),
    "top_k": (data.top_k, lambda: {"k": 1, "bottom": 1}),
    "threshold": (data.threshold, lambda: {"at": 0.5, "below": 0.2}),
    "margin": (data.margin, lambda: {"by": 1.0}),
    "ranks": (data.ranks, lambda: {"positives": 1}),
    "GroupDPOConfig": (_config(GroupDPOConfig), lambda: _fields(GroupDPOConfig)),
    "OnlineGroupDPOConfig": (_config(OnlineGroupDPOConfig, bf16=False), lambda: _fields(OnlineGroupDPOConfig)),
    "GroupDPOTrainer": (GroupDPOTrainer, _trainer),
}


def wrong(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Wrong values of an argument, and what is wrong with each."""
    for odd in ODD:
        # What a caller's own function raises, or makes of what it is given, is its own.
        if name in ("forward", "no_sync", "rule") and callable(odd):
            continue
        if name == "micro_batches" and hasattr(odd, "__iter__"):
            continue
        yield f"{type(odd).__name__} {odd!r:.30}", odd
    if isinstance(value, torch.Tensor):
        for how, change in MANGLED.items():
            try:
                yield how, change(value)
            except RAISED:  # torch itself has no such tensor
                continue


def fault_of(call: str, name: str, value: Any) -> str:
    """What is wrong with how the call takes this value for the argument, or ""."""
    function, arguments = CALLS[call]
    given = arguments()
    torch.manual_seed(0)
    try:
        function(**{**given, name: value})
    except (ValueError, TypeError, NotImplementedError) as error:
        # Where two do not fit together, the message may begin with either.
        words = (name.rstrip("s"), *given, *["row"] * (name in ("rows", "train_dataset", "eval_dataset")))
        return (
            ""
            if any(re.search(rf"\b{word}", str(error)) for word in words)
            else f"not named: {type(error).__name__}: {error!s:.200}"
        )
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.200}"
    return ""


def main(names: list[str]) -> int:
    count, faults = 0, []
    for call in names or CALLS:
        for name, value in CALLS[call][1]().items():
            for what, odd in wrong(name, value):
                count += 1
                if fault := fault_of(call, name, odd):
                    faults.append(f"{call}({name}: {what}): {fault}")
                    print(f"fault: {faults[-1]}", flush=True)
    print(f"tried {count}")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
