"""OpenRLHF, LLaMA-Factory, ms-swift and open-instruct: the same numbers and gradients as their own code with logits.

Each test runs against the recorded trainer, and against the real one too where that can be imported beside torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import recorded_trainers
import torch
from recorded_trainers import namespace, trainer
from tiny_models import VOCAB, make
from torch import Tensor

from groupdpo_kernels.installed import distribution_version
from groupdpo_kernels.integrations import axolotl, llama_factory, ms_swift, open_instruct, openrlhf

# name: ours, its modules as recorded, the module with what is replaced, distribution, a version inside and one outside
TRAINERS: dict[str, tuple[Any, Callable[[], Any], str, str, str, str]] = {
    "openrlhf": (openrlhf, recorded_trainers.openrlhf, "openrlhf.models.actor", "openrlhf", "0.11.2", "0.12.0"),
    "llama_factory": (
        *(llama_factory, recorded_trainers.llama_factory),
        *("llamafactory.train.dpo.trainer", "llamafactory", "0.9.5", "1.0.0"),
    ),
    "ms_swift": (
        *(ms_swift, recorded_trainers.ms_swift),
        *("swift.rlhf_trainers.dpo_trainer", "ms-swift", "4.6.0", "3.12.0"),
    ),
    "open_instruct": (
        *(open_instruct, recorded_trainers.open_instruct),
        *("open_instruct.dpo_utils", "open-instruct", "0.1.0", ""),
    ),
}


def kinds(name: str) -> list[str]:
    return ["recorded", "real"] if importlib.util.find_spec(TRAINERS[name][2].partition(".")[0]) else ["recorded"]


def both(name: str) -> Any:
    return pytest.mark.parametrize("theirs", [(name, kind) for kind in kinds(name)], indirect=True, ids="-".join)


def record(name: str, monkeypatch: pytest.MonkeyPatch, version: str | None = None) -> Any:
    """The recorded modules, as if installed."""
    _, modules, path, distribution, inside, _ = TRAINERS[name]
    for key, module in modules().items():
        monkeypatch.setitem(sys.modules, key, module)
    installed = importlib.metadata.version
    found = inside if version is None else version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: found if n == distribution else installed(n))
    return sys.modules[path]


@pytest.fixture
def theirs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the trainer, recorded or real."""
    name, kind = request.param
    yield record(name, monkeypatch) if kind == "recorded" else importlib.import_module(TRAINERS[name][2])
    getattr(TRAINERS[name][0], f"unpatch_{name}")()


Values = dict[str, Tensor]


def run(model: Any, call: Callable[[], Values], seed: int = 3) -> tuple[Values, list[Tensor], set[int]]:
    """What a call gives, the gradients under random upstream ones, and the widths of the logits that left the model."""
    shapes: list[torch.Size] = []
    hook = model.register_forward_hook(lambda _, __, outputs: shapes.append(outputs.logits.shape))
    model.zero_grad()
    values = call()
    generator = torch.Generator().manual_seed(seed)
    pairs = [(x, torch.randn(x.shape, generator=generator)) for x in values.values() if x.requires_grad]
    sum((x * d).sum() for x, d in pairs).backward()  # type: ignore[union-attr]
    hook.remove()
    widths = {V for _, L, V in shapes if L > 4}  # the probe has four tokens
    return values, [p.grad.clone() for p in model.parameters() if p.grad is not None], widths


def check_same(model: Any, call: Callable[[], Values], patch: Callable[[], Any], nan: tuple[str, ...] = ()) -> None:
    """Values and gradients with and without ours, but for what nobody knows without logits."""
    expected, gradients, widths = run(model, call)
    assert widths == {VOCAB}
    with patch():
        found, ours, widths = run(model, call)
    assert widths == {1} and found.keys() == expected.keys()
    for name, value in expected.items():
        if name in nan:
            assert found[name].isnan().all()
        else:
            assert found[name].dtype == value.dtype
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    assert len(ours) == len(gradients) > 0
    for a, b in zip(ours, gradients):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7
    again, _, widths = run(model, call)
    assert widths == {VOCAB}  # theirs is back
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def rows(lengths: list[int], prompts: list[int], L: int, left: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and labels (-100 in prompts and padding), (B, L)."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCAB - 9, (len(lengths), L), generator=generator)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (n, prompt) in enumerate(zip(lengths, prompts)):
        start = L - n if left else 0
        mask[row, start : start + n] = 1
        labels[row, start + prompt : start + n] = ids[row, start + prompt : start + n]
    return ids.where(mask == 1, 0), mask, labels


def uncached(model: Any) -> Any:
    """As trainers set it. With a cache, transformers sees one sequence where several are packed, but with flash
    attention; `model_logps` never asks for one."""
    model.config.use_cache = False
    return model


PAIRS = ([11, 7, 6, 13], [4, 3, 4, 3], 13)  # two chosen, two rejected


# ------------------------------------------------------------------------------------------------------------- OpenRLHF


@both("openrlhf")
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_openrlhf(theirs: Any, packing: bool, temperature: float, left: bool) -> None:
    model = uncached(make("llama"))
    actor = theirs.Actor(model, temperature=temperature)
    actor.packing_samples = packing
    ids, mask, labels = rows(*PAIRS, left=left)
    action_mask = (labels != -100).long()[:, -9:]

    def call() -> Values:
        log_probs, output = actor(ids, attention_mask=mask, return_output=True, return_logprobs=True)
        assert "aux_loss" not in output
        actions = actor(ids, action_mask, attention_mask=mask)
        alone = actor(ids, attention_mask=mask, return_logprobs=True)
        assert torch.equal(alone, log_probs) and actions.shape == action_mask.shape
        return {"log_probs": log_probs, "actions": actions}

    check_same(model, call, openrlhf.patch_openrlhf)


@both("openrlhf")
def test_openrlhf_where_logits_are_asked_for(theirs: Any) -> None:
    """Logits and the entropy, which has a gradient there, are OpenRLHF's own."""
    model = make("llama")
    actor = theirs.Actor(model)
    actor.packing_samples = False
    ids, mask, labels = rows(*PAIRS)
    action_mask = (labels != -100).long()[:, 1:]

    def call() -> Values:
        log_probs, output = actor(ids, action_mask, attention_mask=mask, return_output=True, return_entropy=True)
        logits = actor(ids, attention_mask=mask, return_output=True)["logits"]
        return {"log_probs": log_probs, "entropy": output.entropy, "logits": logits}

    expected, gradients, _ = run(model, call)
    with openrlhf.patch_openrlhf():
        found, ours, widths = run(model, call)
    assert widths == {VOCAB} and all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(map(torch.equal, ours, gradients))


@both("openrlhf")
def test_openrlhf_auxiliary_loss(theirs: Any) -> None:
    model = make("mixtral")
    model.config.output_router_logits = True  # as Actor does
    actor = theirs.Actor(model)
    actor.packing_samples = False
    ids, mask, _ = rows(*PAIRS)

    def call() -> Values:
        log_probs, output = actor(ids, attention_mask=mask, return_output=True, return_logprobs=True)
        return {"log_probs": log_probs * mask[:, 1:], "aux_loss": output.aux_loss}

    check_same(model, call, openrlhf.patch_openrlhf)


# -------------------------------------------------------------------------------------------------------- LLaMA-Factory


@both("llama_factory")
@pytest.mark.parametrize("loss_type, ld_alpha", [("sigmoid", None), ("sigmoid", 0.4), ("simpo", None), ("ipo", 0.4)])
@pytest.mark.parametrize("is_ref_model", [False, True])
def test_llama_factory(theirs: Any, loss_type: str, ld_alpha: float | None, is_ref_model: bool) -> None:
    model = make("llama")
    arguments = namespace(use_ref_model=True)
    own = trainer(theirs.CustomDPOTrainer, loss_type=loss_type, ld_alpha=ld_alpha, finetuning_args=arguments)
    ids, mask, labels = rows(*PAIRS)
    labels[3, 5:7] = -100  # a gap, as of a second turn

    def call() -> Values:
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        output = own.concatenated_forward(model, batch, is_ref_model)
        unknown = {name: output.pop(name).mean().detach() for name in ("chosen_logits", "rejected_logits")}
        return {**output, **unknown}

    check_same(model, call, llama_factory.patch_llama_factory, nan=("chosen_logits", "rejected_logits"))


def test_llama_factory_of_tuples_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.9.3 has the same parameters and returns a tuple."""
    theirs = record("llama_factory", monkeypatch)
    theirs.CustomDPOTrainer.concatenated_forward.__annotations__["return"] = tuple[Tensor, ...]
    with pytest.raises(RuntimeError, match=r"concatenated_forward returns a dict; the installed 0\.9\.5 returns none"):
        llama_factory.patch_llama_factory()


# ------------------------------------------------------------------------------------------------------------- ms-swift


def of_swift(theirs: Any, **changes: Any) -> Any:
    attributes: dict[str, Any] = {
        "args": namespace(use_logits_to_keep=changes.pop("keep"), ld_alpha=changes.pop("ld_alpha", None)),
        "template": namespace(padding_free=changes.pop("padding_free", False), sequence_parallel_size=1),
        "aux_loss_enabled": False,
        "is_encoder_decoder": False,
        "label_pad_token_id": -100,
    }
    attributes["args"].tuner_backend = "peft"
    return trainer(theirs.DPOTrainer, **attributes | changes)


def packed(ids: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """One row of all sequences; the first label of each is -100."""
    live = mask.bool()
    labels = labels.clone()
    labels[:, 0] = -100
    return {name: x[live][None] for name, x in (("input_ids", ids), ("labels", labels))} | {
        "position_ids": (mask.cumsum(1) - 1)[live][None]
    }


@both("ms_swift")
@pytest.mark.parametrize("keep", [False, True], ids=["all", "logits_to_keep"])
@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding_free"])
@pytest.mark.parametrize("ld_alpha, is_ref_model", [(None, False), (0.4, False), (0.4, True)])
def test_ms_swift(theirs: Any, keep: bool, padding_free: bool, ld_alpha: float | None, is_ref_model: bool) -> None:
    model = make("llama")
    own = of_swift(theirs, keep=keep, padding_free=padding_free, ld_alpha=ld_alpha)
    ids, mask, labels = rows(*PAIRS)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    batch = packed(ids, mask, labels) if padding_free else batch
    unknown = ("mean_chosen_logits", "mean_rejected_logits")

    def call() -> Values:
        output = own.concatenated_forward(model, batch, is_ref_model)
        return output | {name: output[name].detach() for name in unknown}

    check_same(model, call, ms_swift.patch_ms_swift, nan=unknown)
    assert vars(own).keys() == vars(of_swift(theirs, keep=keep)).keys()


@both("ms_swift")
def test_ms_swift_auxiliary_loss(theirs: Any) -> None:
    model = make("mixtral")
    own = of_swift(theirs, keep=False, aux_loss_enabled=True)
    ids, mask, labels = rows(*PAIRS)
    unknown = ("mean_chosen_logits", "mean_rejected_logits")

    def call() -> Values:
        output = own.concatenated_forward(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
        return output | {name: output[name].detach() for name in unknown}

    check_same(model, call, ms_swift.patch_ms_swift, nan=unknown)


# -------------------------------------------------------------------------------------------------------- open-instruct


def pair_batch(packing: bool) -> dict[str, Tensor]:
    """chosen_ and rejected_ tensors of different lengths; packed: one row a side, with separators and a padded end."""
    ids, mask, labels = rows(*PAIRS)
    batch = {"index": torch.arange(2)} if not packing else {}
    for side, half, L in (("chosen", slice(0, 2), 11), ("rejected", slice(2, 4), 13)):
        values = {"input_ids": ids[half, :L], "labels": labels[half, :L], "attention_mask": mask[half, :L]}
        if packing:
            lengths = values.pop("attention_mask").sum(1)
            values = packed(ids[half], mask[half], labels[half])
            filled = {"input_ids": 0, "labels": -100, "position_ids": 0}
            values = {k: torch.nn.functional.pad(x, (0, 3), value=filled[k]) for k, x in values.items()}
            ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
            values |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
            values |= {"max_length_q": int(lengths.max()), "max_length_k": int(lengths.max())}
        batch |= {f"{side}_{name}": value for name, value in values.items()}
    return batch


@both("open_instruct")
@pytest.mark.parametrize("average", [False, True], ids=["sum", "average"])
@pytest.mark.parametrize("form", ["concatenated", "packed", "separate"])
def test_open_instruct(theirs: Any, average: bool, form: str) -> None:
    model, batch = uncached(make("llama")), pair_batch(form == "packed")

    def call() -> Values:
        if form == "separate":
            chosen, rejected, aux_loss = theirs.separate_forward(model, batch, average_log_prob=average)
        else:
            options = {"packing": True} if form == "packed" else {}
            chosen, rejected, aux_loss = theirs.concatenated_forward(model, batch, average_log_prob=average, **options)
        assert aux_loss is None
        return {"chosen": chosen, "rejected": rejected}

    check_same(model, call, open_instruct.patch_open_instruct)


@both("open_instruct")
def test_open_instruct_auxiliary_loss(theirs: Any) -> None:
    model, batch = make("mixtral"), pair_batch(False)

    def call() -> Values:
        chosen, rejected, aux_loss = theirs.concatenated_forward(model, batch, output_router_logits=True)
        return {"chosen": chosen, "rejected": rejected, "aux_loss": aux_loss}

    check_same(model, call, open_instruct.patch_open_instruct)
    with (
        open_instruct.patch_open_instruct(),
        pytest.raises(ValueError, match=r"output_router_logits must be False.*got True"),
    ):
        theirs.separate_forward(model, batch, output_router_logits=True)


# --------------------------------------------------------------------------------------------------------- what is not


@pytest.mark.parametrize("name", [name for name in TRAINERS if name != "open_instruct"])
def test_other_versions_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, *_, outside = TRAINERS[name]
    for version in (outside, "unknown"):
        record(name, monkeypatch, version)
        with pytest.raises(RuntimeError, match=rf"integrations\.{name} knows .* and later, before .*is {version}"):
            getattr(ours, f"patch_{name}")()


@pytest.mark.parametrize("name", TRAINERS)
def test_other_parameters_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another name, another default; nothing is replaced, and what comes later works."""
    theirs = record(name, monkeypatch)
    holder = next((vars(theirs)[c] for c in ("Actor", "CustomDPOTrainer", "DPOTrainer") if c in vars(theirs)), theirs)
    method = "forward" if name == "openrlhf" else "concatenated_forward"
    own = getattr(holder, method)

    def other(self: Any, model: Any, batch: Any, reference: bool = False) -> None: ...

    monkeypatch.setattr(holder, method, other)
    patch = getattr(TRAINERS[name][0], f"patch_{name}")
    with pytest.raises(RuntimeError, match=rf"{name} knows .*in the installed .* it takes \(model, batch, reference\)"):
        patch()
    assert getattr(holder, method) is other
    monkeypatch.setattr(holder, method, own)
    with patch():
        assert getattr(holder, method) is not own
    assert getattr(holder, method) is own


def test_nothing_is_imported_and_nothing_there_is_said() -> None:
    program = f"""
import sys
NAMES = {sorted(TRAINERS)!r}
PROJECTS = ("openrlhf", "llamafactory", "swift", "open_instruct", "axolotl", "trl", "transformers", "deepspeed")
from importlib import import_module
modules = [import_module(f"groupdpo_kernels.integrations.{{name}}") for name in NAMES + ["axolotl"]]
print(not any(name in sys.modules for name in PROJECTS))
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in PROJECTS else self.finder.find_spec(name, *rest)
sys.meta_path[:] = map(Hiding, sys.meta_path)
for module in modules:
    try:
        getattr(module, "patch_" + module.__name__.rpartition(".")[2])()
    except ImportError as error:
        print("is not installed: pip install" in str(error))
try:
    modules[-1].GroupDPOPlugin
except ImportError as error:
    print("Axolotl is not installed: pip install axolotl" == str(error))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 7, done.stdout + done.stderr


def test_versions_of_what_is_not_installed() -> None:
    assert distribution_version("no-such-distribution-as-this") == "unknown"
    assert not hasattr(axolotl, "OtherPlugin")


# ------------------------------------------------------------------------------------------------- in whatever order


def state(name: str) -> dict[str, Any]:
    """Every name in the project's modules, and in their classes."""
    package = TRAINERS[name][2].partition(".")[0]
    owners = {key: m for key, m in sys.modules.items() if key.partition(".")[0] == package}
    for key, module in [*owners.items()]:
        owners |= {f"{key}.{n}": c for n, c in vars(module).items() if isinstance(c, type)}
    return {f"{key}.{n}": value for key, owner in owners.items() for n, value in vars(owner).items()}


@pytest.mark.parametrize("name", TRAINERS)
def test_patches_in_any_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nested, crossed, ended twice or never begun, left by an error, from threads: then all is as it was."""
    record(name, monkeypatch)
    ours = TRAINERS[name][0]
    patch, unpatch = getattr(ours, f"patch_{name}"), getattr(ours, f"unpatch_{name}")
    unpatch()
    before = state(name)
    first, second = patch(), patch()
    during = state(name)
    assert during != before
    first.__exit__(None, None, None)
    first.__exit__(None, None, None)
    assert state(name) == during  # the second has not ended
    with pytest.raises(KeyError), first:
        raise KeyError
    assert state(name) == during
    second.__exit__(None, None, None)
    assert state(name) == before
    with patch(), patch():
        unpatch()
        assert state(name) == before
    unpatch()
    assert state(name) == before

    def work(_: int) -> None:
        for _ in range(10):
            with patch():
                assert state(name) != before

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert state(name) == before


def test_patches_of_several_projects_cross(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TRAINERS:
        record(name, monkeypatch)
    patches = [getattr(ours, f"patch_{name}") for name, (ours, *_) in TRAINERS.items()]
    before = {name: state(name) for name in TRAINERS}
    begun = [patch() for patch in patches]
    for k in (1, 0, 3, 2):
        begun[k].__exit__(None, None, None)
    assert {name: state(name) for name in TRAINERS} == before


@pytest.mark.parametrize("name", TRAINERS)
def test_a_module_that_is_loaded_again_leaves_nothing_in_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record(name, monkeypatch)
    ours = TRAINERS[name][0]
    before = state(name)
    patched = getattr(ours, f"patch_{name}")()
    importlib.reload(ours)
    assert state(name) == before
    patched.__exit__(None, None, None)
    with getattr(ours, f"patch_{name}")():
        assert state(name) != before
    assert state(name) == before
