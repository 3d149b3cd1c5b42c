"""The pair losses against TRL's own code: a real DPOTrainer's compute_loss, on a policy that is a table of numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import make
from tiny_tokenizers import byte_level_bpe
from torch import Tensor, nn

from groupdpo_kernels import Objective, PreferenceGroups, preference_loss

K, LENGTH = 4, 9  # pairs, tokens of a row
# TRL's name: ours. Its sigmoid ignores the label smoothing.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss": "sigmoid", "label_smoothing": 0.0},
    "sigmoid_norm": {"loss": "sigmoid", "label_smoothing": 0.0, "average": True},
    **{name: {"loss": name} for name in ("hinge", "ipo", "robust", "exo_pair", "discopop")},
    **{name: {"loss": name} for name in ("nca_pair", "apo_zero", "apo_down", "sppo_hard")},
}


class Table(nn.Module):
    """A policy that is its log-probabilities, 0 beyond a completion; what TRL only logs is 0 everywhere."""

    def __init__(self, counts: Tensor) -> None:
        super().__init__()
        self.log_probs = nn.Parameter(-torch.rand(counts.shape, dtype=torch.float64))
        self.counts = counts

    def forward(self, **_: Any) -> SimpleNamespace:
        log_probs = torch.where(self.counts, self.log_probs, 0)
        blank = torch.zeros_like(log_probs)
        return SimpleNamespace(log_probs=log_probs, entropy=blank, mean_logits=blank, is_top1=self.counts)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One for all losses: its own compute_loss reads the loss and its options from itself."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = Dataset.from_dict({"prompt": ["Tea?"] * 2, "chosen": [" Green."] * 2, "rejected": [" Coffee."] * 2})
    config = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), precompute_ref_log_probs=True, report_to=[], use_cpu=True
    )  # the reference's log-probabilities come with the batch
    return DPOTrainer(make("llama"), args=config, train_dataset=rows, processing_class=byte_level_bpe())


@pytest.mark.parametrize("beta", [0.1, 1.5])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_are_those_of_trl(trainer: Any, name: str, beta: float) -> None:
    torch.manual_seed(0)
    lengths = torch.randint(1, LENGTH, (2 * K,))
    counts = torch.arange(LENGTH - 1) < lengths[:, None]
    ref = -4 * torch.rand(2 * K, dtype=torch.float64)
    objective = Objective(**{"beta": beta, "label_smoothing": 0.125, "tau": 0.2, **OBJECTIVES[name]})

    trainer.loss_types, trainer.beta, trainer.label_smoothing = [name], beta, 0.125
    trainer.args.discopop_tau = 0.2
    policy = Table(counts)
    mask = torch.nn.functional.pad(counts.long(), (1, 0))
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    references = {"ref_chosen_logps": ref[:K], "ref_rejected_logps": ref[K:]}
    expected = trainer.compute_loss(policy, {**inputs, **references})
    expected.backward()

    rows = torch.arange(2 * K).view(2, K).T.flatten()  # chosen and rejected of each pair side by side
    token_logps = policy.log_probs.detach()[rows][counts[rows]].requires_grad_()
    offsets = torch.nn.functional.pad(lengths[rows].cumsum(0), (1, 0))
    loss = preference_loss(token_logps, offsets, PreferenceGroups.pairs(K), objective, ref[rows]).loss
    (gradient,) = torch.autograd.grad(loss, token_logps)

    assert policy.log_probs.grad is not None
    # TRL takes the logarithms of exo_pair's label smoothing in float32.
    rtol = 1e-6 if name == "exo_pair" else 1e-12
    torch.testing.assert_close(loss, expected.detach(), rtol=rtol, atol=rtol)
    torch.testing.assert_close(gradient, policy.log_probs.grad[rows][counts[rows]], rtol=rtol, atol=rtol)
