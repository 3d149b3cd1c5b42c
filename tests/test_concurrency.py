"""Python threads that call the package at once: the bits of one thread, whatever the others do.

Some calls are of other shapes and options, some under contexts of their own, and one is a forward that fails half-way.
Torch has one, two or five threads for each, and the number changes meanwhile. Threads share a model too: a forward
replaces the head of the model, and nobody else may meet the replacement.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peft
import pytest
import torch
from prompt_groups import groups_of
from tiny_models import VOCAB, eager_logps, make
from tiny_trl import lora
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from groupdpo_kernels import (
    Objective,
    PreferenceGroups,
    SharedPromptForward,
    group_backward,
    linear_logp_stats,
    linear_logps,
    model_logps,
    preference_loss,
)
from groupdpo_kernels.data import collate
from groupdpo_kernels.distributed import planned_as_sharded
from groupdpo_kernels.lm_head import logit_cache
from groupdpo_kernels.models import shared_prompt
from groupdpo_kernels.replay import LseTape
from groupdpo_kernels.testing import Case, make_inputs
from groupdpo_kernels.threads import Change

Job = Callable[[], list[Tensor]]
MPO = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """And threads that give way often, so that they meet in the middle of things."""
    before, interval = torch.get_num_threads(), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    torch.set_num_threads(before)
    sys.setswitchinterval(interval)


# ------------------------------------------------------------------------------------------------------------- the jobs


def of_head(T: int, V: int, D: int = 24, dtype: torch.dtype = torch.float32, R: int = 0, **options: Any) -> Job:
    """Token log-probabilities, or statistics where `outputs` are asked for, and all gradients."""
    inputs = make_inputs(Case("", T, D, V, "", dtype, bias=True, R=R, ignored="some"))
    frozen = options.pop("frozen", False)
    function = linear_logp_stats if "outputs" in options else linear_logps

    def job() -> list[Tensor]:
        leaves = {
            name: x.detach().clone().requires_grad_(not frozen or name == "hidden") for name, x in inputs.leaves.items()
        }
        low_rank = (leaves["low_rank_hidden"], leaves["low_rank_weight"]) if R else None
        out = function(leaves["hidden"], leaves["weight"], inputs.targets, leaves["bias"], low_rank=low_rank, **options)
        values = [x for x in out if x is not None] if isinstance(out, tuple) else [out]
        live = [x for x in leaves.values() if x.requires_grad]
        return [*(x.detach() for x in values), *torch.autograd.grad((values[0] * inputs.d_token_logps).sum(), live)]

    return job


def of_loss(objective: Objective, groups: int, seed: int) -> Job:
    g = torch.Generator().manual_seed(seed)
    pairs = isinstance(objective.loss, str) and objective.loss in ("sigmoid", "ipo", "simpo")
    sizes = torch.randint(2, 3 if pairs else 7, (groups,), generator=g).tolist()
    sides = PreferenceGroups.from_lists([[i % 2 == 0 for i in range(n)] for n in sizes])
    lengths = torch.randint(1, 9, (sum(sizes),), generator=g)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    logps, ref = -torch.rand(int(lengths.sum()), generator=g), -torch.rand(sum(sizes), generator=g)

    def job() -> list[Tensor]:
        leaf = logps.clone().requires_grad_()
        found = preference_loss(leaf, offsets, sides, objective, ref if objective.needs_reference else None)
        return [found.loss.detach(), found.seq_logps, *torch.autograd.grad(found.loss, leaf)]

    return job


def of_step(strategy: str, groups: int) -> Job:
    """A step of group_backward over an embedding and a head."""
    g = torch.Generator().manual_seed(groups)
    table, head = torch.randn(90, 16, generator=g), torch.randn(90, 16, generator=g)
    ids = torch.randint(90, (2 * groups, 3, 7), generator=g)  # micro-batches of three responses
    sides = PreferenceGroups.from_lists([[True, False, False, True, False, False]] * groups)
    ref = -torch.rand(6 * groups, generator=g)

    def job() -> list[Tensor]:
        parameters = [x.clone().requires_grad_() for x in (table, head)]

        def forward(i: int) -> tuple[Tensor, Tensor]:
            states = parameters[0][ids[i]].tanh()
            return linear_logps(states[:, :-1], parameters[1], ids[i, :, 1:]).flatten(), torch.arange(0, 19, 6)

        found = group_backward(range(2 * groups), forward, sides, MPO, ref, strategy=strategy)
        return [found.loss, found.seq_logps, *(x.grad for x in parameters)]

    return job


@contextlib.contextmanager
def taped() -> Iterator[None]:
    """A tape of a call that was never made: what others record must not end up here."""
    tape = LseTape()
    with tape.record():
        yield
    assert len(tape._calls) == 1


def under(context: Callable[[], Any], job: Job) -> Job:
    def within() -> list[Tensor]:
        with context():
            return job()

    return within


def failing() -> list[Tensor]:
    """A step whose second micro-batch fails, after the first has run and while others are at work."""
    x = torch.randn(3, 16, requires_grad=True)

    def forward(i: int) -> tuple[Tensor, Tensor]:
        wrong = torch.tensor([0, 1, 50 if i else 2])
        return linear_logps(x, torch.randn(50, 16), wrong), torch.tensor([0, 3])

    with pytest.raises(ValueError, match=r"targets must be in \[0, V = 50\)"):
        group_backward([0, 1], forward, PreferenceGroups.pairs(1), MPO, torch.zeros(2))
    return []


def jobs() -> list[Job]:
    return [
        of_head(40, 300),
        of_head(1100, 700),
        of_head(17, 2500, outputs=("lse", "entropy", "mean_logits", "is_top1"), softcap=8.0),
        of_head(300, 900, dtype=torch.bfloat16, R=3, temperature=0.7),
        of_head(64, 800, frozen=True),
        of_head(200, 1300, grad_tol=2.0**-7),
        of_head(30, 400, D=1024),  # keeps its logits
        under(logit_cache.nothing_kept, of_head(24, 400, D=1024)),
        under(planned_as_sharded, of_step("two_pass", 2)),
        under(taped, of_head(33, 200)),
        under(lambda: torch.autocast("cpu", torch.bfloat16), of_head(50, 310)),
        of_step("two_pass", 3),
        of_step("one_pass", 1),
        of_loss(MPO, 200, 0),
        of_loss(Objective("all_pairs", beta=0.3), 90, 1),
        of_loss(Objective("sigmoid"), 300, 2),
        failing,
    ]


@pytest.fixture(scope="module")
def expected() -> tuple[list[Job], list[list[Tensor]]]:
    torch.set_num_threads(1)
    all_jobs = jobs()
    return all_jobs, [job() for job in all_jobs]


def together(workers: int, work: Callable[[int], None]) -> None:
    """work(i) in so many threads that begin at once. The first error is raised here."""
    barrier = threading.Barrier(workers)

    def begin(i: int) -> None:
        barrier.wait()
        work(i)

    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(begin, i) for i in range(workers)]:
            done.result()


@pytest.mark.parametrize("torch_threads", [1, 2, 5])
@pytest.mark.parametrize("workers", [2, 5, 16])
def test_the_bits_are_those_of_one_thread(workers: int, torch_threads: int, expected: Any) -> None:
    """Each thread begins at another job."""
    all_jobs, wanted = expected
    torch.set_num_threads(torch_threads)

    def work(i: int) -> None:
        torch.set_num_threads(torch_threads)  # OpenMP has a number for each thread
        for k in range(len(all_jobs)):
            at = (i * 5 + k) % len(all_jobs)
            assert all(map(torch.equal, all_jobs[at](), wanted[at])), f"job {at}"

    together(workers, work)


def test_the_number_of_threads_changes_meanwhile(expected: Any) -> None:
    """Between calls, within them, and from another thread."""
    all_jobs, wanted = expected
    done = threading.Event()

    def change() -> None:
        for threads in itertools.cycle((1, 2, 5)):
            torch.set_num_threads(threads)
            if done.wait(0.001):
                return

    changing = threading.Thread(target=change)
    changing.start()

    def work(i: int) -> None:
        for k in range(2 * len(all_jobs)):
            at = (i * 5 + k) % len(all_jobs)
            torch.set_num_threads((1, 2, 5)[k % 3])
            assert all(map(torch.equal, all_jobs[at](), wanted[at])), f"job {at}"

    try:
        together(3, work)
    finally:
        done.set()
        changing.join()


# ----------------------------------------------------------------------------------------------------------- one model


def batches(model: nn.Module, n: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Batches of one shape, so that each could pass for another; and what the model's own logits say of them."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(n):
        ids = torch.randint(10, VOCAB - 10, (2, 9), generator=generator)
        inputs = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
        with torch.no_grad():
            found.append((inputs, eager_logps(model, **inputs)))
    return found


def of_model(model: nn.Module, inputs: dict[str, Tensor], wanted: Tensor) -> None:
    torch.testing.assert_close(model_logps(model, **inputs).detach(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapter"])
def test_threads_that_share_a_model(adapter: bool) -> None:
    """The first calls, which measure the model, meet too. A thread that calls the model itself gets logits."""
    model: Any = make("llama")
    if adapter:
        model = peft.get_peft_model(model, lora("lm_head"))
        torch.nn.init.normal_(model.base_model.model.lm_head.lora_B["default"].weight)
    given, before = batches(model, 4), {name: {*vars(m)} for name, m in model.named_modules()}

    def work(i: int) -> None:
        inputs, wanted = given[i % 4]
        for _ in range(20):
            if i < 4:
                of_model(model, inputs, wanted)
            else:
                with torch.no_grad():
                    torch.testing.assert_close(eager_logps(model, **inputs), wanted)

    together(6, work)
    assert {name: {*vars(m)} for name, m in model.named_modules()} == before
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("strategy", ["two_pass", "one_pass"])
def test_threads_that_share_a_model_and_its_prompts(strategy: str) -> None:
    """Steps with shared prompts, whose layers checkpoint, each with its gradients; plain calls between."""
    model: Any = make("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    steps = [collate(groups_of((9, [3, 4]), (8, [2, 5]), seed=i), max_sequences=2, share_prompt=True) for i in range(3)]
    copies = [copy.deepcopy(model) for _ in steps]
    flagged = {name for name, m in model.named_modules() if vars(m).get("gradient_checkpointing")}
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    reference = torch.zeros(4)

    def step(model: nn.Module, i: int) -> Tensor:
        step = steps[i]
        return group_backward(
            step.parts, SharedPromptForward(model), step.groups, MPO, reference, strategy=strategy
        ).seq_logps

    wanted = [step(x, i) for i, x in enumerate(copies)]

    def work(i: int) -> None:
        for _ in range(3):
            torch.testing.assert_close(step(model, i), wanted[i], rtol=1e-4, atol=1e-4)

    together(3, work)
    for (name, p), *others in zip(model.named_parameters(), *(x.parameters() for x in copies)):
        total = 3 * sum(y.grad for y in others)
        torch.testing.assert_close(p.grad, total, rtol=1e-3, atol=1e-3 * float(total.abs().max()), msg=name)
    assert {name for name, m in model.named_modules() if vars(m).get("gradient_checkpointing")} == flagged
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention


def test_what_checkpoints_is_known_while_others_turn_it_off_and_on() -> None:
    """The flag and who has turned it off, read one after the other, would belong to two moments."""
    model: Any = make("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    flagged = shared_prompt._checkpointing(model)
    assert flagged

    def work(i: int) -> None:
        for _ in range(500):
            if i:
                with shared_prompt._unflagged(flagged):
                    pass
            else:
                assert shared_prompt._checkpointing(model) == flagged

    together(3, work)
    assert shared_prompt._checkpointing(model) == flagged


def test_a_forward_that_fails_leaves_the_model_to_others() -> None:
    model = make("llama")
    given = batches(model, 2)
    wrong = given[0][0]["targets"] + VOCAB

    def work(i: int) -> None:
        for _ in range(20):
            if i:
                of_model(model, *given[1])
            else:
                with pytest.raises(ValueError, match="targets must be in"):
                    model_logps(model, given[0][0]["input_ids"], wrong)

    together(2, work)
    assert "forward" not in vars(model.lm_head)


# ----------------------------------------------------------------------------------------------- what a process shares


def test_the_budget_of_kept_logits_is_of_all_threads() -> None:
    """A hundred forwards before their backwards keep no more than one, in whatever threads; each is counted."""
    logit_cache._alive.clear()
    inputs = make_inputs(Case("", 64, 1024, 4096, "", ignored="none"))
    budget = 4 * (2 * 1024 * 2048 + 64 * 4096 * 3)  # blocks at work, and three caches
    kept: list[Any] = []

    def work(i: int) -> None:
        for _ in range(2):
            kept.append(linear_logps(inputs.hidden, inputs.weight, inputs.targets, impl="cpu", workspace_bytes=budget))

    together(5, work)
    sizes = [x.nbytes for y in kept if y.grad_fn.name().startswith("Cached") for x in y.grad_fn.saved_tensors[-1:]]
    assert sum(sizes) == logit_cache._in_use() and 0 < sum(sizes) <= 3 * 4 * 64 * 4096
    kept.clear()
    assert logit_cache._in_use() == 0 and not logit_cache._claimed


def test_a_change_ends_with_the_last_thread() -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        seen.append("begins")
        yield
        seen.append("ends")

    change = Change(context)
    first, second = change.held(), change.held()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with change.standing() as held:
        assert seen == ["begins"] and held
    second.__exit__(None, None, None)
    with change.standing() as held:
        assert seen == ["begins", "ends"] and not held
    with pytest.raises(KeyError), change.held():
        raise KeyError
    assert seen == ["begins", "ends"] * 2
