"""The backward by micro-batches against the backward of the whole group, on real models."""

import contextlib
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from groupdpo_kernels import (
    AdaBalance,
    Objective,
    PreferenceGroups,
    PreferenceLoss,
    group_backward,
    model_logps,
    preference_loss,
)
from groupdpo_kernels.preference.losses import LOSSES

RAGGED = [[False, True, False], [True, False], [False, True, True, False, False, True]]
S = 11
SPLITS = [[S], [1] * S, [2, 4, 5], [4, 0, 7], [3, 2, 6]]  # the last one is by group; the others cross groups
MPO = Objective("mpo", beta=3.0, average=True, nll_weight=1.0)

Batch = tuple[Tensor, Tensor, Tensor]


def llama(dtype: torch.dtype = torch.float64, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=61, **options
    )
    return LlamaForCausalLM(config).to(dtype)


def gpt2(dtype: torch.dtype = torch.float64) -> GPT2LMHeadModel:
    """Dropout on embeddings, attention and residuals."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=61, n_positions=32)).to(dtype)


def responses(n: int = S, seed: int = 0, V: int = 61) -> list[tuple[Tensor, Tensor]]:
    """(input_ids, targets) of n responses after a prompt of 3 tokens, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        ids = torch.randint(0, V, (5 + (3 * i) % 7,), generator=generator)
        targets = torch.cat([ids[1:], ids.new_tensor([-100])])
        targets[:2] = -100
        rows.append((ids, targets))
    return rows


def split(rows: list[tuple[Tensor, Tensor]], sizes: list[int]) -> list[Batch]:
    """Micro-batches (input_ids, targets, cu_seqlens), right-padded."""
    batches, rest = [], iter(rows)
    for size in sizes:
        part = list(itertools.islice(rest, size)) or [(torch.zeros(1, dtype=torch.long), torch.tensor([-100]))]
        ids = nn.utils.rnn.pad_sequence([x for x, _ in part], batch_first=True)
        targets = nn.utils.rnn.pad_sequence([y for _, y in part], batch_first=True, padding_value=-100)
        lengths = (targets != -100).sum(1)[:size]
        batches.append((ids, targets, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])))
    return batches


def forward_of(model: nn.Module) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    def forward(batch: Batch) -> tuple[Tensor, Tensor]:
        input_ids, targets, cu_seqlens = batch
        return model_logps(model, input_ids, targets)[targets != -100], cu_seqlens

    return forward


def coupled(
    batches: list[Any], forward: Callable, groups: PreferenceGroups, objective: Objective, ref: Any, scale: float = 1.0
) -> PreferenceLoss:
    """The graph of everything at once."""
    runs = [forward(batch) for batch in batches]
    starts = itertools.accumulate((run[0].shape[0] for run in runs), initial=0)
    offsets = torch.cat([runs[0][1][:1], *(run[1][1:] + start for run, start in zip(runs, starts))])
    result = preference_loss(torch.cat([run[0] for run in runs]), offsets, groups, objective, ref)
    (scale * (result.loss + sum(run[2] for run in runs if len(run) == 3))).backward()
    return result


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def reference(n: int = S, dtype: torch.dtype = torch.float64) -> Tensor:
    return -20 * torch.rand(n, generator=torch.Generator().manual_seed(9), dtype=dtype)


def check_equal(
    model: nn.Module,
    batches: list[Any],
    groups: PreferenceGroups,
    objective: Objective,
    ref: Tensor | None,
    forward: Callable | None = None,
    **options: Any,
) -> None:
    """The same results, gradients and random state, to float64 rounding."""
    forward = forward or forward_of(model)
    torch.manual_seed(1)
    expected = coupled(batches, forward, groups, objective, ref, options.get("scale", 1.0))
    expected_gradients, expected_state = take_gradients(model), torch.get_rng_state()
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="pass 2")
        found = group_backward(batches, forward, groups, objective, ref, **options)
    assert torch.equal(torch.get_rng_state(), expected_state)
    gradients = take_gradients(model)
    assert gradients.keys() == expected_gradients.keys()
    assert not any(x.requires_grad for x in found)
    for a, b in itertools.chain(zip(found, expected), ((gradients[k], expected_gradients[k]) for k in gradients)):
        torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_two_passes_equal_the_coupled_backward(sizes: list[int]) -> None:
    groups, batches = PreferenceGroups.from_lists(RAGGED), split(responses(), sizes)
    check_equal(llama(), batches, groups, MPO, reference(), scale=0.25)


@pytest.mark.parametrize("sizes", SPLITS[2:4], ids=str)
def test_dropout_is_replayed(sizes: list[int]) -> None:
    check_equal(gpt2().train(), split(responses(), sizes), PreferenceGroups.from_lists(RAGGED), MPO, reference())


def test_gradients_accumulate() -> None:
    model, groups, batches = llama(), PreferenceGroups.from_lists(RAGGED), split(responses(), [4, 7])
    forward = forward_of(model)
    group_backward(batches, forward, groups, MPO, reference())
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    group_backward(batches, forward, groups, MPO, reference(), scale=torch.tensor(2.0))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 3 * once[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("strategy", ["two_pass", "one_pass"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_objective(loss: str, strategy: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(61, 6), nn.Dropout(0.2), nn.Linear(6, 61), nn.LogSoftmax(-1)).double()

    def forward(batch: Batch) -> tuple[Tensor, Tensor]:
        ids, targets, cu = batch
        live = targets != -100
        return model(ids)[live].gather(1, targets[live][:, None])[:, 0], cu

    row = LOSSES[loss]
    lists = RAGGED if row.group or row.every_pair else [[True, False], [False, True]]
    lists = [sorted(group, reverse=True) for group in lists] if row.ranks else lists
    balance = None if row.no_balance else AdaBalance()
    objective = Objective(loss, beta=0.7, nll_weight=0.3, label_smoothing=0.1, gamma=0.2, alpha=0.01, balance=balance)
    n = sum(map(len, lists))
    batches = split(responses(n), [1, n - 1])
    check_equal(model, batches, PreferenceGroups.from_lists(lists), objective, reference(n), forward, strategy=strategy)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable", "ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = gpt2().train()  # with dropout
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    check_equal(model, split(responses(), [5, 6]), PreferenceGroups.from_lists(RAGGED), MPO, reference())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable", "ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("strategy", ["two_pass", "one_pass"])
def test_reentrant_checkpoints_hide_the_parameters_given(strategy: str) -> None:
    """With LoRA torch says nothing: no leaf comes before the checkpoint, and the gradients would be missing."""
    model = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    adapters = [p for p in model.parameters() if p.requires_grad]
    arguments = split(responses(), [5, 6]), forward_of(model), PreferenceGroups.from_lists(RAGGED), MPO, reference()
    with pytest.raises(ValueError, match="forward must not use reentrant checkpoints where parameters is given"):
        group_backward(*arguments, strategy=strategy, parameters=adapters)


@pytest.mark.parametrize(
    ("strategy", "sizes"), [("two_pass", SPLITS[2]), ("one_pass", SPLITS[2]), ("one_pass", [1] * S)]
)
def test_lora(strategy: str, sizes: list[int]) -> None:
    config = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], lora_dropout=0.3, fan_in_fan_out=True)
    model = get_peft_model(gpt2(), config).train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    groups, batches = PreferenceGroups.from_lists(RAGGED), split(responses(), sizes)
    check_equal(model, batches, groups, MPO, reference(), strategy=strategy, scale=2.0)
    adapters = [p for name, p in model.named_parameters() if "lora_A" in name]
    group_backward(batches, forward_of(model), groups, MPO, reference(), strategy=strategy, parameters=adapters)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if "lora_A" in name
    }


@pytest.mark.parametrize("strategy", ["two_pass", "one_pass"])
def test_an_auxiliary_loss_is_added_as_it_is(strategy: str) -> None:
    model = gpt2().eval()
    forward_logps = forward_of(model)

    def forward(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        token_logps, cu_seqlens = forward_logps(batch)
        return token_logps, cu_seqlens, 0.1 * model.lm_head.weight.square().sum() + token_logps.square().sum()

    batches = split(responses(), [4, 7])
    check_equal(
        model, batches, PreferenceGroups.from_lists(RAGGED), MPO, reference(), forward, strategy=strategy, scale=3.0
    )


def test_reference_by_token() -> None:
    batches = split(responses(), [2, 9])
    T = sum(int(cu[-1]) for _, _, cu in batches)
    check_equal(llama(), batches, PreferenceGroups.from_lists(RAGGED), Objective("softmax", beta=1.0), reference(T))


def error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    return max(float((found[k].double() - g).norm() / (1e-30 + g.norm())) for k, g in truth.items())


@pytest.mark.parametrize("autocast", [False, True])
def test_error_budget_in_low_precision(autocast: bool) -> None:
    """Against float64 no worse than twice the coupled backward at the same precision, autocast's cache included."""
    groups, batches = PreferenceGroups.from_lists(RAGGED), split(responses(), [4, 7])
    gradients = {}
    for name, dtype in {"truth": torch.float64, "coupled": torch.float32, "two_pass": torch.float32}.items():
        model = llama(dtype)
        run = group_backward if name == "two_pass" else coupled
        context = torch.autocast("cpu", torch.bfloat16) if autocast and name != "truth" else contextlib.nullcontext()
        with context:
            run(batches, forward_of(model), groups, MPO, reference())
        gradients[name] = take_gradients(model)
    budget = 2 * error(gradients["coupled"], gradients["truth"]) + 8 * torch.finfo(torch.float32).eps
    assert error(gradients["two_pass"], gradients["truth"]) <= budget


# ----------------------------------------------------------------------------------------------------------- the memory


class SavedBytes:
    """Bytes that autograd keeps for the backward, each storage once, without parameters: now and at most."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.uses: dict[int, int] = {}
        self.now = self.peak = 0

    def keep(self, x: Tensor) -> "Kept":
        return Kept(self, x)

    def count(self, x: Tensor, step: int) -> None:
        storage = x.untyped_storage()
        if storage.data_ptr() in self.parameters:
            return
        uses = self.uses.get(storage.data_ptr(), 0) + step
        self.uses[storage.data_ptr()] = uses
        if uses == (step > 0):  # the first use, or the end of the last one
            self.now += step * storage.nbytes()
        self.peak = max(self.peak, self.now)


class Kept:
    def __init__(self, account: SavedBytes, x: Tensor) -> None:
        self.account, self.x = account, x
        account.count(x, 1)

    def __del__(self) -> None:
        self.account.count(self.x, -1)


def test_memory_is_flat_in_the_group_size() -> None:
    model, peaks = llama(torch.float32), {}
    for run, n in itertools.product((coupled, group_backward), (4, 16)):
        groups = PreferenceGroups.from_lists([[True, False] * (n // 2)])
        batches = split([responses(2)[1]] * n, [1] * n)
        account = SavedBytes(model)
        with torch.autograd.graph.saved_tensors_hooks(account.keep, lambda kept: kept.x):
            run(batches, forward_of(model), groups, MPO, reference(n, torch.float32))
        assert account.now == 0
        peaks[run.__name__, n] = account.peak
    assert peaks["coupled", 16] > 3.5 * peaks["coupled", 4]
    # Beyond the graph of one micro-batch there are only vectors of T and S.
    assert peaks["group_backward", 16] == peaks["group_backward", 4]
    assert peaks["coupled", 16] > 10 * peaks["group_backward", 16]


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["two_pass", "one_pass"])
def test_on_a_device(strategy: str) -> None:
    """Dropout drawn on the device is replayed, and its generator ends where a single pass leaves it."""
    model, groups = gpt2().cuda().train(), PreferenceGroups.from_lists(RAGGED).to("cuda")
    batches = [tuple(x.cuda() for x in batch) for batch in split(responses(), [4, 7])]
    states = []
    for run in (coupled, group_backward):
        torch.manual_seed(1)
        options = {"strategy": strategy} if run is group_backward else {}
        run(batches, forward_of(model), groups, MPO, reference().cuda(), **options)
        states.append((torch.cuda.get_rng_state(), take_gradients(model)))
    assert torch.equal(states[0][0], states[1][0])
    for name, gradient in states[0][1].items():
        torch.testing.assert_close(states[1][1][name], gradient, rtol=1e-7, atol=1e-10)
