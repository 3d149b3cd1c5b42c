"""`patch_trl()` against TRL itself: its one function, its error against float64, and the trainers that call it."""

from __future__ import annotations

import ast
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_trl
import torch
import trl
import trl.trainer.utils
from datasets import Dataset
from tiny_models import make
from torch import Tensor
from transformers import LlamaForCausalLM

from groupdpo_kernels.integrations.trl import OUTPUTS, TokenStatistics, patch_trl, unpatch_trl
from groupdpo_kernels.reference import HeadOptions, LogpStats
from groupdpo_kernels.testing import CASES, Case, check_budget, make_inputs, run

ORIGINAL = trl.trainer.utils._ChunkedLogProbFunction
FIVE = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer")
TILE = 2**15  # the vocabulary chunk that TRL asks for


def current() -> Any:
    return trl.trainer.utils._ChunkedLogProbFunction


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    unpatch_trl()
    assert current() is ORIGINAL


# ------------------------------------------------------------------------------------------------------- the function


def scored(compact: bool) -> Callable[..., LogpStats]:
    """TRL's call around its function, as in add_fused_lm_head: ignored rows are left out (GPU), or scored as token 0
    and masked. There is no lse; the upstream gradient into it must be zero.
    """

    def function(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Any, _: Any, o: HeadOptions) -> LogpStats:
        mask = targets != -100
        rows = (hidden[mask], targets[mask]) if compact else (hidden, targets.clamp(min=0))
        outputs = current().apply(rows[0], weight, bias, rows[1], o.temperature, TILE, o.softcap, o.logit_scale)
        if compact:
            filled = [x.new_zeros(mask.shape).masked_scatter(mask, x) for x in outputs]
        else:
            filled = [x.view(mask.shape).masked_fill(~mask, 0) for x in outputs]
        logps, entropy, squares, mean, top1 = filled
        return LogpStats(logps, torch.zeros_like(logps), entropy, mean, squares, top1)

    return function


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "masked"])
@pytest.mark.parametrize("case", [c for c in CASES if not (c.R or c.leading)], ids=lambda c: c.name)
def test_error_is_at_most_twice_that_of_eager(case: Case, compact: bool) -> None:
    inputs = make_inputs(case)
    inputs = replace(inputs, d_lse=torch.zeros_like(inputs.d_lse))
    with patch_trl():
        actual = run(scored(compact), inputs, case.options)
    del actual["lse"]
    check_budget(actual, inputs, case.options)


def leaves(dtype: torch.dtype, weight: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, targets."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((70, 48), (600, 48), (600,))
    hidden, head, bias = (torch.randn(*shape, generator=generator) * shape[-1] ** -0.25 for shape in shapes)
    dtypes = (dtype, weight or dtype, weight or dtype)
    a, b, c = (x.to(d).requires_grad_() for x, d in zip((hidden, head, bias), dtypes))
    return a, b, c, torch.randint(0, 600, (70,), generator=generator)


def gradients(log_probs: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(log_probs.shape, generator=generator).to(log_probs)
    return torch.autograd.grad(log_probs, inputs, upstream, retain_graph=True)


@pytest.mark.parametrize("chunk_size", [64, TILE])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, None), (torch.float64, None), (torch.float32, torch.bfloat16)], ids=str
)
def test_all_arguments_and_outputs_are_those_of_trl(dtypes: tuple[Any, Any], chunk_size: int) -> None:
    """Mixed dtypes come from cast_lm_head_to_fp32; results follow the hidden states, gradients each its own input."""
    *inputs, targets = leaves(*dtypes)
    for tail in ((), (3.0, 1.5), (None, 0.5, ("log_probs",)), (3.0, 1.0, OUTPUTS[1::2]), (None, 1.0, OUTPUTS[:1])):
        expected = ORIGINAL.apply(*inputs, targets, 0.7, chunk_size, *tail)
        with patch_trl():
            actual = current().apply(*inputs, targets, 0.7, chunk_size, *tail)
        assert [x is None for x in actual] == [x is None for x in expected]
        for a, b in zip(actual, expected):
            if a is not None:
                assert (a.dtype, a.requires_grad) == (b.dtype, b.requires_grad)
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for got, wanted in zip(actual[:2], expected[:2]):  # log_probs, and the entropy where it is asked for
            if got is None:
                continue
            for a, b in zip(gradients(got, *inputs), gradients(wanted, *inputs)):
                torch.testing.assert_close(a, b, rtol=max(1e-4, torch.finfo(a.dtype).eps), atol=1e-5)


def test_autocast() -> None:
    """Parameters in float32, the product in bfloat16: what a TRL trainer does by default."""
    *inputs, targets = leaves(torch.float32)
    hidden, weight, bias = inputs

    def eager() -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight, bias)
        return logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    wide = [x.detach().double().requires_grad_() for x in inputs]
    z = torch.nn.functional.linear(*wide).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    truth = (z.detach(), *gradients(z, *wide))
    results = []
    with torch.autocast("cpu", torch.bfloat16), patch_trl():
        for log_probs in (current().apply(*inputs, targets, 1.0, TILE)[0], eager()):
            results.append((log_probs.detach(), *gradients(log_probs, *inputs)))
    for ours, peer, exact in zip(*results, truth):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() <= 2 * (peer - exact).norm()


def test_frozen_inputs_and_no_rows() -> None:
    hidden, weight, bias, targets = leaves(torch.float32)
    with patch_trl():
        frozen = current().apply(hidden, weight.detach(), bias.detach(), targets, 1.0, TILE)
        expected = ORIGINAL.apply(hidden, weight.detach(), bias.detach(), targets, 1.0, TILE)
        torch.testing.assert_close(gradients(frozen[0], hidden), gradients(expected[0], hidden), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            assert not any(x.requires_grad for x in current().apply(hidden, weight, bias, targets, 1.0, TILE))
        empty = current().apply(hidden[:0], weight, None, targets[:0], 1.0, TILE)
        assert not torch.autograd.grad(empty[0].sum(), weight)[0].any()


def test_compiled() -> None:
    hidden, weight, _, targets = leaves(torch.float32)

    def loss() -> Tensor:
        log_probs, entropy, *_ = current().apply(hidden, weight, None, targets, 1.0, TILE)
        return log_probs.sum() + entropy.square().sum()

    with patch_trl():
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)()
        expected = torch.autograd.grad(loss(), (hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(compiled, (hidden, weight)), expected)


def test_what_trl_can_and_we_cannot_is_an_error() -> None:
    hidden, weight, bias, targets = leaves(torch.float32)
    with patch_trl():
        with pytest.raises(ValueError, match="targets must be in"):
            current().apply(hidden, weight, bias, targets - 100, 1.0, TILE)
        with pytest.raises(ValueError, match="temperature must be positive"):
            current().apply(hidden, weight, bias, targets, -1.0, TILE)
        weight.ds_id = 0  # the mark of a parameter that ZeRO-3 shards
        with pytest.raises(RuntimeError, match="ZeRO-3"):
            current().apply(hidden, weight, bias, targets, 1.0, TILE)
        with torch.no_grad():  # a reference model is scored while its head is gathered
            current().apply(hidden, weight, bias, targets, 1.0, TILE)


# ------------------------------------------------------------------------------------------------- there and back again


def test_accelerate_and_restore() -> None:
    unpatch_trl()
    assert current() is ORIGINAL
    patch_trl()
    patch_trl()
    assert current() is trl.kernels.ChunkedLogProbFunction is TokenStatistics
    unpatch_trl()
    assert current() is trl.kernels.ChunkedLogProbFunction is ORIGINAL


def test_contexts_nest_and_overlap() -> None:
    with patch_trl() as outer:
        with patch_trl():
            pass
        assert current() is TokenStatistics
        inner = patch_trl()
    assert current() is TokenStatistics  # inner has not ended
    inner.__exit__()
    assert current() is ORIGINAL
    with outer, pytest.raises(KeyError):
        assert current() is TokenStatistics
        raise KeyError
    assert current() is ORIGINAL
    with patch_trl():
        unpatch_trl()
        assert current() is ORIGINAL
        patch_trl()
    assert current() is TokenStatistics


def test_threads() -> None:
    barrier = threading.Barrier(8)
    seen = []

    def work() -> None:
        barrier.wait()
        for _ in range(20):
            with patch_trl():
                seen.append(current())
        barrier.wait()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert current() is ORIGINAL and seen == [TokenStatistics] * 160


def test_modules_that_hold_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imported by name before, or while accelerated: both come back."""
    before, during = types.ModuleType("trl.before"), types.ModuleType("trl.during")
    before.score = current()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trl.before", before)
    with patch_trl():
        assert vars(before)["score"] is TokenStatistics
        during.score = current()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "trl.during", during)
    assert vars(before)["score"] is vars(during)["score"] is ORIGINAL


@pytest.mark.parametrize("version", ["1.14.2", "2.0.0", "0.29.1", "unknown"])
def test_unknown_versions_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(RuntimeError, match=f"TRL 1.15 and later, before 2.0; installed is {version}"):
        patch_trl()


class Of114(torch.autograd.Function):
    """The arguments of TRL 1.14's."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, last_hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0
    ):
        raise NotImplementedError


@pytest.mark.parametrize("function, said", [(Of114, "it takes .last_hidden, weight"), (None, "is None, not an")])
def test_unknown_functions_are_refused(monkeypatch: pytest.MonkeyPatch, function: Any, said: str) -> None:
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", function)
    with pytest.raises(RuntimeError, match=rf"TRL 1.15 and later.*installed {trl.__version__}.*{said}"):
        patch_trl()
    assert current() is function


# ------------------------------------------------------------------------------------------------------- real trainers

PROMPTS = ["Tea?", "How long does tea steep?", "Be brief.", "Hi."]
CHOSEN = [" Green.", " Three minutes.", " Hello.", " Hello. Tea?"]
REJECTED = [" Coffee.", " An hour. No idea.", " No.", " No idea."]
COMMON = tiny_trl.COMMON | {"max_steps": 3}


def sft(model: Any, tokenizer: Any, **common: Any) -> Any:
    rows = Dataset.from_dict({"prompt": PROMPTS, "completion": CHOSEN})
    return trl.SFTTrainer(model, args=trl.SFTConfig(**common), train_dataset=rows, processing_class=tokenizer)


def dpo(model: Any, tokenizer: Any, **common: Any) -> Any:
    rows = Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED})
    config = trl.DPOConfig(**common, beta=0.5, use_weighting=True)  # WPO: every output is asked for
    return trl.DPOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)


def dpo_lora(model: Any, tokenizer: Any, **common: Any) -> Any:
    """The head is frozen, and the reference is the model without its adapter."""
    rows = Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED})
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    config = trl.DPOConfig(**common)
    return trl.DPOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=lora)


def kto(model: Any, tokenizer: Any, **common: Any) -> Any:
    completions = CHOSEN[:2] + REJECTED[2:]
    rows = Dataset.from_dict({"prompt": PROMPTS, "completion": completions, "label": [True, True, False, False]})
    return trl.KTOTrainer(model, args=trl.KTOConfig(**common), train_dataset=rows, processing_class=tokenizer)


BONUS = {"entropy_coef": 0.5}  # GRPO's bonus for the entropy: its gradient then moves the weights
ADAPTIVE = {"use_adaptive_entropy": True, "entropy_coef": 0.3, "entropy_target": 9.0, "top_entropy_quantile": 0.7}


def sampled(name: str, model: Any, tokenizer: Any, **common: Any) -> Any:
    """GRPO and RLOO: sampling at a temperature, an advantage that differs in the group, a reference model."""
    settings = {"num_generations": 2, "max_completion_length": 6, "temperature": 0.7, "beta": 0.1}
    config = getattr(trl, f"{name}Config")(**common, **settings)

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 7) for text in completions]

    trainer = getattr(trl, f"{name}Trainer")
    return trainer(model, reward, config, Dataset.from_dict({"prompt": PROMPTS}), processing_class=tokenizer)


TRAINERS: dict[str, Callable[..., Any]] = {
    "SFT": sft,
    "DPO": dpo,
    "DPO-LoRA": dpo_lora,
    "KTO": kto,
    "GRPO": lambda *args, **common: sampled("GRPO", *args, **common),
    "GRPO with an entropy bonus": lambda *args, **common: sampled("GRPO", *args, **common, **BONUS),
    "GRPO with an adaptive bonus": lambda *args, **common: sampled("GRPO", *args, **common, **ADAPTIVE),
    "RLOO": lambda *args, **common: sampled("RLOO", *args, **common),
}


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path, because TRL loads the reference from where the model came."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make("llama").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    return tmp_path / "model"


def trained(name: str, checkpoint: Path, tokenizer: Any, **changes: Any) -> tuple[Any, Tensor, Tensor]:
    """The trainer after its run; the trainable weights before and after."""
    settings = {**COMMON, "output_dir": str(checkpoint.parent / "run"), **changes}
    trainer = TRAINERS[name](LlamaForCausalLM.from_pretrained(checkpoint), tokenizer, **settings)

    def weights() -> Tensor:
        return torch.cat([x.detach().flatten() for x in trainer.model.parameters() if x.requires_grad])

    start = weights()
    trainer.train()
    return trainer, start, weights()


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers(name: str, checkpoint: Path, bpe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run twice: the same log but for timings, the same weights, and each run on its own function alone."""
    calls: dict[Any, int] = {}

    def count(owner: Any) -> None:
        apply = owner.apply

        def counted(*arguments: Any) -> Any:
            calls[owner] = calls.get(owner, 0) + 1
            return apply(*arguments)

        monkeypatch.setattr(owner, "apply", counted)

    count(TokenStatistics)
    count(ORIGINAL)
    stock, start, expected = trained(name, checkpoint, bpe)
    assert calls.keys() == {ORIGINAL}
    with patch_trl():
        ours, _, weights = trained(name, checkpoint, bpe)
    assert calls[TokenStatistics] == calls[ORIGINAL] >= COMMON["max_steps"]

    moved = (expected - start).norm()
    assert moved > 1e-3 * start.norm() and (weights - expected).norm() < 1e-4 * moved
    logs = ours.state.log_history, stock.state.log_history
    assert len(logs[0]) == len(logs[1]) == COMMON["max_steps"] + 1
    for row, wanted in zip(*logs):
        names = [key for key in wanted if not any(word in key for word in ("runtime", "_per_second", "time"))]
        assert row.keys() == wanted.keys() and any("loss" in key for key in names)
        torch.testing.assert_close([row[k] for k in names], [wanted[k] for k in names], rtol=1e-4, atol=1e-5)


def test_ld_alpha_with_precomputed_references_starts_at_ln_2(checkpoint: Path, bpe: Any) -> None:
    """Both sides weigh the tokens past the shorter response alike, the reference before training too."""
    rows = Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED})
    settings = {**COMMON, "output_dir": str(checkpoint.parent / "run"), "max_steps": 2, "ld_alpha": 0.4, "beta": 0.5}
    losses = []
    for precompute in (False, True):
        with patch_trl():
            config = trl.DPOConfig(**settings, precompute_ref_log_probs=precompute)
            model = LlamaForCausalLM.from_pretrained(checkpoint)
            trainer = trl.DPOTrainer(model, args=config, train_dataset=rows, processing_class=bpe)
            trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0][0] == pytest.approx(0.6931472, abs=1e-5) and losses[0][1] != losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_twenty_steps_of_dpo(checkpoint: Path, bpe: Any) -> None:
    """Loss within 1e-5 at every step, the gradient's norm within 1e-4 of itself."""
    settings = {"max_steps": 20, "learning_rate": 0.02}
    stock, start, expected = trained("DPO", checkpoint, bpe, **settings)
    with patch_trl():
        ours, *_ = trained("DPO", checkpoint, bpe, **settings)
    rows = [(a, b) for a, b in zip(ours.state.log_history, stock.state.log_history) if "loss" in b]
    assert len(rows) == 20 and (expected - start).norm() > 1e-3 * start.norm()
    assert rows[-1][1]["loss"] < rows[0][1]["loss"] - 0.05
    assert max(abs(a["loss"] - b["loss"]) for a, b in rows) < 1e-5
    assert max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in rows) < 1e-4


def test_a_trainer_in_bfloat16(checkpoint: Path, bpe: Any) -> None:
    """TRL's default, autocast over float32 weights: at most twice as far from the float32 run as TRL's own."""
    *_, exact = trained("DPO", checkpoint, bpe)
    *_, stock = trained("DPO", checkpoint, bpe, bf16=True)
    with patch_trl():
        *_, ours = trained("DPO", checkpoint, bpe, bf16=True)
    assert 0 < (ours - exact).norm() <= 2 * (stock - exact).norm()


def test_the_docs_name_every_experimental_trainer() -> None:
    """Served are those that call TRL's fused head, or inherit from one of the five that do and read no logits."""
    served, others = set(), set()
    for path in (Path(trl.__file__).parent / "experimental").rglob("*trainer.py"):
        source = path.read_text()
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Trainer"):
                inherits = {ast.unparse(base).strip("_") for base in node.bases} & set(FIVE)
                reads = ".logits" in source
                (served if not reads and (inherits or "fused_lm_head" in source) else others).add(node.name)
    page = (Path(__file__).parents[1] / "docs" / "get-started" / "trl.md").read_text()
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.count("|") == 4]
    told = {yes: set[str]() for yes in (True, False)}
    for names, patched in rows:
        told[patched.strip() == "yes"] |= {name.rpartition(".")[2] for name in re.findall(r"`([\w.]+Trainer)`", names)}
    assert served == told[True] and others == told[False]
