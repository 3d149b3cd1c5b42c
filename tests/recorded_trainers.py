"""What other trainers do with logits, recorded: module paths, parameters and results of the versions named, written
anew in plain PyTorch. The tests of integrations compare with these where the trainer itself cannot be imported.

Each function here builds a project's modules. A model is called as the project calls it, and its logits are held.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Modules = dict[str, types.ModuleType]


def _modules(path: str, **names: Any) -> Modules:
    """The module at a dotted path, with its parents."""
    parts = path.split(".")
    found = {".".join(parts[: n + 1]): types.ModuleType(".".join(parts[: n + 1])) for n in range(len(parts))}
    vars(found[path]).update(names)
    return found


def picked(logits: Tensor, index: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)


# ------------------------------------------------------------------------------------------------------------- OpenRLHF


def openrlhf() -> Modules:
    """OpenRLHF 0.11.2: openrlhf/models/actor.py."""

    def unpad_and_slice_tensor(sequences: Tensor, attention_mask: Tensor, ring_attn_group: Any) -> tuple[Any, ...]:
        live = attention_mask.bool()
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        rolled = torch.roll(sequences, -1, 1)
        return sequences[live][None], positions[live][None], rolled[live][None], 0, live.flatten().nonzero().flatten()

    def gather_and_pad_tensor(
        tensor: Tensor, ring_attn_group: Any, ring_attn_pad_len: int, indices: Tensor, batch: int, seqlen: int
    ) -> Tensor:
        return tensor.new_zeros(batch * seqlen).index_put((indices,), tensor[0]).view(batch, seqlen)

    class Actor(nn.Module):
        def __init__(self, pretrain_or_model: nn.Module, temperature: float = 1.0) -> None:
            super().__init__()
            self.model, self.temperature = pretrain_or_model, temperature

        def forward(
            self,
            sequences: Tensor,
            action_mask: Tensor | None = None,
            attention_mask: Any = None,
            return_output: bool = False,
            allgather_logits: bool = False,
            return_logprobs: bool = False,
            ring_attn_group: Any = None,
            packed_seq_lens: list[int] | None = None,
            return_entropy: bool = False,
            **mm_inputs: Any,
        ) -> Any:
            rolled, mask, layout = torch.roll(sequences, -1, 1), attention_mask, ()
            position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
            ids = sequences
            if self.packing_samples:
                ids, position_ids, rolled, *layout = unpad_and_slice_tensor(sequences, attention_mask, ring_attn_group)
                mask = None
            output = self.model(ids, attention_mask=mask, position_ids=position_ids, **mm_inputs)
            output["logits"] = output["logits"].float() / self.temperature
            if return_entropy:
                output.entropy = torch.distributions.Categorical(logits=output["logits"]).entropy()[:, :-1]
            if action_mask is None and not return_logprobs:
                return output
            log_probs = picked(output["logits"], rolled)
            if self.packing_samples:
                log_probs = gather_and_pad_tensor(log_probs, ring_attn_group, *layout, *sequences.shape)
            log_probs = log_probs[:, :-1]
            if action_mask is not None:
                log_probs = log_probs[:, -action_mask.shape[1] :] * action_mask.float()
            return (log_probs, output) if return_output else log_probs

    names = {"unpad_and_slice_tensor": unpad_and_slice_tensor, "gather_and_pad_tensor": gather_and_pad_tensor}
    return _modules("openrlhf.models.actor", Actor=Actor, **names)


# -------------------------------------------------------------------------------------------------------- LLaMA-Factory


def llama_factory() -> Modules:
    """LLaMA-Factory 0.9.5: llamafactory/train/dpo/trainer.py, get_batch_logps of train/trainer_utils.py."""

    class CustomDPOTrainer:
        def concatenated_forward(self, model: Any, batch: Any, is_ref_model: bool = False) -> dict[str, Tensor]:
            batch = dict(batch)
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, return_dict=True, use_cache=False).logits.float()
            mask = labels != -100
            token_logps = picked(logits[:, :-1], labels.clamp(min=0)) * mask
            length = mask.sum(1)
            weights = torch.ones_like(token_logps)
            if self.ld_alpha is not None and not is_ref_model:
                for row in range(len(labels)):
                    other = (row + len(labels) // 2) % len(labels)
                    public = int(mask[row].int().argmax()) + int(torch.minimum(length[row], length[other]))
                    weights[row, public:] = self.ld_alpha
            logps = (token_logps * weights).sum(1)
            if self.loss_type in ("ipo", "orpo", "simpo"):
                logps = logps / length
            chosen, rejected = logps.chunk(2)
            averaged = chosen if self.loss_type in ("ipo", "orpo", "simpo") else chosen / length[: len(chosen)]
            both = logits.chunk(2)
            return {
                "chosen_logps": chosen,
                "rejected_logps": rejected,
                "chosen_logits": both[0],
                "rejected_logits": both[1],
                "chosen_logps_avg": averaged,
            }

    return _modules("llamafactory.train.dpo.trainer", CustomDPOTrainer=CustomDPOTrainer)


# ------------------------------------------------------------------------------------------------------------- ms-swift


def ms_swift() -> Modules:
    """ms-swift 4.6.0: swift/rlhf_trainers/dpo_trainer.py and rlhf_mixin.py; logits_to_keep of trainers/mixin.py."""

    class DPOTrainer:
        def get_use_logits_to_keep(self, default_value: bool = True) -> bool:
            return self.args.use_logits_to_keep

        def get_per_token_logps(
            self, logits: Tensor, labels: Tensor, label_pad_token_id: int = -100, reduction: str = "mean"
        ) -> tuple[Tensor, Tensor, Tensor]:
            mask = labels != label_pad_token_id
            return picked(logits, labels.clamp(min=0)) * mask, logits.mean(-1) * mask, mask

        def concatenated_forward(self, model: Any, batch: Any, is_ref_model: bool = False) -> dict[str, Tensor]:
            batch = dict(batch)
            if self.get_use_logits_to_keep(self.template.sequence_parallel_size == 1):
                first = (batch["labels"] != -100).int().argmax(-1).min().item()
                batch["logits_to_keep"] = batch["labels"].shape[1] - first + 1
                batch["labels"] = batch["labels"][:, -batch["logits_to_keep"] :]
            if self.aux_loss_enabled:
                batch["output_router_logits"] = True
            labels = torch.roll(batch.pop("labels"), -1, 1)
            outputs = model(**batch, use_cache=False)
            logps, mean_logits, mask = self.get_per_token_logps(outputs.logits, labels, label_pad_token_id=-100)
            if self.template.padding_free:
                starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
                ends = [*starts[1:], batch["position_ids"].shape[1]]
                dropped = batch["position_ids"].shape[1] - labels.shape[1]
                rows = [slice(max(a - dropped, 0), b - dropped) for a, b in zip(starts, ends)]
                parts = [(logps[0, r][mask[0, r]], mean_logits[0, r][mask[0, r]]) for r in rows]
            else:
                parts = [(logps[r][mask[r]], mean_logits[r][mask[r]]) for r in range(len(labels))]
            B, sums = len(parts) // 2, []
            for row, (values, _) in enumerate(parts):
                shared = min(len(values), len(parts[(row + B) % (2 * B)][0]))
                alpha = 1.0 if self.args.ld_alpha is None or is_ref_model else self.args.ld_alpha
                sums.append(values[:shared].sum() + alpha * values[shared:].sum())
            output = {"chosen_logps": torch.stack(sums[:B]), "rejected_logps": torch.stack(sums[B:])}
            for name, half in (("chosen", parts[:B]), ("rejected", parts[B:])):
                output[f"mean_{name}_logits"] = torch.cat([means for _, means in half]).mean()
                output[f"{name}_completion_token_counts"] = torch.tensor([len(values) for values, _ in half])
            if not is_ref_model:
                output["nll_loss"] = -torch.cat([values for values, _ in parts[:B]]).mean()
            if self.aux_loss_enabled:
                output["aux_loss"] = outputs.aux_loss
            return output

    return _modules("swift.rlhf_trainers.dpo_trainer", DPOTrainer=DPOTrainer)


# -------------------------------------------------------------------------------------------------------- open-instruct


def open_instruct() -> Modules:
    """open-instruct, its repository in 2026: open_instruct/dpo_utils.py and padding_free_collator.py."""

    def process_batch(batch: dict[str, Any], prefix: str, pad_value: int = 0) -> dict[str, Tensor]:
        return {k.replace(prefix + "_", ""): v for k, v in batch.items() if k.startswith(prefix)}

    def concatenated_inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
        found, L = {}, max(batch[f"{side}_input_ids"].shape[1] for side in ("chosen", "rejected"))
        for name in ("input_ids", "labels", "attention_mask"):
            sides = [batch[f"{side}_{name}"] for side in ("chosen", "rejected")]
            value = -100 if name == "labels" else 0
            found[f"concatenated_{name}"] = torch.cat([F.pad(x, (0, L - x.shape[1]), value=value) for x in sides])
        return found

    def pf_concatenated_inputs(batch: dict[str, Any], tag: str = "concatenated_") -> tuple[dict[str, Any], int]:
        chosen, rejected = (process_batch(batch, side) for side in ("chosen", "rejected"))
        found = {f"{tag}{k}": torch.cat([chosen[k], rejected[k]], -1) for k in ("input_ids", "labels", "position_ids")}
        ends = rejected["cu_seq_lens_k"][1:] + chosen["input_ids"].shape[1]
        found[f"{tag}cu_seq_lens_k"] = torch.cat([chosen["cu_seq_lens_k"], ends])
        return found, len(chosen["cu_seq_lens_k"]) - 1

    def summed(logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, average: bool) -> Tensor:
        mask = labels[:, 1:] != -100
        logps = picked(logits.float()[:, :-1], labels[:, 1:].clamp(min=0)) * mask
        if cu_seqlens is None:
            return logps.sum(1) / mask.sum(1) if average else logps.sum(1)
        rows = list(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()))
        sums = torch.stack([logps[0, a : b - 1].sum() for a, b in rows])
        return sums / torch.stack([mask[0, a : b - 1].sum() for a, b in rows]) if average else sums

    def concatenated_forward(
        model: Any,
        batch: dict[str, Any],
        average_log_prob: bool = False,
        output_router_logits: bool = False,
        packing: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        both, B = pf_concatenated_inputs(batch) if packing else (concatenated_inputs(batch), 0)
        inputs = {k.replace("concatenated_", ""): v for k, v in both.items()}
        labels, B = inputs.pop("labels"), B or len(batch["chosen_input_ids"])
        if output_router_logits:
            inputs["output_router_logits"] = True
        outputs = model(**inputs)
        logps = summed(outputs.logits, labels, inputs.get("cu_seq_lens_k"), average_log_prob)
        return logps[:B], logps[B:], outputs.aux_loss if output_router_logits else None

    def separate_forward(
        model: Any, batch: dict[str, Any], average_log_prob: bool = False, output_router_logits: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        sides = [process_batch(batch, side) for side in ("chosen", "rejected")]
        logits = [model(input_ids=x["input_ids"], attention_mask=x["attention_mask"]).logits for x in sides]
        return *(summed(z, x["labels"], None, average_log_prob) for z, x in zip(logits, sides)), None

    functions = (process_batch, concatenated_inputs, pf_concatenated_inputs, concatenated_forward, separate_forward)
    return _modules("open_instruct.dpo_utils", **{function.__name__: function for function in functions})


# -------------------------------------------------------------------------------------------------------------- Axolotl


def axolotl() -> Modules:
    """Axolotl 0.19.0: the base class of its plugins."""

    class BasePlugin:
        def pre_model_load(self, cfg: Any) -> None: ...

    return _modules("axolotl.integrations.base", BasePlugin=BasePlugin)


def trl_1_9(disable: Callable[[Any], Any]) -> Modules:
    """TRL 1.9.0, which Axolotl 0.19.0 pins: trl/trainer/dpo_trainer.py, with the sigmoid loss alone.

    disable: model -> context in which it is the reference.
    """
    not_of_the_model = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")

    def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
        return picked(logits, index)

    def called(model: Any, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
        outputs = model(**{k: v for k, v in inputs.items() if k not in not_of_the_model}, use_cache=False)
        select = vars(modules["trl.trainer.dpo_trainer"])["selective_log_softmax"]
        logps = select(outputs.logits[..., :-1, :], inputs["input_ids"][..., 1:])
        logps[inputs["completion_mask"][..., 1:] == 0] = 0.0
        return outputs, logps.sum(1)

    class DPOTrainer:
        def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
            with torch.no_grad(), disable(model):
                return called(model, inputs)[1].chunk(2)

        def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
            outputs, logps = called(model, inputs)
            if self.precompute_ref_logps:
                ref = (inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
            else:
                with torch.no_grad(), disable(self.model):
                    ref = called(self.model if self.ref_model is None else self.ref_model, inputs)[1].chunk(2)
            chosen, rejected = (own - reference for own, reference in zip(logps.chunk(2), ref))
            losses = -F.logsigmoid(self.beta * (chosen - rejected))
            if self.use_weighting:
                losses = losses * torch.logsumexp(2 * outputs.logits.detach(), -1).mean().exp()
            metrics = self._metrics["train" if self.model.training else "eval"]
            metrics.setdefault("rewards/chosen", []).append(self.beta * chosen.mean().item())
            for name in ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"):
                metrics.setdefault(name, []).append(outputs.logits.mean().item())
            return (losses.mean(), outputs) if return_outputs else losses.mean()

    names = {"DPOTrainer": DPOTrainer, "selective_log_softmax": selective_log_softmax}
    modules = _modules("trl.trainer.dpo_trainer", **names)
    modules["trl"].__version__ = "1.9.0"  # type: ignore[attr-defined]
    return modules


def trainer(cls: type, **attributes: Any) -> Any:
    """An instance without its constructor: what concatenated_forward reads of it, alone."""
    self = cls.__new__(cls)
    vars(self).update(attributes)
    return self


def namespace(**attributes: Any) -> SimpleNamespace:
    return SimpleNamespace(**attributes)
