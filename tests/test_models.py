"""model_logps on whole models: architectures against their own logits, and what must stay untouched."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
import transformers
from tiny_models import ARCHITECTURES, BASE, VOCAB, batch, check_model, eager_logps, from_logits, make, score, spread
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from groupdpo_kernels import attach, model_logps
from groupdpo_kernels.models.api import _findings
from groupdpo_kernels.models.head_call import LogitMap


def ours(model: nn.Module, **inputs: object) -> Tensor:
    return model_logps(model, strict=True, **inputs)


def finding(model: nn.Module) -> LogitMap:
    found = _findings[model].logit_map
    assert found is not None
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str) -> None:
    model, expected = make(name), ARCHITECTURES[name][3]
    check_model(model, ours, batch())
    found = finding(model)
    assert found.vocab == expected.vocab
    assert found.logit_scale == pytest.approx(expected.logit_scale, rel=1e-12)
    assert found.softcap == (None if expected.softcap is None else pytest.approx(expected.softcap, rel=1e-9))


def vision(name: str) -> nn.Module:
    text = BASE
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower |= {"image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    if name == "llava":
        config = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**text),
            vision_config=transformers.CLIPVisionConfig(**tower),
            image_token_index=VOCAB - 1,
        )
        return spread(transformers.LlavaForConditionalGeneration(config))
    config = transformers.Cohere2VisionConfig(
        text_config=transformers.Cohere2Config(**text, logit_scale=0.25, head_dim=8),
        vision_config=transformers.SiglipVisionConfig(**tower),
        image_token_id=VOCAB - 1,
        downsample_factor=2,
        alignment_intermediate_size=32,
    )
    return spread(transformers.Cohere2VisionForConditionalGeneration(config))


@pytest.mark.parametrize("name", ["llava", "cohere2_vision"])
def test_multimodal_with_text(name: str) -> None:
    model = vision(name)
    check_model(model, ours, batch())
    # The config of Cohere2Vision names a logit_scale, 0.25, that its forward does not apply.
    assert finding(model) == LogitMap(VOCAB)


def test_multimodal_with_image() -> None:
    model, inputs = vision("llava"), batch()
    inputs["input_ids"][:, :4] = VOCAB - 1  # 4 patches an image, in the prompt
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    check_model(model, ours, inputs | {"pixel_values": pixels})


def test_the_inputs_of_the_model_itself_are_probed_where_four_tokens_do_not_do() -> None:
    class Picky(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, context: Tensor, **kwargs: object):  # type: ignore[no-untyped-def]
            return super().forward(input_ids=input_ids, **kwargs)

    torch.manual_seed(0)
    model = spread(Picky(transformers.LlamaConfig(**BASE)))
    check_model(model, ours, batch() | {"context": torch.zeros(1)})


def test_padded_vocabulary_is_cut() -> None:
    class Cut(transformers.LlamaForCausalLM):
        def forward(self, **kwargs: object):  # type: ignore[no-untyped-def]
            outputs = super().forward(**kwargs)
            outputs.logits = outputs.logits[..., : VOCAB - 7]
            return outputs

    torch.manual_seed(0)
    model = spread(Cut(transformers.LlamaConfig(**BASE)))
    check_model(model, ours, batch())
    assert finding(model).vocab == VOCAB - 7
    with pytest.raises(ValueError, match=rf"targets must be in \[0, V = {VOCAB - 7}\)"):
        inputs = batch()
        inputs["targets"][0, 5] = VOCAB - 3
        model_logps(model, **inputs)


def test_options_reach_the_head() -> None:
    model, inputs = make("gemma2"), batch()
    scored = attach(model, temperature=0.5, ignore_index=-1, workspace_bytes=2**16, impl="reference", strict=True)
    targets = inputs["targets"].where(inputs["targets"] != -100, -1)
    found = scored(inputs["input_ids"], targets, attention_mask=inputs["attention_mask"])
    torch.testing.assert_close(found, eager_logps(model, **inputs, temperature=0.5), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="impl must be"):
        model_logps(model, **inputs, impl="fastest")


def test_float64_model_is_exact() -> None:
    model, inputs = make("granite").double(), batch()
    found, expected = score(model, ours, inputs), score(model, eager_logps, inputs)
    assert found[0].dtype == torch.float64
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-11)


def test_all_targets_ignored() -> None:
    model, inputs = make("llama"), batch()
    inputs["targets"].fill_(-100)
    token_logps, gradients = score(model, ours, inputs)
    assert not token_logps.any() and all(g is not None and not g.any() for g in gradients.values())


def test_inputs_embeds_instead_of_ids() -> None:
    model, inputs = make("llama"), batch()
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    found = model_logps(model, None, inputs["targets"], inputs_embeds=embeds, strict=True)
    expected = from_logits(model(inputs_embeds=embeds).logits, inputs["targets"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_tuple_outputs() -> None:
    class Tuples(transformers.LlamaForCausalLM):
        def forward(self, **kwargs: object):  # type: ignore[no-untyped-def]
            return super().forward(**kwargs).to_tuple()

    torch.manual_seed(0)
    model, inputs = spread(Tuples(transformers.LlamaConfig(**BASE))), batch()
    token_logps, outputs = attach(model, strict=True).with_outputs(inputs["input_ids"], inputs["targets"])
    expected = from_logits(model(input_ids=inputs["input_ids"])[0], inputs["targets"])
    torch.testing.assert_close(token_logps, expected, rtol=1e-5, atol=1e-5)
    assert isinstance(outputs, tuple) and outputs[0] is None


class Widest(TorchDispatchMode):
    """The most rows of any tensor with a vocabulary dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.dim() > 1 and x.shape[-1] == VOCAB:
                self.rows = max(self.rows, x.shape[:-1].numel())
        return out


def test_logits_never_exist() -> None:
    model, inputs = make("llama"), batch(B=4, L=60, pad=0)
    ours(model, **inputs)  # the probe
    with Widest() as eager:
        eager_logps(model, **inputs).sum().backward()
    with Widest() as packed:
        model_logps(model, **inputs, workspace_bytes=2**17, impl="reference").sum().backward()
    # D = 32: tensors of 32 x VOCAB are the weight's.
    assert eager.rows == 240 and packed.rows <= 48


def test_nothing_stays_on_the_model() -> None:
    model, inputs = make("gpt2", embd_pdrop=0.1), batch()
    model.transformer.h[0].eval()
    flags = {n: m.training for n, m in model.named_modules()}
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    keys = list(model.state_dict())
    drawn = []
    for _ in range(2):  # with the probe and without
        torch.manual_seed(0)
        drawn.append((ours(model, **inputs), torch.get_rng_state()))
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
    drawn[0][0].sum().backward()
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert list(model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    clone = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.testing.assert_close(ours(clone.eval(), **inputs), ours(model.eval(), **inputs))


@pytest.mark.parametrize("linear", [True, False])
def test_the_graph_is_freed(linear: bool) -> None:
    """A cycle through the graph would keep every step's activations: Python's collector does not see into graphs."""
    model, inputs = make("llama"), batch()
    if not linear:
        model.lm_head.forward = lambda x: nn.functional.linear(x, model.lm_head.weight)  # called in chunks
    model_logps(model, **inputs)
    anchor = torch.zeros(1, requires_grad=True)
    alive = weakref.ref(anchor)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach() + anchor
    token_logps = model_logps(model, None, inputs["targets"], inputs_embeds=embeds)
    del anchor, embeds, token_logps
    gc.collect()
    assert alive() is None


def test_the_finding_goes_with_the_model_and_follows_its_head() -> None:
    model, inputs = make("llama"), batch()
    ours(model, **inputs)
    model.resize_token_embeddings(VOCAB + 11)
    check_model(model, ours, inputs)
    assert finding(model).vocab == VOCAB + 11
    gc.collect()
    gone, before = weakref.ref(model), len(_findings)
    del model
    gc.collect()
    assert gone() is None and len(_findings) == before - 1


def test_repr_says_what_was_found() -> None:
    model, inputs = make("cohere"), batch()
    scored = attach(model)
    assert repr(scored) == "AttachedModel(CohereForCausalLM: not probed yet)"
    scored(**inputs)
    assert "logit_scale=0.25, softcap=None" in repr(scored)


def test_an_error_in_the_forward_restores_the_head() -> None:
    model, inputs = make("llama"), batch()
    ours(model, **inputs)
    with pytest.raises(ValueError, match=r"positions that reach the output head, \(2, 5\); got \(2, 13\)"):
        model_logps(model, **inputs, logits_to_keep=5)
    assert "forward" not in vars(model.lm_head) and not model.lm_head._forward_hooks
    assert model(inputs["input_ids"]).logits.shape == (2, 13, VOCAB)


def test_bad_input() -> None:
    model, inputs = make("llama"), batch()
    with pytest.raises(ValueError, match="labels must be left out"):
        model_logps(model, **inputs, labels=inputs["input_ids"])
    with pytest.raises(TypeError, match=r"targets must be an integer tensor; got torch\.float32"):
        model_logps(model, inputs["input_ids"], inputs["targets"].float())
    with pytest.raises(ValueError, match=rf"targets must be in \[0, V = {VOCAB}\)"):
        model_logps(model, inputs["input_ids"], inputs["targets"].clamp(min=VOCAB))
    with pytest.raises(ValueError, match=r"must not be a torch\.nn\.DataParallel"):
        attach(nn.DataParallel(model))


def test_importing_the_package_imports_no_transformers() -> None:
    code = (
        "import sys; import groupdpo_kernels, groupdpo_kernels.models;"
        "assert not {'transformers', 'peft', 'accelerate', 'torch._dynamo'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
