"""A prompt that runs once for its responses: values and gradients are those of whole sequences, in every model that can
share, and the others say why they cannot."""

from __future__ import annotations

import copy
import re
import warnings
import weakref
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from prompt_groups import MPO, InFloat64, check_same, coupled, groups_of, ref_logps, run
from test_model_layouts import LAYOUTS, build
from tiny_models import ARCHITECTURES, BASE, GPT2, VOCAB, check_budget, make, spread
from torch import Tensor, nn

from groupdpo_kernels import group_backward, model_logps
from groupdpo_kernels.data import collate
from groupdpo_kernels.memory.tracker import MemoryTracker
from groupdpo_kernels.models import SharedPromptForward, attach, why_not_left_padded, why_not_shared

HEADS = BASE | {"head_dim": 8}
WINDOW = {"sliding_window": 4}
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "experts_implementation": "eager"}
LATENT = EXPERTS | {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"q_lora_rank": 16, "num_key_value_heads": 4, "n_routed_experts": 4, "first_k_dense_replace": 1}
LLAMA4 = HEADS | EXPERTS | {"num_experts_per_tok": 1, "intermediate_size_mlp": 48, "num_local_experts": 2}
LLAMA4 |= {"attention_chunk_size": 4, "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "moe_layers": [1, 3]}
TWO_KINDS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
PER_LAYER = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}
WIDE = {"head_dim": 16, "global_head_dim": 16}
GEMMA3N = HEADS | WINDOW | TWO_KINDS | PER_LAYER | {"intermediate_size": [48] * 4, "altup_num_inputs": 2}
GEMMA3N |= {"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "laurel_rank": 4}
GPT_NEO = {"attention_types": [[["global", "local"], 1]], "window_size": 4, "num_layers": 2, "num_heads": 4}
GPT_NEO |= {"vocab_size": VOCAB, "hidden_size": 32, "max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LONG |= {"original_max_position_embeddings": 16}

# name: (model class, config class, config), beside those of tiny_models.py and test_model_layouts.py
MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3 with a short window": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        HEADS | WINDOW | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", BASE | WINDOW),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", LLAMA4),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", BASE | LATENT | {"topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", BASE | LATENT | {"n_group": 1, "topk_group": 1}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        BASE | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", HEADS | EXPERTS | {"num_experts": 4}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", BASE | EXPERTS | {"num_experts": 4}),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon with alibi": ("FalconForCausalLM", "FalconConfig", SIZES | {"alibi": True}),
    "gpt_neo": ("GPTNeoForCausalLM", "GPTNeoConfig", GPT_NEO),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES | {"intermediate_size": 48}),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", BASE),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", BASE),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", BASE | WINDOW),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", BASE | WINDOW),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", HEADS),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", HEADS | WINDOW | EXPERTS | {"num_local_experts": 4}),
    "gemma3n": ("Gemma3nForCausalLM", "Gemma3nTextConfig", GEMMA3N),
    # Heads of 8 amplify rounding twenty times, and by how much differs between processors.
    "gemma4": ("Gemma4ForCausalLM", "Gemma4TextConfig", HEADS | WINDOW | TWO_KINDS | PER_LAYER | WIDE),
}


RECURRENT = EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16, "linear_key_head_dim": 8}
RECURRENT |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_value_head_dim": 8}
STATE_SPACE = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8, "mamba_n_groups": 1}
ZAMBA = {"mamba_d_state": 4, "mamba_headdim": 16, "mamba_ngroups": 1, "n_mamba_heads": 4, "num_mem_blocks": 1}
ZAMBA |= {"chunk_size": 8, "attention_hidden_size": 64, "layers_block_type": ["mamba", "hybrid"]}

STATE, MIXED, NONE = "takes? the keys and values of a prompt", "off the whole sequence", "takes no cache"
# name: what is said of those that cannot share
REFUSED = {
    "recurrent_gemma": STATE,
    "mamba": STATE,
    "falcon_mamba": STATE,
    "jamba": STATE,
    "prophetnet": STATE,
    "qwen3_next": STATE,
    "lfm2": STATE,
    "falcon_h1": STATE,
    "zamba2": STATE,
    "bert encoder": MIXED,
    "roberta": MIXED,
    "rwkv": NONE,
    "openai": NONE,
    "bart": "BartForConditionalGeneration has an encoder",
}
MORE |= {
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        HEADS | RECURRENT | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", BASE | {"layer_types": ["conv", "full_attention"]}),
    "falcon_h1": ("FalconH1ForCausalLM", "FalconH1Config", BASE | STATE_SPACE | {"mamba_d_ssm": 32}),
    "zamba2": ("Zamba2ForCausalLM", "Zamba2Config", BASE | ZAMBA),
    "bert encoder": ("BertLMHeadModel", "BertConfig", SIZES | {"intermediate_size": 48}),
    "openai": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT2),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
        | {f"{side}_{k}": n for side in ("encoder", "decoder") for k, n in (("ffn_dim", 48), ("attention_heads", 4))},
    ),
}


def model_of(name: str) -> nn.Module:
    if name in ARCHITECTURES:
        return make(name).eval()
    if name in LAYOUTS:
        return build(name)
    model_class, config_class, config = MORE[name]
    torch.manual_seed(0)
    return spread(getattr(transformers, model_class)(getattr(transformers, config_class)(**config))).eval()


# A window and a chunk of 4 tokens are shorter than most of these prompts, of which the last two run together. The first
# group takes two micro-batches of four rows, the second one shares nothing.
GROUPS = groups_of((12, [2, 6, 1, 3, 4]), (1, [3, 2]), (7, [3, 1]), (6, [4, 2]))
NAMES = [n for n in dict.fromkeys([*ARCHITECTURES, *LAYOUTS, *MORE]) if n not in REFUSED]


def in_float64(model: nn.Module) -> tuple[nn.Module, InFloat64]:
    """A copy of the model and its forward. What it makes of its logits is measured before, in its own precision."""
    wide = copy.deepcopy(model).double()
    ids = torch.arange(20, 28)[None]
    model_logps(wide, ids, ids)
    return wide, InFloat64(wide)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_that_of_whole_sequences(name: str) -> None:
    model = model_of(name)
    assert not why_not_shared(model) and not why_not_left_padded(model)
    wide, forward = in_float64(model)
    whole = coupled(wide, collate(GROUPS), forward)
    step = collate(GROUPS, max_sequences=4, share_prompt=True)
    assert [type(part).__name__ for part in step.parts] == ["SharedPrompt", "MicroBatch", "SharedPrompt"]
    check_same(run(wide, step, forward), whole)


# One of each kind of attention, of positions and of experts: all of NAMES pass, in a minute.
ROUNDING = [
    "llama",
    "gemma2",
    "phi",
    "gpt2",
    "mixtral",
    "bloom",
    "cohere2",
    "llama4",
    "deepseek_v3",
    "falcon with alibi",
]
ROUNDING += ["gpt_oss", "gemma4"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROUNDING)
def test_it_rounds_as_whole_sequences_do(name: str) -> None:
    model = model_of(name).bfloat16()
    wide, forward = in_float64(model)
    truth = coupled(wide, collate(GROUPS), forward)
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        wholes = [run(model, collate(GROUPS, max_sequences=size)) for size in (1, 2, 4)]
        wholes += [coupled(model, collate(GROUPS))]
        shared = run(model, collate(GROUPS, max_sequences=4, share_prompt=True))
        check_budget(shared, worst(wholes, truth), truth, torch.finfo(dtype).eps)


Step = tuple[Tensor, dict[str, Tensor]]


def worst(steps: list[Step], truth: Step) -> Step:
    """Each tensor from the step that is furthest off: rounding differs with the micro-batches."""
    values = max((step[0] for step in steps), key=lambda x: (x.double() - truth[0]).norm())
    return values, {n: max((s[1][n] for s in steps), key=lambda x: (x.double() - truth[1][n]).norm()) for n in truth[1]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_those_that_cannot_share_say_why(name: str) -> None:
    model = model_of(name)
    why = why_not_shared(model)
    assert type(model).__name__ in why and re.search(REFUSED[name], why), why
    ids = torch.arange(20, 24)[None]
    with pytest.raises(ValueError, match="model must be one that can share a prompt; " + re.escape(why)):
        attach(model).prefix(ids)
    pair = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="prefix must be empty for a model that cannot share a prompt; "):
        model_logps(model, ids, ids, prefix=(pair, pair), position_ids=ids)


# ----------------------------------------------------------------------------------------------- shapes and attentions

SHAPES = {
    "a prompt of two tokens": [(2, [3, 2])],
    "responses of one token": [(9, [1, 1, 1])],
    "prompts that run together": [(7, [3, 1]), (6, [4, 2]), (8, [1, 5])],
    "some that share nothing": [(1, [2, 2]), (9, [5, 3, 7]), (1, [3, 3]), (1, [1, 2]), (4, [2, 1])],
    "the last position": [(40, [24, 3, 24, 1])],
}


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["gpt2", "gemma3 with a short window"])
def test_shapes(name: str, shape: str, rows: int) -> None:
    """GPT-2 has 64 positions, and gives an error beyond them."""
    wide, forward = in_float64(model_of(name))
    groups = groups_of(*SHAPES[shape])
    step = collate(groups, max_sequences=rows, share_prompt=True)
    assert all(len(mb.input_ids) <= rows for mb in step.micro_batches)
    check_same(coupled(wide, step, forward), coupled(wide, collate(groups), forward))


def test_the_example_of_the_module() -> None:
    """One response, without a loss of groups; the gradient goes through the prefix itself."""
    model = make("phi").double().eval()
    ids = torch.randint(10, 400, (1, 12))
    targets = ids.roll(-1, 1)
    targets[:, :6], targets[:, -1] = -100, -100
    whole = model_logps(model, ids, targets)[:, 6:]
    rows, positions = ids[:, 6:], torch.arange(6, 12)[None]
    found = model_logps(model, rows, targets[:, 6:], prefix=attach(model).prefix(ids[:, :6]), position_ids=positions)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)
    parameters = [*model.parameters()]
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), parameters) for x in (found, whole))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "mistral", "llama4", "deepseek_v3", "gemma3 with a short window", "opt"])
def test_eager_attention(name: str) -> None:
    """Most models take sdpa by default, so that the tests above have it; gpt_oss, gemma2 and bloom know eager alone."""
    model = model_of(name)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert not why_not_shared(model) and not why_not_left_padded(model)
    wide, forward = in_float64(model)
    step = collate(GROUPS, max_sequences=4, share_prompt=True)
    check_same(coupled(wide, step, forward), coupled(wide, collate(GROUPS), forward))


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_that_depend_on_the_length(kind: str) -> None:
    """Beyond 16 tokens, the prompt alone would be rotated as a shorter sequence than with a response."""
    if kind == "longrope":
        config: Any = transformers.Phi3Config(
            **BASE | {"original_max_position_embeddings": 16, "rope_parameters": LONG}
        )
        model = spread(transformers.Phi3ForCausalLM(config)).eval()
    else:
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        model = make("llama", max_position_embeddings=16, rope_parameters=rope).eval()
    assert not why_not_shared(model, 16)
    beyond = f"rotary embeddings of {type(model).__name__} depend on the length of a sequence beyond 16 tokens"
    assert why_not_shared(model, 17) == beyond == why_not_shared(model)
    wide, forward = in_float64(model)
    groups = groups_of((12, [2, 4, 1]))
    check_same(coupled(wide, collate(groups, share_prompt=True), forward), coupled(wide, collate(groups), forward))
    ids, positions = torch.arange(20, 24)[None], torch.arange(13, 17)[None]
    prefix = attach(model).prefix(torch.arange(20, 33)[None])
    message = f"position_ids must be below 16 with a prefix, since .* {type(model).__name__} depend .*; got 16"
    with pytest.raises(ValueError, match=message):
        model_logps(model, ids, ids, prefix=prefix, position_ids=positions)


# ------------------------------------------------------------------------------------------------------- checkpointing


def checkpointed(model: nn.Module, reentrant: bool = False) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model.train()


def state_of(model: nn.Module) -> dict[str, Any]:
    return {n: (m.training, vars(m).get("gradient_checkpointing"), *vars(m)) for n, m in model.named_modules()}


SMALL = groups_of((12, [2, 6, 1]), (1, [3, 2]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma4"])
def test_checkpoints_change_no_bit(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """GPT-2 and Bloom drop a cache by their flag, whether gradients are on or not; Gemma 4 has layers that read keys of
    other layers. Dropout is drawn again as it was."""
    model = model_of(name).train()
    for m in model.modules():
        for attribute in ("p", "attention_dropout", "hidden_dropout"):
            if isinstance(getattr(m, attribute, None), float):
                setattr(m, attribute, 0.2)
    assert not why_not_shared(model)
    step = collate(SMALL, max_sequences=2, share_prompt=True)
    attach(model).prefix(torch.arange(20, 24)[None])  # probed
    first = next(m for n, m in model.named_modules() if n.endswith(("0.input_layernorm", "0.ln_1")))
    calls: list[int] = []
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    expected, plainly = run(model, step), len(calls)
    before = state_of(checkpointed(model))
    assert not why_not_shared(model)
    torch.manual_seed(0)
    found, again = run(model, step), len(calls) - plainly
    assert again == 3 * plainly // 2 == 12  # without a graph, with one, and in the backward: a prompt, 3 micro-batches
    assert state_of(model) == before
    assert torch.equal(found[0], expected[0]) and found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][n], expected[1][n]) for n in expected[1])
    assert "incompatible" not in caplog.text


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = checkpointed(make("llama"))
    attach(model).prefix(torch.arange(20, 24)[None])
    before = state_of(model)

    def fails(*_: Any) -> None:
        raise KeyError("out of memory, say")

    hook = model.model.layers[1].mlp.register_forward_pre_hook(fails)
    for grad in (True, False):
        with pytest.raises(KeyError), torch.set_grad_enabled(grad):
            attach(model).prefix(torch.arange(20, 24)[None])
    hook.remove()
    assert state_of(model) == before


def test_a_dropped_prefix_is_freed() -> None:
    """Checkpoints in its graph hold the cache that it came from, which must not hold it."""
    model = checkpointed(make("llama"))
    prefix = attach(model).prefix(torch.arange(20, 24)[None])
    kept = [weakref.ref(x) for x in prefix if x is not None]
    del prefix
    assert len(kept) == 4 and all(x() is None for x in kept)


def test_checkpoints_inside_hooks_of_accelerate() -> None:
    model = make("gpt2")
    step = collate(SMALL, max_sequences=2, share_prompt=True)
    expected = run(model, step)
    for layer in checkpointed(model).transformer.h:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    check_same(run(model, step), expected, rtol=1e-6)


def test_checkpoints_that_cannot_keep_a_cache() -> None:
    model = checkpointed(make("llama"), reentrant=True)
    assert "take use_reentrant=False" in why_not_shared(model)
    with pytest.raises(ValueError, match="model must be one that can share a prompt; reentrant checkpoints give"):
        attach(model).prefix(torch.arange(20, 24)[None])
    assert not why_not_shared(checkpointed(model))
    for layer in model.model.layers:
        layer.gradient_checkpointing = False
    assert why_not_shared(model) == "LlamaForCausalLM checkpoints its layers in a way of its own"


@pytest.mark.parametrize(("checkpoints", "part"), [(False, False), (True, False), (True, True)])
def test_peak_memory(checkpoints: bool, part: bool) -> None:
    """At most that of whole sequences, and the keys and values of the prompt and their gradients; flat in the group."""
    model = make("llama", max_position_embeddings=128)
    if checkpoints:
        checkpointed(model)
    P, options = 120, {"parameters": [*model.model.layers[1].parameters()]} if part else {}
    keys_and_values = 2 * 2 * 2 * 8 * (P - 1) * 4

    def peak(G: int, share: bool) -> int:
        step = collate(groups_of((P, [2] * G)), max_sequences=4, share_prompt=share)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        tracker = MemoryTracker(VOCAB, -1, (), "cpu", fake=False)
        tracker.adopt([x for p in model.parameters() for x in (p, p.grad)], "parameters")
        with tracker:
            before = tracker.live
            group_backward(step.parts, SharedPromptForward(model), step.groups, MPO, ref_logps(step), **options)
        return max(found.total for found in tracker.peaks.values()) - before

    peak(4, True)  # what is measured and remembered
    eight = peak(8, True)
    assert eight <= peak(8, False) + 2 * keys_and_values
    assert peak(64, True) <= 1.02 * eight


@pytest.mark.parametrize("checkpoints", [False, True])
def test_layers_compiled_by_themselves(checkpoints: bool) -> None:
    model = make("gpt2", n_layer=1).double().eval()
    step = collate(SMALL, share_prompt=True)
    expected = coupled(model, step)
    if checkpoints:
        checkpointed(model)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for layer in model.transformer.h:
        layer.compile(backend="eager")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        check_same(coupled(model, step), expected)
    assert counters["frames"]["ok"] and not counters["graph_break"]
    assert not [w for w in warned if "dynamo" in str(w.message).lower()]


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_ids": None}, "position_ids must be given with a prefix; got None"),
        ({"prefix": [0]}, r"prefix must be of this model, which keeps keys and values of other layers; got those of 1"),
        ({"prefix": [0, 1, 0]}, "prefix must be of this model, which keeps .* of other layers; got those of 3"),
        ({"prefix": [0, 2]}, r"prefix must be of this model, keys and values of shape \['B', 2, 'P', 8\]; got \(1, 4"),
        ({"prompts": 2}, "prompt_of must name one prompt for each of the 3 rows; got 2"),
        ({"prompt_of": torch.tensor([0, 0])}, "prompt_of must name one prompt for each of the 3 rows; got 2"),
    ],
)
def test_bad_prefixes(change: dict[str, Any], message: str) -> None:
    model = make("llama").eval()
    ids, positions = torch.arange(20, 26).reshape(3, 2), torch.tensor([[4, 5]] * 3)
    options = {"prompts": 1, "prefix": [0, 1], "position_ids": positions} | change
    prompts = options.pop("prompts")
    kinds = [torch.zeros(prompts, heads, 4, 8) for heads in (2, 2, 4)]
    options["prefix"] = [x for at in options["prefix"] for x in (kinds[at], kinds[at])]
    with pytest.raises(ValueError, match=message):
        model_logps(model, ids, ids, **options)


def test_an_empty_prefix_is_none() -> None:
    model = make("recurrent_gemma").eval()  # it cannot have another
    ids = torch.arange(20, 26).reshape(3, 2)
    assert torch.equal(model_logps(model, ids, ids, prefix=()), model_logps(model, ids, ids))
