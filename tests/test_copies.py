"""Copies and pickles of what the package hands out: each is equal to what it was made of, or is refused in words."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt_groups import groups_of
from tiny_models import batch, make
from torch import Tensor, nn

import groupdpo_kernels
from groupdpo_kernels import (
    AdaBalance,
    Objective,
    PreferenceGroups,
    SharedPromptForward,
    attach,
    explain,
    linear_logp_stats,
    linear_logps,
    model_logps,
    preference_loss,
)
from groupdpo_kernels.data import Report, collate, read_groups
from groupdpo_kernels.testing import Case, make_inputs
from groupdpo_kernels.trainers import GroupDPOConfig, OnlineGroupDPOConfig
from groupdpo_kernels.trainers.rows import Collator

INPUTS = make_inputs(Case("", 8, 16, 30, ""))
HEAD = INPUTS.hidden, INPUTS.weight, INPUTS.targets
ROWS = [{"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}, {"prompt": "Tea?", "chosen": "", "rejected": ""}]


def through(protocol: int) -> Callable[[Any], Any]:
    return lambda x: pickle.loads(pickle.dumps(x, protocol))


def saved(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "torch.save": saved}
COPIES |= {f"protocol {n}": through(n) for n in range(pickle.HIGHEST_PROTOCOL + 1)}


def loss_of(leaf: Tensor) -> Any:
    return preference_loss(
        leaf, torch.arange(0, 9, 2), PreferenceGroups.pairs(2), Objective("mpo", reference_free=True)
    )


def report() -> Report:
    found = Report()
    assert len(list(read_groups(ROWS, report=found))) == 1
    return found


def detached(x: Any) -> Any:
    return type(x)(*(y.detach() if isinstance(y, Tensor) else y for y in x))


THINGS: dict[str, Callable[[], Any]] = {
    "objective": lambda: Objective("sigmoid", beta=0.3, balance=AdaBalance(ceiling=2.0)),
    "groups": lambda: PreferenceGroups.from_lists([[True, False, False], [True, False]]),
    "weighted groups": lambda: PreferenceGroups(
        torch.tensor([0, 2]), torch.tensor([True, False]), weights=torch.ones(1), response_weights=torch.ones(2)
    ),
    "loss": lambda: detached(loss_of(-torch.rand(8))),
    "statistics": lambda: detached(linear_logp_stats(*HEAD)),
    "explanation": lambda: explain(*HEAD),
    "shared prompts": lambda: collate(groups_of((9, [3, 4]), (8, [2, 5])), share_prompt=True),
    "packed step": lambda: collate(groups_of((9, [3, 4]), (8, [2, 5])), "packed"),
    "token groups": lambda: groups_of((9, [3, 4])),
    "rows": lambda: list(read_groups(ROWS[:1])),
    "report": report,
    "collator": lambda: Collator("padded", None, 4, 0),
    "config": lambda: GroupDPOConfig("out", use_cpu=True, report_to=[], bf16=False),
    "online config": lambda: OnlineGroupDPOConfig("out", use_cpu=True, report_to=[], bf16=False),
    "functions": lambda: [getattr(groupdpo_kernels, name) for name in groupdpo_kernels.__all__],
}


def same(a: Any, b: Any) -> bool:
    """Equal in kind and content, whatever it is made of."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(x, b[name]) for name, x in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        return same(vars(a) if hasattr(a, "__dict__") else repr(a), vars(b) if hasattr(b, "__dict__") else repr(b))
    return bool(a == b) or (type(a).__eq__ is object.__eq__ and same(vars(a), vars(b)))


@pytest.mark.parametrize("thing", THINGS)
def test_copies_are_equal(thing: str) -> None:
    made = THINGS[thing]()
    for name, make_copy in COPIES.items():
        found = make_copy(made)
        assert same(made, found), f"{name}: {found}"
        assert repr(made) == repr(found), name


def test_a_copy_does_what_its_original_does() -> None:
    leaf, offsets = -torch.rand(10), torch.arange(0, 11, 2)
    groups, objective = THINGS["groups"](), Objective("mpo", reference_free=True)
    expected = preference_loss(leaf, offsets, groups, objective).loss
    for make_copy in COPIES.values():
        assert torch.equal(preference_loss(leaf, offsets, make_copy(groups), make_copy(objective)).loss, expected)


def test_a_loss_of_ones_own() -> None:
    """A function of a module is pickled by its name; one that has none says so."""
    objective = Objective(own_loss)
    assert all(make_copy(objective).loss is own_loss for make_copy in COPIES.values())
    nameless = Objective(lambda scores, groups: scores[groups.positive])
    assert copy.deepcopy(nameless) == nameless
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(nameless)


def own_loss(scores: Tensor, groups: PreferenceGroups) -> Tensor:
    return scores[groups.positive]


@pytest.mark.parametrize(
    "result",
    [lambda: loss_of(-torch.rand(8, requires_grad=True)), lambda: linear_logp_stats(*HEAD)],
    ids=["loss", "head"],
)
def test_results_with_a_graph(result: Callable[[], Any]) -> None:
    """Pickles hold their values; a deep copy would have a graph of its own, which torch refuses in words."""
    made = result()
    for name, make_copy in COPIES.items():
        if name == "deepcopy":
            with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
                make_copy(made)
        else:
            assert all(torch.equal(x, y) for x, y in zip(made, make_copy(made)) if isinstance(x, Tensor)), name


def test_a_model_that_is_attached(tmp_path: Path) -> None:
    """Nothing is on the model: it is copied and saved as one that never was, and its copy is attached anew."""
    model, inputs = make("llama").eval(), batch()
    untouched = make("llama").eval()
    score, forward = attach(model, temperature=0.5), SharedPromptForward(model)
    expected = score(**inputs).detach()
    assert model.state_dict().keys() == untouched.state_dict().keys()
    for name, make_copy in COPIES.items():
        copied, again = make_copy(score), make_copy(forward)
        assert torch.equal(copied(**inputs), expected) and copied.options == score.options, name
        assert (copied.model is model) == (name == "copy") and (again.score.model is model) == (name == "copy"), name
        alone: Any = make_copy(model)
        assert torch.equal(model_logps(alone, **inputs, temperature=0.5), expected), name
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    untouched.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(model_logps(untouched, **inputs, temperature=0.5), expected)


def test_a_copy_between_forward_and_backward() -> None:
    """The graph keeps nothing that a copy of the model would drag along."""
    layer = nn.Linear(16, 16)
    out = linear_logps(layer(INPUTS.hidden.detach()), INPUTS.weight, INPUTS.targets)
    copied = copy.deepcopy(layer)
    out.sum().backward()
    assert layer.weight.grad is not None and copied.weight.grad is None
