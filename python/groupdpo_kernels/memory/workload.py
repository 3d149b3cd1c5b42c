"""Workload describes a training step to measure or to predict, and TrainingStep runs it.

A step is that of a trainer: forward and backward of one group of responses, then the optimizer. The responses are
random tokens, all of one length, half of them preferred unless `positives` says otherwise, without padding. All tokens
are scored, which is the most work that a head can have, unless `prompt` says how many of them are the group's prompt.

    coupled_logits   the group in one batch, its logits, log_softmax and gather; all graphs kept until the loss
    coupled          the group in one batch through model_logps, without logits
    two_pass         group_backward, in micro-batches
    one_pass         group_backward without the second forward, a response at a time; needs an adapter
    pairs            the group flattened: each positive with each negative, pair by pair, gradients accumulated

With `share_prompt` the prompt runs once, as in `data.collate(share_prompt=True)`: its last token begins each response,
and the rest is the prefix of all. Two strategies have no such form: coupled_logits, which stands for code without this
package, and pairs, whose passes could share the prompt of one pair alone.

The same code runs on real tensors (sweep.py) and on fake ones (planner.py). Weights are random, because neither memory
nor time depends on them. It never downloads, unless `model` is a name on the Hub, whose config transformers fetches.
It needs transformers, and peft for an adapter.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.api import attach
from ..models.decoder_layers import checkpoint_layers
from ..models.shared_prompt import Prefix
from ..preference.group_backward import SharedPrompt, forward_parts, group_backward
from ..preference.groups import PreferenceGroups
from ..preference.objective import Objective, preference_loss

STRATEGIES = ("coupled_logits", "coupled", "two_pass", "one_pass", "pairs")
SHARING = ("coupled", "two_pass", "one_pass")  # strategies that can run a prompt once
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, fused=True),
    "adamw_foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, foreach=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-6, foreach=False),
}
DTYPES = ("float32", "bfloat16", "float16")
GROUP_OBJECTIVE = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)
PAIR_OBJECTIVE = Objective("sigmoid", beta=0.1)

_GEMMA3 = {"head_dim": 256, "sliding_window": 1024, "query_pre_attn_scalar": 256}
# Shapes of models that people train, so that a plan needs no file. The first is so small that a CPU steps at once.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama",
        "vocab_size": 16384,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-3-70b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "qwen3-32b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "gemma-3-4b": {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        **_GEMMA3,
    },
    "olmo-3-7b": {
        "model_type": "olmo3",
        "vocab_size": 100278,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
    },
    "olmo-3-32b": {
        "model_type": "olmo3",
        "vocab_size": 100278,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}


@dataclass(frozen=True)
class Workload:
    """The training step that is measured or predicted.

    Args:
        model: a built-in name (a wrong one lists them), a config.json or a folder that holds one, or a name on the Hub.
        strategy: one of STRATEGIES, which the module's docstring explains.
        group: number of responses in the step's one group: even, or any number with `positives`.
        positives: how many responses of the group are preferred; half of an even group by default.
        tokens: tokens of a response with its prompt.
        prompt: how many of these tokens are the prompt, which all responses begin with and of which none is scored; 0
            means that responses have nothing in common, and that all of their tokens are scored.
        share_prompt: whether the prompt, of two tokens at least, runs once for all responses; not with pairs and
            coupled_logits.
        prompts: number of prompts of a coupled step that stands for several groups: responses take them in turn.
        micro_batch: sequences of a micro-batch of two_pass.
        dtype: dtype of the parameters, and so of gradients and of the optimizer's state: float32, bfloat16 or float16.
        autocast: whether the forward computes in bfloat16, whatever the parameters are.
        optimizer: optimizer of the step: adamw (the fused one), adamw_foreach or sgd.
        lora_rank: rank of an adapter on all linear layers but the head, which alone trains; 0 trains all weights.
        checkpointing: whether the layers' activations are computed again in the backward.
        workspace_bytes: bytes that an op of the head may take for blocks of logits, as in `linear_logps`.
        layers: a number of layers in place of the model's own.
    """

    model: str = "tiny"
    strategy: str = "two_pass"
    group: int = 8
    tokens: int = 256
    micro_batch: int = 2
    dtype: str = "float32"
    autocast: bool = False
    optimizer: str = "adamw"
    lora_rank: int = 0
    checkpointing: bool = False
    workspace_bytes: int = 2**28
    layers: int | None = None
    positives: int | None = None
    prompt: int = 0
    share_prompt: bool = False
    prompts: int = 1

    def __post_init__(self) -> None:
        for name, allowed in {"strategy": STRATEGIES, "dtype": DTYPES, "optimizer": tuple(OPTIMIZERS)}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        counts = ("group", "tokens", "micro_batch", "workspace_bytes", "layers", "positives", "prompts")
        for name in (*counts, "lora_rank", "prompt"):
            value, least = getattr(self, name), 0 if name in ("lora_rank", "prompt") else 1
            if name in ("layers", "positives") and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int; got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        if self.positives is None and self.group % 2:
            raise ValueError(
                f"group must be even, for half of it is positive unless positives is given; got {self.group}"
            )
        if self.positives is not None and self.positives >= self.group:
            raise ValueError(
                f"positives must be less than group, which has a negative too; got {self.positives} of {self.group}"
            )
        if self.tokens < 2:
            raise ValueError(f"tokens must be at least 2; got {self.tokens}")
        if self.prompt >= self.tokens:
            raise ValueError(
                f"prompt must be less than tokens, which has a response too; got {self.prompt} of {self.tokens}"
            )
        if self.share_prompt and self.prompt < 2:
            raise ValueError(
                f"prompt must be at least 2 with share_prompt, for its last token is not shared; got {self.prompt}"
            )
        if self.share_prompt and self.strategy not in SHARING:
            raise ValueError(f"strategy must be one of {', '.join(SHARING)} with share_prompt; got {self.strategy!r}")
        if self.prompts > 1 and not (self.share_prompt and self.strategy == "coupled" and self.prompts <= self.group):
            raise ValueError(
                "prompts must be 1, or at most group with strategy 'coupled' and share_prompt; got"
                f" {self.prompts} with {self.strategy!r}"
            )
        if self.strategy == "one_pass" and not self.lora_rank:
            raise ValueError("lora_rank must be positive for one_pass, which keeps a gradient for each response; got 0")
        if not isinstance(self.model, str) or not self.model:
            raise TypeError(f"model must be a name or a path; got {self.model!r}")

    @property
    def num_positives(self) -> int:
        """The number of preferred responses in the group."""
        return self.group // 2 if self.positives is None else self.positives

    @property
    def num_pairs(self) -> int:
        """The number of pairs of a positive and a negative in the group."""
        return self.num_positives * (self.group - self.num_positives)

    @property
    def response(self) -> int:
        """The number of tokens of a response, which the head scores."""
        return self.tokens - self.prompt

    @property
    def prefix(self) -> int:
        """The number of tokens that run once for all responses: a shared prompt without its last one, or 0."""
        return self.prompt - 1 if self.share_prompt else 0

    @property
    def computed_tokens(self) -> int:
        """The number of tokens that one forward of the step's sequences computes."""
        sequences = 2 * self.num_pairs if self.strategy == "pairs" else self.group
        row = self.response if self.share_prompt else self.tokens
        return self.prompts * self.prefix + sequences * row

    @property
    def setting(self) -> str:
        """A text: what trains, whether activations are checkpointed, how many responses are positive if not half, what
        prompt they have."""
        what = f"LoRA rank {self.lora_rank}" if self.lora_rank else "full fine-tuning"
        what += ", checkpointing" if self.checkpointing else ""
        what += "" if self.positives is None else f", {self.positives} positive"
        shared = " shared" if self.share_prompt else ""
        return f"{what}, prompt of {self.prompt}{shared}" if self.prompt else what


def workload_of(values: dict[str, Any]) -> Workload:
    """A Workload from the result of `dataclasses.asdict`, without fields that a later version has added."""
    known = {field.name for field in fields(Workload)}
    return Workload(**{name: value for name, value in values.items() if name in known})


def config_of(workload: Workload) -> Any:
    """The PretrainedConfig of a text model, with the workload's number of layers. ValueError where there is none."""
    from transformers import AutoConfig

    name = workload.model
    if name in MODELS:
        values = dict(MODELS[name])
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    else:
        path = Path(name)
        path = path / "config.json" if path.is_dir() else path
        try:
            if path.is_file():
                values = json.loads(path.read_text())
                config = AutoConfig.for_model(values.pop("model_type"), **values)
            else:
                config = AutoConfig.from_pretrained(name)
        except (OSError, KeyError, TypeError, ValueError) as error:
            known = ", ".join(MODELS)
            first = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"model must be one of {known}, a config.json, or known to transformers; got {name!r}: {first}"
            ) from None
    config = config.get_text_config()
    if workload.layers is not None:
        config.num_hidden_layers = workload.layers
        if getattr(config, "layer_types", None):
            kinds = config.layer_types  # added layers continue the pattern
            config.layer_types = [kinds[i % len(kinds)] for i in range(workload.layers)]
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and longest < workload.tokens:
        config.max_position_embeddings = workload.tokens
    config.use_cache = False
    return config


def take_layers(config: Any, chosen: Sequence[int]) -> None:
    """Makes the config describe a model of these layers alone, by their numbers."""
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(chosen)
    if kinds:
        config.layer_types = [kinds[i] for i in chosen]


def take_share(config: Any, split: int) -> None:
    """Makes the config describe the share of one rank of tensor parallelism."""
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        setattr(config, name, getattr(config, name) // split)
    config.vocab_size = -(-config.vocab_size // split)


def build_model(
    workload: Workload, device: torch.device, layers: Sequence[int] | None = None, split: int = 1
) -> nn.Module:
    """The model with random weights and its adapter, in training mode, or with these layers of it (by number) alone.

    split: makes the share of one rank of so many under tensor parallelism, which divides attention heads, MLP and
    vocabulary.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    try:  # .to(dtype) would hold both dtypes, and a fake module refuses it
        torch.set_default_dtype(getattr(torch, workload.dtype))
        with device:
            config = config_of(workload)
            if layers is not None:
                take_layers(config, layers)
            if split > 1:
                take_share(config, split)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
            if workload.lora_rank:
                from peft import LoraConfig, get_peft_model

                adapter = LoraConfig(
                    r=workload.lora_rank,
                    lora_alpha=workload.lora_rank,
                    target_modules="all-linear",
                    task_type="CAUSAL_LM",
                )
                with warnings.catch_warnings():  # peft uses a name that transformers deprecates
                    warnings.simplefilter("ignore", FutureWarning)
                    model = get_peft_model(model, adapter)
    finally:
        torch.set_default_dtype(before)
    if workload.checkpointing:
        checkpoint_layers(model, {"use_reentrant": False})
    return model.train()


class TrainingStep:
    """A model and its optimizer, and steps of them on random responses."""

    def __init__(self, workload: Workload, device: torch.device | str = "cpu", model: nn.Module | None = None) -> None:
        self.workload, self.device = workload, torch.device(device)
        self.model = build_model(workload, self.device) if model is None else model
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = OPTIMIZERS[workload.optimizer](self.trainable)
        generator = torch.Generator().manual_seed(1)
        config: Any = self.model.config
        vocab = int(config.get_text_config().vocab_size)
        self._groups: dict[tuple[int, int], tuple[PreferenceGroups, Tensor]] = {}
        self.pool = torch.randint(0, vocab, (64, workload.tokens), generator=generator)  # responses, taken in turn
        # Called with the part that begins: the forward of a "prompt" or of "sequences", or a "prompt backward".
        self.begin: Callable[[str], None] = lambda name: None

    def make_state(self) -> None:
        """Makes the optimizer's state, as its first step would, with gradients of zero."""
        for p in self.trainable:
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def group_of(self, size: int, positives: int) -> tuple[PreferenceGroups, Tensor]:
        """One group and its reference's log-probabilities. They are made once and before a fake run, because their
        values are read, and a fake run makes none."""
        if (size, positives) not in self._groups:
            made = PreferenceGroups.from_lists([[i < positives for i in range(size)]])
            self._groups[size, positives] = made.to(self.device), torch.zeros(size, device=self.device)
        return self._groups[size, positives]

    def batch(self, workload: Workload) -> Tensor:  # (group, L) int64
        """The sequences of a group: whole ones or, after a shared prefix, what is left of them."""
        rows = torch.arange(workload.group)
        prompts = self.pool[rows % workload.prompts % len(self.pool), workload.prefix : workload.prompt]
        responses = self.pool[rows % len(self.pool), workload.prompt :]
        return torch.cat([prompts, responses], 1).to(self.device)

    def run(self, workload: Workload | None = None, mark: Callable[[str], None] | None = None) -> None:
        """Runs one step, of `workload`'s group and strategy if given. `mark` is called with the part that begins."""
        workload = self.workload if workload is None else workload
        note = mark or (lambda name: None)
        note("forward")
        with self._autocast():
            self.forward_backward(workload)
        note("optimizer")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        note("end")

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self.workload.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def forward_backward(self, workload: Workload) -> None:
        """Accumulates the gradients of the group's mean loss into .grad."""
        G, P = workload.group, workload.num_positives
        ids = self.batch(workload)
        groups, ref_logps = self.group_of(G, P)
        forward = _Forward(self, workload)
        if workload.strategy == "pairs":
            pair, two = self.group_of(2, 1)
            for i in range(P):
                for j in range(P, G):
                    loss = preference_loss(*forward.rows(ids[[i, j]]), pair, PAIR_OBJECTIVE, two).loss
                    (loss / workload.num_pairs).backward()
            return
        sizes = {"two_pass": workload.micro_batch, "one_pass": 1}
        parts: list[Any] = [*ids.split(sizes.get(workload.strategy, G))]
        if workload.share_prompt:
            prompts = self.pool[torch.arange(workload.prompts) % len(self.pool), : workload.prefix].to(self.device)
            parts = [SharedPrompt(prompts, parts)]
        if workload.strategy in sizes:
            group_backward(parts, forward, groups, GROUP_OBJECTIVE, ref_logps, strategy=workload.strategy)
        else:
            token_logps, cu_seqlens, _ = forward_parts(parts, forward)
            preference_loss(token_logps, cu_seqlens, groups, GROUP_OBJECTIVE, ref_logps).loss.backward()


class _Forward:
    """The SharedForward of a workload. Micro-batches are ids (b, L) as TrainingStep.batch gives them."""

    def __init__(self, step: TrainingStep, workload: Workload) -> None:
        self.step, self.workload = step, workload
        self.score = attach(step.model, workspace_bytes=workload.workspace_bytes)

    def prefix(self, prompts: Tensor) -> Prefix:  # (B, P)
        self.step.begin("prompt")
        inputs = {"position_ids": torch.arange(prompts.shape[1], device=prompts.device).expand(prompts.shape)}
        if self.workload.prompts > 1:
            inputs["attention_mask"] = torch.ones_like(prompts)
        found = self.score.prefix(prompts, **inputs)
        for x in found[-2:]:
            if x is not None and x.requires_grad:
                x.register_hook(lambda g: self.step.begin("prompt backward"))
        return found

    def rows(self, ids: Tensor, prefix: Prefix = ()) -> tuple[Tensor, Tensor]:  # (b, L) -> (t,), (b + 1,)
        self.step.begin("sequences")
        b, n = len(ids), self.workload.response
        cu_seqlens = torch.arange(0, b * n + 1, n, device=ids.device)
        if prefix:
            inputs = {"position_ids": torch.arange(n, device=ids.device).add(self.workload.prefix).expand(b, n)}
            if self.workload.prompts > 1:
                inputs["attention_mask"] = ids.new_ones(b, self.workload.prefix + n)
                inputs["prompt_of"] = torch.arange(b, device=ids.device) % self.workload.prompts
            rows, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            return self.score(rows, targets, prefix=prefix, **inputs).flatten(), cu_seqlens
        targets = ids.roll(-1, 1)
        if not self.workload.prompt:
            return self.token_logps(ids, targets).flatten(), cu_seqlens
        targets[:, : -1 - n] = -100
        targets[:, -1] = -100
        live = (targets != -100).reshape(-1).nonzero()[:, 0]
        return self.token_logps(ids, targets).reshape(-1)[live], cu_seqlens

    def token_logps(self, ids: Tensor, targets: Tensor) -> Tensor:  # (b, L) -> (b, L) float32
        if self.workload.strategy != "coupled_logits":
            return self.score(ids, targets)
        logits = self.step.model(input_ids=ids, use_cache=False).logits
        return torch.log_softmax(logits.float(), -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def strategies_of(base: Workload) -> list[str]:
    """The strategies that the workload's setting allows: one_pass needs an adapter, and some cannot share a prompt."""
    return [s for s in STRATEGIES if (base.lora_rank or s != "one_pass") and (not base.share_prompt or s in SHARING)]


def sweep(
    base: Workload, groups: Sequence[int], strategies: Sequence[str] | None = None, most_pairs: int = 64
) -> list[Workload]:
    """Workloads of these strategies, or of all that apply, at every size; `pairs` stops at `most_pairs` pairs."""
    names = [s for s in strategies or strategies_of(base) if base.lora_rank or s != "one_pass"]
    loads = [replace(base, group=group, strategy=name) for group in groups for name in names]
    return [load for load in loads if load.strategy != "pairs" or load.num_pairs <= most_pairs]
