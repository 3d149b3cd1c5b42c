"""Packed and padded rows agree with each sequence alone, or are refused; limits of positions and ids; odd heads."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from tiny_models import BASE, GPT2, VOCAB, make, spread
from torch import Tensor, nn

from groupdpo_kernels import model_logps
from groupdpo_kernels.data.batches import micro_batches
from groupdpo_kernels.models.layouts import why_not_packed, why_not_padded
from groupdpo_kernels.models.limits import position_limit, token_limit

NO_GQA = {name: value for name, value in BASE.items() if name != "num_key_value_heads"}
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
JAMBA = {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
JAMBA |= {"expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4}
OPT = {"ffn_dim": 48, "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
SIZES = {
    f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("ffn_dim", 48), ("attention_heads", 4))
}
PROPHETNET = {f"num_{k}" if "heads" in k else k: n for k, n in SIZES.items()} | {"vocab_size": VOCAB, "hidden_size": 32}
PROPHETNET |= {"num_encoder_layers": 1, "num_decoder_layers": 2, "max_position_embeddings": 64}
PROPHETNET |= {"is_decoder": True, "is_encoder_decoder": False}

# name: (model class, config class, config, whether sequences may share a row)
LAYOUTS: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", BASE, True),
    "mistral": ("MistralForCausalLM", "MistralConfig", BASE | {"sliding_window": 4}, True),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", BASE | {"head_dim": 8}, True),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", BASE | {"head_dim": 8, "sliding_window": 4}, True),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
        True,
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, True),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", GPT2 | {"rotary_dim": 8}, True),
    "opt": ("OPTForCausalLM", "OPTConfig", SMALL | OPT, False),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        False,
    ),
    "mpt": ("MptForCausalLM", "MptConfig", {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4}, False),
    "bert": ("BertLMHeadModel", "BertConfig", NO_GQA | {"is_decoder": True}, False),
    "roberta": ("RobertaForCausalLM", "RobertaConfig", NO_GQA | {"is_decoder": True, "pad_token_id": 1}, False),
    "mamba": ("MambaForCausalLM", "MambaConfig", SMALL | {"state_size": 4}, False),
    "falcon_mamba": ("FalconMambaForCausalLM", "FalconMambaConfig", SMALL | {"state_size": 4}, False),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", SMALL | {"attention_hidden_size": 32, "context_length": 64}, False),
    "jamba": ("JambaForCausalLM", "JambaConfig", BASE | JAMBA, False),
    "prophetnet": ("ProphetNetForCausalLM", "ProphetNetConfig", PROPHETNET, False),
}


def build(name: str) -> nn.Module:
    model_class, config_class, config, _ = LAYOUTS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**config))
    return spread(model).eval()


def sequences(*lengths: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [tuple(torch.randint(3, VOCAB - 9, (n,), generator=generator) for n in pair) for pair in lengths]  # type: ignore[misc]


def scores(model: nn.Module, layout: str, given: list[tuple[Tensor, Tensor]]) -> Tensor:  # (T,)
    (mb,) = micro_batches(given, layout)
    with torch.no_grad():
        return mb.live(model_logps(model, mb.input_ids, mb.targets, **mb.inputs))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.filterwarnings("ignore")
def test_each_layout_gives_what_the_sequences_give_apart(name: str) -> None:
    model, given = build(name), sequences((3, 2), (4, 5), (2, 3))
    apart = torch.cat([scores(model, "padded", [one]) for one in given])
    before = {n: (m.training, *vars(m)) for n, m in model.named_modules()}, torch.random.get_rng_state()
    why = why_not_packed(model)
    assert {n: (m.training, *vars(m)) for n, m in model.named_modules()} == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert bool(why) is not LAYOUTS[name][3], why
    if why:
        with pytest.raises(ValueError, match="position_ids must be .*" + type(model).__name__):
            scores(model, "packed", given)
        if name == "roberta":  # its positions begin behind the padding index
            with pytest.raises(ValueError, match="position_ids must be left out, or count as the model does"):
                scores(model, "packed", given[:1])
            return
        torch.testing.assert_close(scores(model, "packed", given[:1]), apart[: len(given[0][1])], atol=1e-4, rtol=1e-4)
    else:
        torch.testing.assert_close(scores(model, "packed", given), apart, atol=1e-4, rtol=1e-4)
    if why_not_padded(model):
        assert name == "prophetnet"
    else:
        torch.testing.assert_close(scores(model, "padded", given), apart, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mixtral", "bloom", "mamba", "jamba", "bert"])
def test_verdict_is_that_of_float32_in_bfloat16_training_and_autocast(name: str) -> None:
    half = build(name).bfloat16().train()
    assert bool(why_not_packed(half)) is not LAYOUTS[name][3]
    wide = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(why_not_packed(wide)) is not LAYOUTS[name][3]
    assert not why_not_padded(half) and half.training


@pytest.mark.parametrize("name", ["llama", "bloom", "mamba"])
def test_a_mask_over_a_packed_row_is_refused(name: str) -> None:
    """transformers looks for sequences in position_ids only where there is no mask. Padding on either side is fine."""
    model = build(name)
    ids = torch.arange(5, 11)[None]
    positions, ones = torch.tensor([[0, 1, 2, 0, 1, 2]]), torch.ones(1, 6, dtype=torch.long)
    with pytest.raises(ValueError, match="attention_mask must be left out where position_ids start again"):
        model_logps(model, ids, ids, attention_mask=ones, position_ids=positions)
    for left in ([1, 1, 0, 1, 2, 3], [0, 0, 0, 1, 2, 3]):
        mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
        model_logps(model, ids, ids, attention_mask=mask, position_ids=torch.tensor([left]))


def test_is_measured_once_for_each_attention_and_not_without_values() -> None:
    model = build("llama")
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert not why_not_packed(model) and not why_not_packed(model)
    once = len(calls)
    model.set_attn_implementation("eager")
    assert not why_not_packed(model)
    assert len(calls) == 2 * once == 10
    assert not why_not_packed(build("bloom").to("meta"))


def test_no_cache_where_use_cache_is_among_the_keywords() -> None:
    class Open(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
            seen.append(kwargs.get("use_cache"))
            return super().forward(input_ids, **kwargs)

    seen: list[Any] = []
    model = Open(transformers.LlamaConfig(**BASE)).train()
    scores(model, "packed", sequences((3, 2), (4, 5)))
    assert seen and set(seen) == {False}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, limit",
    [("gpt2", 64), ("opt", 64), ("bert", 64), ("roberta", 62), ("gptj", 64), ("llama", None), ("bloom", None)],
)
def test_positions_end_where_the_model_raises(name: str, limit: int | None) -> None:
    model = build(name)
    assert position_limit(model) == limit and token_limit(model) == VOCAB
    ids = torch.full((1, 80 if limit is None else limit), 7)
    assert model_logps(model, ids, ids).isfinite().all()
    if limit is not None:
        ids = torch.full((1, limit + 1), 7)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids)
        with pytest.raises(ValueError, match=f"input_ids must have at most {limit} positions.*; got {limit + 1}"):
            model_logps(model, ids, ids)


def test_packed_row_may_be_longer_than_the_positions() -> None:
    model, given = build("gpt2"), sequences((30, 20), (20, 30))
    apart = torch.cat([scores(model, "packed", [one]) for one in given])
    torch.testing.assert_close(scores(model, "packed", given), apart, atol=1e-4, rtol=1e-4)


def test_id_without_embedding_is_named() -> None:
    ids = torch.tensor([[5, VOCAB + 3, 6]])
    with pytest.raises(ValueError, match=rf"input_ids must be in \[0, {VOCAB}\), .*; got {VOCAB + 3}"):
        model_logps(build("llama"), ids, torch.full_like(ids, -100))


def test_prophetnet_takes_its_real_logits() -> None:
    model = build("prophetnet")
    ids = sequences((6, 1))[0][0][None]
    targets = ids.roll(-1)
    with pytest.warns(UserWarning, match="needs its real logits: its output head sees other positions"):
        found = model_logps(model, ids, targets)
    exact = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(found, exact)
    with pytest.raises(ValueError, match="strict=True"):
        model_logps(model, ids, targets, strict=True)


class Odd(transformers.LlamaForCausalLM):
    """Calls its head in another way."""

    way = "flat"

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None) -> Any:  # type: ignore[override]
        hidden = self.model(input_ids, attention_mask, position_ids, use_cache=False)[0]
        B, L, D = hidden.shape
        head = self.lm_head
        if self.way == "flat":
            logits = head(hidden.reshape(B * L, D)).reshape(B, L, -1)
        elif self.way == "transposed":
            logits = head(hidden.transpose(0, 1)).transpose(0, 1)
        elif self.way == "transposed and flat":
            logits = head(hidden.transpose(0, 1).reshape(B * L, D)).reshape(L, B, -1).transpose(0, 1)
        elif self.way == "twice":
            logits = head(hidden)
            head(hidden.roll(1, 1))
        elif self.way == "doubled":
            logits = head(torch.cat([hidden.roll(1, 1), hidden], 1))[:, L:]
        else:
            logits = nn.functional.linear(hidden, head.weight)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


@pytest.mark.parametrize("way", ["flat", "transposed", "transposed and flat", "twice", "doubled", "not at all"])
@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (1, 4)])
def test_heads_called_in_other_ways(way: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = spread(Odd(transformers.LlamaConfig(**BASE))).eval()
    model.way = way  # type: ignore[assignment]
    ids = torch.randint(3, VOCAB, shape)
    targets = ids.roll(-1, 1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = model_logps(model, ids, targets)
    exact = model(ids).logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)
    assert any("real logits" in str(w.message) for w in seen) is (way != "flat")


def test_head_called_on_a_slice_wants_targets_of_its_positions() -> None:
    model = make("llama").eval()
    ids = torch.randint(3, VOCAB, (2, 5))
    with pytest.raises(ValueError, match="targets must have the positions"):
        model_logps(model, ids, ids, logits_to_keep=2)
