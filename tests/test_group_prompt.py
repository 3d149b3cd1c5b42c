"""group_backward with prompts that run once: one gradient, that of whole sequences, by both strategies and from the
whole graph, whatever trains; and the batches that hold such prompts."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from prompt_groups import (
    MPO,
    Float64Throughout,
    InFloat64,
    check_same,
    coupled,
    gradients_of,
    groups_of,
    ref_logps,
    run,
)
from tiny_models import check_budget, make
from torch import Tensor, nn

from groupdpo_kernels import PreferenceGroups, SharedPrompt, forward_parts, group_backward, preference_loss
from groupdpo_kernels.data import PreferenceBatch, collate
from groupdpo_kernels.distributed import planned_as_sharded
from groupdpo_kernels.models import SharedPromptForward, attach

# The first group takes two micro-batches of four rows, the second one shares nothing, the last two run together.
GROUPS = groups_of((12, [2, 6, 1, 3, 4]), (1, [3, 2]), (7, [2, 3]), (6, [4, 2]))
STRATEGIES = ("two_pass", "one_pass")


def gpt2(**changes: Any) -> nn.Module:
    """It rounds nothing in float64."""
    return make("gpt2", **changes).double()


def whole() -> PreferenceBatch:
    return collate(GROUPS)


def shared(rows: int | None = 4) -> PreferenceBatch:
    return collate(GROUPS, max_sequences=rows, share_prompt=True)


# ------------------------------------------------------------------------------------------------------- one gradient


@pytest.mark.parametrize("rows", [1, 4, None])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_gradient(strategy: str, rows: int | None) -> None:
    model = gpt2()
    expected = coupled(model, whole())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(model, shared(rows), strategy=strategy, scale=torch.tensor(4.0))
    check_same((found[0], {n: x / 4 for n, x in found[1].items()}), expected)
    check_same(coupled(model, shared(rows)), expected)


TRAINED: dict[str, Callable[[str], bool]] = {
    "upper layer": lambda name: ".h.1." in name,
    "lower layer": lambda name: ".h.0." in name,
    "last mlp": lambda name: "h.1.mlp" in name,  # no key or value depends on it
    "final norm": lambda name: "ln_f" in name,
    "positions": lambda name: "wpe" in name,
    "all but embeddings": lambda name: "wte" not in name and "wpe" not in name,
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("part", TRAINED)
def test_a_part_trains(part: str, strategy: str, frozen: bool) -> None:
    """By `parameters`, or with all else frozen: then keys and values of lower layers need no gradient."""
    model = gpt2()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # else it trains with the embedding
    chosen = {n: p for n, p in model.named_parameters() if TRAINED[part](n)}
    expected = coupled(model, whole())
    expected = expected[0], {n: g for n, g in expected[1].items() if n in chosen}
    if frozen:
        model.requires_grad_(False)
        for p in chosen.values():
            p.requires_grad_(True)
    check_same(run(model, shared(), strategy=strategy, parameters=None if frozen else chosen.values()), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("checkpoints", [False, True])
def test_lora_on_the_upper_layer(strategy: str, checkpoints: bool) -> None:
    config = LoraConfig(r=2, target_modules=["c_attn", "c_fc"], layers_to_transform=[1], fan_in_fan_out=True)
    model: Any = get_peft_model(gpt2(), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    prefix = attach(model).prefix(torch.arange(20, 25)[None])
    assert [x is not None and x.requires_grad for x in prefix] == [False, False, True, True]
    expected = coupled(model, whole())
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    check_same(run(model, shared(), strategy=strategy), expected)
    with model.disable_adapter(), torch.no_grad():  # the reference
        values = [forward_parts(step.parts, SharedPromptForward(model))[0] for step in (shared(), whole())]
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dropout_of_both_passes_is_one(strategy: str) -> None:
    """The graph of everything draws in the order of pass 1: the prompt, then its micro-batches."""
    model = gpt2(embd_pdrop=0.2, attn_pdrop=0.2, resid_pdrop=0.2)
    torch.manual_seed(1)
    expected, state = coupled(model, shared()), torch.get_rng_state()
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(model, shared(), strategy=strategy)
    assert torch.equal(torch.get_rng_state(), state)
    check_same(found, expected)
    torch.manual_seed(2)
    with pytest.raises(AssertionError):
        check_same(run(model, shared(), strategy=strategy), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_autocast(strategy: str) -> None:
    """Many micro-batches add to gradients of keys and values in bfloat16."""
    model = make("llama").bfloat16().float()
    groups = groups_of((24, [3 + i % 5 for i in range(24)]))
    truth = coupled(model, collate(groups))
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(model, collate(groups, max_sequences=2), strategy="two_pass")
        found = run(model, collate(groups, max_sequences=2, share_prompt=True), strategy=strategy)
    check_budget(found, expected, truth, torch.finfo(torch.bfloat16).eps)


def test_gradients_accumulate() -> None:
    model = gpt2()
    once = run(model, shared())[1]
    for step in (shared(), whole()):
        group_backward(step.parts, SharedPromptForward(model), step.groups, MPO, ref_logps(step))
    check_same(
        (once["transformer.wpe.weight"], {n: x / 2 for n, x in gradients_of(model).items()}),
        (once["transformer.wpe.weight"], once),
    )


# --------------------------------------------------------------------------------------------------------- other states


class WithRouterLoss(SharedPromptForward):
    """The auxiliary loss of the experts, of prompts and responses each. That of a prompt is one more tensor of its
    prefix, and the first of its micro-batches adds it."""

    def prefix(self, prompts: Any) -> Any:
        with Float64Throughout():
            tensors, outputs = self.score.prefix_with_outputs(
                prompts.input_ids, output_router_logits=True, **prompts.inputs
            )
        self.first = True
        return (*tensors, outputs.aux_loss)

    def rows(self, mb: Any, prefix: Any = ()) -> Any:
        *tensors, of_prompt = prefix or (None,)
        with Float64Throughout():
            token_logps, outputs = self.score.with_outputs(
                mb.input_ids, mb.targets, prefix=tensors, output_router_logits=True, **mb.inputs
            )
        more = of_prompt if of_prompt is not None and self.first else 0.0
        self.first = False
        return mb.live(token_logps), mb.cu_seqlens, outputs.aux_loss + more


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_auxiliary_loss_of_experts(strategy: str) -> None:
    model = make("mixtral").double()
    attach(model).prefix(torch.arange(20, 24)[None])  # probed
    step = collate(GROUPS, max_sequences=4, share_prompt=True, prompts_together=False)
    forward = WithRouterLoss(model)
    expected = coupled(model, step, forward)
    gate = "model.layers.0.mlp.gate.weight"
    assert (expected[1][gate] - coupled(model, step, InFloat64(model))[1][gate]).abs().max() > 1e-4  # it matters
    check_same(run(model, step, forward, strategy=strategy), expected)


class Toy:
    """Sequences are sums over a table: prefix gives what is asked for, rows use all of it."""

    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        self.give, self.calls = give, []
        self.table = nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64))

    def prefix(self, prompt: Tensor) -> Any:
        self.calls.append("prefix")
        return self.give(self.table[prompt])

    def rows(self, mb: Tensor, prefix: Sequence[Any] = ()) -> Any:
        self.calls.append("rows")
        used = [x.double() for x in prefix if x is not None]
        weight = sum((i + 1) * x.sum() for i, x in enumerate(used)) if used else 1.0
        return -self.table[mb].exp() * weight, torch.arange(len(mb) + 1)


TOY = [SharedPrompt(torch.tensor([0, 1]), [torch.tensor([4, 5]), torch.tensor([6])]), torch.tensor([7, 8])]
TOY += [SharedPrompt(None, [torch.tensor([9])]), SharedPrompt(torch.tensor([2]), [torch.tensor([3])])]
SEVEN = PreferenceGroups.from_lists([[True, False, False], [True, False, True, False]])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "give",
    [
        lambda x: (x,),
        lambda x: [None, x.exp(), x],
        lambda x: (x, x, 2 * x),  # the same tensor twice
        lambda x: (x.detach(), torch.arange(1, 3), x),  # without a gradient; of integers
        lambda x: (x.detach(),),
        lambda x: (x.sum() * x, x.view(1, -1)),
        lambda x: (),
    ],
)
def test_any_tensors_are_a_prefix(give: Callable[[Tensor], Any], strategy: str) -> None:
    toy = Toy(give)
    token_logps, cu_seqlens, auxiliary = forward_parts(TOY, toy)
    assert cu_seqlens.tolist() == list(range(8)) and not auxiliary
    assert toy.calls == ["prefix", "rows", "rows", "rows", "rows", "prefix", "rows"]
    expected = preference_loss(token_logps, cu_seqlens, SEVEN, MPO, torch.zeros(7))
    (gradient,) = torch.autograd.grad(expected.loss, toy.table)
    toy.calls.clear()
    found = group_backward(TOY, toy, SEVEN, MPO, torch.zeros(7), strategy=strategy)
    assert toy.calls.count("prefix") == (4 if strategy == "two_pass" else 2)
    torch.testing.assert_close(found.loss, expected.loss.detach())
    torch.testing.assert_close(toy.table.grad, gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("parts", "give", "options", "message"),
    [
        (TOY, lambda x: x, {}, r"forward.prefix must give a tuple of tensors or None; got Tensor"),
        (TOY, lambda x: None, {}, r"forward.prefix must give a tuple of tensors or None; got NoneType"),
        (TOY, lambda x: (x, 3), {}, r"forward.prefix must give a tuple of tensors or None; got tuple"),
        ([SharedPrompt(torch.tensor([0]), [])], None, {}, "micro_batches must hold at least one for each SharedPrompt"),
        (TOY, lambda x: (x,), {"strategy": "one_pass", "gradient_bytes": 100}, "32 bytes for the prompts they share"),
        (TOY[:1], lambda x: (x,), {}, "micro_batches must hold the 7 sequences of groups; these 2 hold 3"),
    ],
)
def test_bad_calls(parts: Any, give: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        group_backward(parts, Toy(give), SEVEN, MPO, torch.zeros(7), **options)


def test_a_forward_without_the_two_methods() -> None:
    def alone(mb: Tensor) -> Any:
        return -mb.double(), torch.arange(len(mb) + 1)

    message = "forward must have the methods prefix and rows for a SharedPrompt; got alone"
    with pytest.raises(TypeError, match=message):
        group_backward(TOY, alone, SEVEN, MPO, torch.zeros(7))
    with pytest.raises(TypeError, match=message):
        forward_parts(TOY, alone)


def test_a_plan_of_a_sharded_step_changes_no_other() -> None:
    """A plan runs a prompt of its own three times, as under FSDP; a step beside it, in another thread, once."""

    def prompts_run() -> int:
        toy = Toy(lambda x: (x,))
        three = PreferenceGroups.from_lists([[True, False, False]])
        group_backward(TOY[:1], toy, three, MPO, torch.zeros(3))
        return toy.calls.count("prefix")

    with ThreadPoolExecutor(1) as other:
        with planned_as_sharded():
            assert (prompts_run(), other.submit(prompts_run).result()) == (3, 1)
            with contextlib.suppress(KeyError), planned_as_sharded():
                raise KeyError("out of memory, say")
            assert prompts_run() == 3
            assert (prompts_run(), other.submit(prompts_run).result()) == (3, 1)
        assert (prompts_run(), other.submit(prompts_run).result()) == (1, 1)


def test_a_prefix_that_changes_is_reported() -> None:
    noise = itertools.count()
    with pytest.warns(UserWarning, match="pass 2 does not repeat pass 1"):
        group_backward(TOY, Toy(lambda x: (x + 0.1 * next(noise),)), SEVEN, MPO, torch.zeros(7))


def test_the_random_state_survives_an_error_in_a_prefix() -> None:
    calls = itertools.count()

    def give(x: Tensor) -> Any:
        torch.rand(3)
        if next(calls) == 3:  # the second prompt of pass 2
            raise KeyError("out of memory, say")
        return (x,)

    torch.manual_seed(0)
    with pytest.raises(KeyError):
        group_backward(TOY, Toy(give), SEVEN, MPO, torch.zeros(7))
    found = torch.rand(1)
    torch.manual_seed(0)
    torch.rand(3), torch.rand(3)
    assert found == torch.rand(1)


# -------------------------------------------------------------------------------------------------------------- batches

shapes = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=2, max_size=6)), min_size=1, max_size=6
)


@given(shapes, st.integers(16, 40) | st.none(), st.integers(1, 5) | st.none(), st.booleans(), st.booleans())
def test_batches_hold_every_sequence_within_the_limits(
    given_shapes: Any, max_tokens: int | None, max_sequences: int | None, sort: bool, together: bool
) -> None:
    groups = groups_of(*given_shapes)
    step = collate(
        groups,
        max_tokens=max_tokens,
        max_sequences=max_sequences,
        sort=sort,
        share_prompt=True,
        prompts_together=together,
    )
    wanted = [(g.prompt.tolist(), r.tolist()) for g in groups for r in g.responses]
    found: list[tuple[list[int], list[int]]] = []
    computed = 0
    for part in step.parts:
        prompt, micro_batches = part if isinstance(part, SharedPrompt) else (None, [part])
        cost = 0 if prompt is None else prompt.input_ids.numel()
        computed += cost + sum(mb.input_ids.numel() for mb in micro_batches)
        heads: list[list[int]] = []
        if prompt is not None:
            assert together or len(prompt.input_ids) == 1
            mask = prompt.inputs.get("attention_mask", torch.ones_like(prompt.input_ids)).bool()
            heads = [ids[live].tolist() for ids, live in zip(prompt.input_ids, mask)]
            for positions, live in zip(prompt.inputs["position_ids"], mask):
                assert positions[live].tolist() == list(range(int(live.sum()))) and live[-1]
        for mb in micro_batches:
            assert max_tokens is None or cost + mb.input_ids.numel() <= max_tokens
            assert max_sequences is None or len(mb.input_ids) <= max_sequences
            for i, (ids, targets) in enumerate(zip(mb.input_ids, mb.targets)):
                live = targets != -100
                response = targets[live].tolist()
                if prompt is None:
                    begin = int(live.nonzero()[0]) + 1
                    found.append((ids[:begin].tolist(), response))
                    continue
                head = heads[int(mb.inputs["prompt_of"][i]) if "prompt_of" in mb.inputs else 0]
                found.append(([*head, int(ids[0])], response))
                assert ids[: len(response)].tolist() == [int(ids[0]), *response[:-1]]
                positions = mb.inputs["position_ids"][i]
                assert positions[live].tolist() == list(range(len(head), len(head) + len(response)))
                assert positions.max() < len(head) + len(response)  # no position that the whole sequence lacks
            assert torch.equal(mb.live(mb.targets), mb.targets[mb.targets != -100])
            assert mb.cu_seqlens.diff().tolist() == (mb.targets != -100).sum(1).tolist()
    assert step.computed_tokens == computed
    back: list[Any] = [None] * len(found)
    for place, sequence in zip(step.order.tolist(), found):
        back[place] = sequence
    assert back == wanted
    if not sort:
        assert found == wanted


def test_padding_of_prompts_is_bounded() -> None:
    """Prompts run together only where that pads them by a quarter at most; one of a single token shares nothing."""
    for lengths, parts in {(9, 9): 1, (9, 6): 1, (9, 5): 2, (1, 9): 2, (9, 1, 9): 3, (9, 8, 9): 1}.items():
        step = collate(groups_of(*((p, [2, 3]) for p in lengths)), share_prompt=True)
        assert len(step.parts) == parts, lengths
        assert sum(isinstance(part, SharedPrompt) for part in step.parts) == parts - lengths.count(1)


def test_moving_a_batch() -> None:
    step = shared().to("meta")
    first = step.parts[0]
    tensors = [first.prompt.input_ids, *first.prompt.inputs.values(), *first.micro_batches[0].inputs.values()]
    assert all(x.device.type == "meta" for x in tensors)


def test_the_example_in_plain_pytorch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    apart, tokens, whole_tokens = importlib.import_module("shared_prompt").main()
    assert apart < 1e-12 and tokens < 0.4 * whole_tokens
    assert "shared         : loss 26." in capsys.readouterr().out
