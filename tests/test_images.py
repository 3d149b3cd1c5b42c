"""Groups whose prompt has images: Qwen2.5-VL, Gemma 3 and SmolVLM with their real processors, against plain logits and
against TRL; how rows with images are read, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from PIL import Image
from tiny_tokenizers import byte_level_bpe
from tiny_trl import COMMON, check_same, run, steps
from tiny_vision import make_vision, picture
from torch import Tensor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from groupdpo_kernels import Objective, SharedPrompt, SharedPromptForward, group_backward, preference_loss
from groupdpo_kernels.data import Report, collate, merge_prompts, read_groups, tokenize_groups
from groupdpo_kernels.data.images import Pictures, image_key, inputs_of, processed, prompt_tokens, repeated
from groupdpo_kernels.models.layouts import why_not_shared, why_not_shared_images
from groupdpo_kernels.stepwise.store import digest
from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer, StepwiseDPO
from groupdpo_kernels.trainers.fit_check import advice
from groupdpo_kernels.trainers.rows import Collator

MODELS = ("qwen2_5_vl", "gemma3", "smolvlm")
OBJECTIVE = Objective("mpo", beta=2.0, average=True, nll_weight=1.0, reference_free=True)
PLACE = {"type": "image"}


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def asks(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": parts[0] if isinstance(parts[0], str) else [*parts]}]


# One image, two of other sizes in places of their own, and none.
ROWS = [
    {
        "prompt": asks("What is it?"),
        "images": [picture(0)],
        "positives": ["Tea.", "Green tea."],
        "negatives": ["No idea."],
    },
    {
        "prompt": asks(PLACE, words("or"), PLACE, words("?")),
        "images": [picture(1, 30, 9), picture(2, 9, 30)],
        "positives": ["The first one."],
        "negatives": ["Coffee.", "Both."],
    },
    {"prompt": asks("Hi."), "positives": ["Hello."], "negatives": ["No.", "Tea?"]},
]


def whole_sequences(vision: Any, rows: list[dict[str, Any]]) -> tuple[Tensor, list[int]]:
    """(sums of the responses' log-probabilities, their lengths): the processor and the model on each conversation."""
    model, processor = vision
    sums, lengths = [], []
    for row in rows:
        prompt = row["prompt"]
        if isinstance(prompt[0]["content"], str):
            prompt = asks(*[PLACE] * len(row.get("images", ())), words(prompt[0]["content"]))
        images = [row["images"]] if "images" in row else None
        head = processor.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        options = {"images": images, "return_tensors": "pt", "add_special_tokens": False}
        P = processor(text=[head], **options)["input_ids"].shape[1]
        for answer in (*row["positives"], *row["negatives"]):
            said = [*prompt, {"role": "assistant", "content": [words(answer)]}]
            text = processor.tokenizer.apply_chat_template(said, tokenize=False)
            text = text[: text.rindex(processor.tokenizer.eos_token) + len(processor.tokenizer.eos_token)]
            inputs = processor(text=[text], **options)
            logps = model(**inputs).logits[0].log_softmax(-1)
            targets = inputs["input_ids"][0, P:]
            sums.append(logps[P - 1 : -1].gather(1, targets[:, None]).sum())
            lengths.append(len(targets))
    return torch.stack(sums), lengths


@pytest.mark.parametrize("strategy", ["two_pass", "one_pass"])
@pytest.mark.parametrize("name, shared", [*((name, False) for name in MODELS), ("gemma3", True), ("smolvlm", True)])
def test_the_gradient_is_that_of_plain_logits(name: str, shared: bool, strategy: str) -> None:
    """In micro-batches of two, in float64, against one graph, with a prompt's images once for each response and once
    for all. They matter to it."""
    vision = make_vision(name)
    model = vision.model.double()
    sums, lengths = whole_sequences(vision, ROWS)
    groups = list(tokenize_groups(read_groups(ROWS), vision.processor, on_bad="error"))
    options: dict[str, Any] = {"processor": vision.processor, "share_prompt": True, "share_images": shared}
    step = collate(groups, "packed", max_sequences=2, **options)
    pixels = [
        x.inputs["pixel_values"] for x in step.parts if not isinstance(x, SharedPrompt) and "pixel_values" in x.inputs
    ]
    assert bool(pixels) != shared
    offsets = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    tokens = torch.cat([x.repeat(n) / n for x, n in zip(sums, lengths)])
    expected = preference_loss(tokens, offsets, step.groups, OBJECTIVE)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(expected.loss, [*trained.values()], allow_unused=True)
    options = {"strategy": strategy, "parameters": [*trained.values()]}
    found = group_backward(step.parts, SharedPromptForward(model, strict=True), step.groups, OBJECTIVE, **options)
    # These models compute parts of attention and of norms in float32.
    torch.testing.assert_close(found.seq_logps, sums.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss.detach(), rtol=1e-5, atol=1e-5)
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    for (name, p), g in zip(trained.items(), gradients):
        ours = torch.zeros_like(p) if p.grad is None else p.grad
        assert (ours - (0 if g is None else g)).norm() <= 1e-5 * norm, name
    seen = [p.grad.norm() for name, p in trained.items() if "vis" in name and p.grad is not None]
    assert len(seen) > 4 and max(seen) > 1e-4 * norm  # the tower of images trains
    others = [{**row, "images": [*map(picture, range(5, 5 + len(row["images"])))]} for row in ROWS[:1]]
    assert (whole_sequences(vision, others)[0] - sums[:3]).abs().max() > 1e-3


def test_a_batch_of_images() -> None:
    """A micro-batch holds one prompt with images, once for each of its responses; text rows share micro-batches."""
    processor = make_vision("qwen2_5_vl").processor
    groups = list(tokenize_groups(read_groups([*ROWS, ROWS[2]]), processor))
    assert [group.pictures is not None for group in groups] == [True, True, False, False]
    assert groups[0].shares_prompt and groups[0].pictures.images == [picture(0)]
    step = collate(groups, processor=processor, share_prompt=False)
    first, second, text = step.parts
    assert text.input_ids.shape[0] == 6 and "pixel_values" not in text.inputs
    for mb, group in ((first, groups[0]), (second, groups[1])):
        R, images = len(group.responses), len(group.pictures.images)
        assert mb.inputs["image_grid_thw"].shape == (R * images, 3) and mb.input_ids.shape[0] == R
        kinds = mb.inputs["mm_token_type_ids"]
        assert kinds.shape == mb.input_ids.shape
        assert torch.equal(kinds == 1, mb.input_ids == processor.image_token_id)
    assert digest(groups[0]) == digest(copy.deepcopy(groups[0]))
    other = groups[0]._replace(pictures=groups[0].pictures._replace(images=[picture(7)]))
    assert digest(groups[0]) != digest(other)
    with pytest.raises(ValueError, match="processor must be given for groups with images, as row 0 has; got None"):
        collate(groups)


# ---------------------------------------------------------------------------------------------------------- the trainer

PAIRS = [
    {
        "prompt": asks("What is it?" if k % 2 else "Tea?"),
        "images": [picture(k, 12 + 6 * k, 12)],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    for k, (chosen, rejected) in enumerate(
        [("Green.", "Coffee."), ("Tea. Hello.", "No."), ("Hi.", "An hour."), ("No.", "Be brief.")]
    )
]


def trainer_of(vision: Any, folder: Path, rows: Any, options: dict[str, Any], **named: Any) -> Any:
    config = {**COMMON, "output_dir": str(folder), "max_steps": 2, "micro_batch_sequences": 2, **options}
    named = {"processing_class": vision.processor, "train_dataset": rows, **named}
    return GroupDPOTrainer(vision.model, args=GroupDPOConfig(**config), **named)


def test_which_models_share_images() -> None:
    """Qwen counts the positions after an image by its shape: rows after its keys and values are elsewhere."""
    for name in MODELS:
        vision = make_vision(name)
        group = next(tokenize_groups(read_groups(ROWS[:1]), vision.processor))
        inputs = partial(repeated, inputs_of(vision.processor, group.pictures))
        assert why_not_shared(vision.model) == ""  # by its text alone
        why = why_not_shared_images(vision.model, group.prompt, inputs)
        assert bool(why) == (name == "qwen2_5_vl") and ("off the whole sequence" in why) == bool(why)


@pytest.mark.parametrize("name", MODELS)
def test_a_trainer_shares_images_where_the_model_can(name: str, tmp_path: Path) -> None:
    """With checkpointed layers too; the pixels of a group are in its step once."""
    runs = []
    for share in (False, "auto"):
        vision = make_vision(name)
        warns = pytest.warns(UserWarning, match="a prompt with images runs again for each of its responses")
        with warns if share == "auto" and name == "qwen2_5_vl" else contextlib.nullcontext():
            trainer = trainer_of(vision, tmp_path, ROWS, {"share_prompt": share, "learning_rate": 0.3})
        runs.append(run(trainer))
    check_same(*runs, weights=1e-4, logs=1e-4)
    plain, shared = (steps(trainer)[-1]["computed_tokens"] for trainer, *_ in runs)
    assert (shared < plain) and trainer.data_collator.share_images == (name != "qwen2_5_vl")
    if name == "qwen2_5_vl":
        with pytest.raises(ValueError, match=r"share_prompt must be 'auto' or False for these images: .*; got True"):
            trainer_of(make_vision(name), tmp_path, ROWS, {"share_prompt": True})


# TRL scores the line end that these models' templates write after a turn, which is never sampled: one without it.
TURNS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ 'IMAGE' if part.type == 'image' else part.text }}{% endfor %}{% endif %}EOS"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLACES = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>",
    "smolvlm": "<image>",
}


@pytest.mark.parametrize("name", MODELS)
def test_pairs_with_images_are_trls(name: str, tmp_path: Path) -> None:
    """Step by step, with the processor that the model has."""
    vision, other = make_vision(name), make_vision(name)
    for each in (vision.processor, other.processor):
        template = TURNS.replace("IMAGE", PLACES[name]).replace("EOS", each.tokenizer.eos_token)
        each.chat_template = each.tokenizer.chat_template = template
    rate = {"learning_rate": 0.3}
    ours = run(trainer_of(vision, tmp_path / "ours", PAIRS, rate, objective=Objective("sigmoid", beta=0.3)))
    config = {**COMMON, **rate, "max_steps": 2, "beta": 0.3, "max_length": None}
    theirs = trl.DPOTrainer(
        other.model, ref_model=make_vision(name).model, args=trl.DPOConfig(str(tmp_path / "trl"), **config),
        train_dataset=Dataset.from_list(PAIRS), processing_class=other.processor,
    )  # fmt: skip
    names = check_same(ours, run(theirs), weights=1e-4, logs=1e-4, but="num_tokens")
    assert names >= {"loss", "grad_norm", "rewards/margins", "logps/chosen"}


def test_strategies_and_references_give_one_gradient(tmp_path: Path) -> None:
    runs = []
    for options in (
        {"strategy": "coupled", "micro_batch_sequences": None},
        {"strategy": "two_pass", "layout": "packed"},
        {"strategy": "auto", "share_prompt": True, "precompute_ref_log_probs": True},
    ):
        vision = make_vision("smolvlm")
        trainer = trainer_of(vision, tmp_path / "run", ROWS, {**options, "learning_rate": 0.3})
        runs.append(run(trainer))
        assert trainer.strategy == ("coupled" if options["strategy"] == "coupled" else "two_pass")
    for found in runs[1:]:
        check_same(found, runs[0], weights=1e-4, logs=1e-4)


def test_stages_and_evaluation(tmp_path: Path) -> None:
    vision = make_vision("smolvlm")
    options = {**COMMON, "output_dir": str(tmp_path), "max_steps": 1}
    trainer = StepwiseDPO(vision.model, GroupDPOConfig(**options), [PAIRS[:2], PAIRS[2:]], vision.processor)
    trainer.train()
    assert all(rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3) for rows in trainer.history.values())
    vision = make_vision("smolvlm")
    one = trainer_of(vision, tmp_path / "one", PAIRS, {}, objective=Objective("sigmoid"), eval_dataset=PAIRS[:2])
    assert one.evaluate()["eval_loss"] == pytest.approx(0.6931, abs=1e-3) and not steps(one)


def test_references_on_disk_are_of_the_processors_pixels(tmp_path: Path) -> None:
    """Another mean of pixels is another image, with as many tokens."""
    sums = []
    for mean in (0.5, 0.5, 0.9):
        vision = make_vision("gemma3")
        vision.processor.image_processor.image_mean = [mean] * 3
        one = trainer_of(vision, tmp_path, PAIRS, {"precompute_ref_log_probs": True}, objective=Objective("sigmoid"))
        sums.append(torch.cat(one.train_dataset.ref_logps))
        torch.testing.assert_close(sums[-1], one.score(vision.model, one.train_dataset.groups))
    assert torch.equal(sums[0], sums[1]) and (sums[0] - sums[2]).abs().max() > 1e-3


def test_references_on_disk_are_of_an_images_bytes(tmp_path: Path) -> None:
    """A file that is changed in place, with its size and its time as they were, is another image."""
    path, vision, sums = tmp_path / "tea.bmp", make_vision("gemma3"), []
    row = {"prompt": "What is it?", "chosen": "Tea.", "rejected": "Coffee.", "image": str(path)}
    scored = {"precompute_ref_log_probs": True}
    for seed in (0, 0, 1):
        picture(seed).save(path)
        os.utime(path, (0, 0))
        one = trainer_of(vision, tmp_path, [row], scored, objective=Objective("sigmoid"))
        sums.append(torch.cat(one.train_dataset.ref_logps))
        torch.testing.assert_close(sums[-1], one.score(vision.model, one.train_dataset.groups))
    assert torch.equal(sums[0], sums[1]) and (sums[0] - sums[2]).abs().max() > 1e-3


def test_advice_knows_no_images() -> None:
    vision = make_vision("gemma3")
    step = collate(list(tokenize_groups(read_groups(PAIRS[:1]), vision.processor)), processor=vision.processor)
    said = advice(vision.model, step, "two_pass", False, torch.device("cpu"), None)
    assert said == "What would fit is not known: the planner sizes a model of text, and the step has images"


def test_what_the_trainer_refuses(tmp_path: Path) -> None:
    vision = make_vision("smolvlm")
    groups = list(tokenize_groups(read_groups(ROWS), vision.processor))
    with pytest.raises(ValueError, match=r"must be a processor of images for train_dataset, which has some; got None"):
        trainer_of(vision, tmp_path, groups, {}, processing_class=None)
    with pytest.raises(ValueError, match="tokenizer must be a processor of images for row 0, which has some; got"):
        trainer_of(vision, tmp_path, ROWS, {}, processing_class=vision.processor.tokenizer)
    with pytest.raises(ValueError, match="it has tools or images, which a chat template alone can place"):
        trainer_of(vision, tmp_path, [{**ROWS[0], "prompt": "Tea?"}], {"chat": False, "on_bad": "error"})
    with pytest.raises(ValueError, match="micro_batch_tokens must be a number or None for rows with images"):
        trainer_of(vision, tmp_path, ROWS, {"micro_batch_tokens": "auto"})


def test_under_an_engine_images_run_with_each_response(tmp_path: Path) -> None:
    """`"auto"` says so, True is refused, a prompt of text alone is shared as ever."""
    vision = make_vision("smolvlm")
    groups = list(tokenize_groups(read_groups(ROWS), vision.processor))
    collator = Collator("padded", None, 4, 0, share_prompt=True, processor=vision.processor)
    for engine in ("fsdp", "deepspeed"):
        args = SimpleNamespace(**{"fsdp": "", "deepspeed": None, engine: "yes"}, share_prompt="auto")
        with pytest.warns(UserWarning, match=r"a prompt with images runs again .*: nobody has tried it under"):
            assert not collator.sharing_images(args, groups, vision.model).share_images
        assert collator.sharing_images(args, groups[2:], vision.model) is collator
        args.share_prompt = True
        with pytest.raises(ValueError, match=r"share_prompt must be 'auto' or False for these images: .*; got True"):
            collator.sharing_images(args, groups, vision.model)


def test_a_processor_that_says_more_of_each_token_is_refused() -> None:
    """Mllama's says to which images a token attends, which nobody says of the tokens of a response."""
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<|image|>", "<|python_tag|>"]})
    images = MllamaImageProcessorPil(size={"height": 8, "width": 8}, max_image_tiles=1)
    template = "{% for m in messages %}<|image|>Tea.{% endfor %}"
    processor = transformers.MllamaProcessor(images, tokenizer, chat_template=template)
    message = r"say nothing of each token but its kind .*; got 'cross_attention_mask' of shape \(1, \d+, 1, 1\)"
    for name in (inputs_of, lambda *given: prompt_tokens(processed(*given))):
        with pytest.raises(ValueError, match=message):
            name(processor, Pictures("<|image|>Tea.", [picture(0)]))


# --------------------------------------------------------------------------------------------------------- what is read


def test_images_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "tea.png"
    picture(0).save(path)
    row = {"prompt": "What is it?", "chosen": "Tea.", "rejected": "Coffee."}
    (text,) = read_groups([{**row, "image": picture(0)}], on_bad="error")
    assert text.prompt == asks("What is it?") and text.images == [picture(0)]  # only a template can place it
    (plain,) = read_groups([{**row, "images": []}], on_bad="error")
    assert plain.prompt == "What is it?" and plain.images is None
    processor = make_vision("gemma3").processor
    (a,), (b,) = (
        tokenize_groups(read_groups([{**row, "images": [x]}]), processor, on_bad="error")
        for x in (picture(0), str(path))
    )
    assert torch.equal(a.prompt, b.prompt) and processor.image_token_id in a.prompt.tolist()
    pixels = [collate([x], processor=processor).parts[0].inputs["pixel_values"] for x in (a, b)]
    assert torch.equal(*pixels)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}  # without content
    past = [*asks("What is it?"), call, {"role": "tool", "content": "A cup."}]
    (group,) = read_groups([{**row, "prompt": past, "image": picture(0)}], on_bad="error")
    (tokens,) = tokenize_groups([group], make_vision("qwen2_5_vl").processor, on_bad="error")
    assert len(tokens.pictures.images) == 1
    more = [{**row, "image": picture(0)}, {**row, "image": picture(0), "rejected": "No."}, {**row, "image": picture(1)}]
    assert [len(group.responses) for group in merge_prompts(read_groups(more))] == [3, 2]
    table = Dataset.from_list([{**row, "images": [picture(0)]}, {**row, "images": None}])
    assert [group.images is None for group in read_groups(table)] == [False, True]


def test_equal_images_are_told_from_others() -> None:
    """Rows of a prompt are merged by them, and references on disk found by their digests."""
    red, blue = (Image.new("P", (4, 4)) for _ in range(2))
    red.putpalette([255, 0, 0] * 256)
    blue.putpalette([0, 0, 255] * 256)
    dot = torch.zeros(3, 64, 64)
    dot[:, 30:34, 30:34] = 1
    for one, other in ((red, blue), (dot, torch.zeros(3, 64, 64)), (picture(0), picture(1))):
        for name in (image_key, digest):
            assert name(one) == name(copy.deepcopy(one)) != name(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [picture(0)], "image": picture(1)}, "images in one column, image or images; got both"),
        ({"images": picture(0)}, "images must be a list; got a Image"),
        ({"image": "https://example.org/tea.png"}, "an image must be at hand, as an object or a path; got an address"),
        ({"images": [picture(0)] * 2, "prompt": asks(PLACE)}, "a place for each image, .*; it has 1 for 2"),
        ({"prompt": asks(PLACE, words("?"))}, "a place for each image, .*; it has 1 for 0"),
        ({"prompt": asks({"type": "image", "url": "x"})}, "a place of an image must hold its type alone.*; got url"),
        ({"prompt": asks({"type": "audio"})}, "a message must be of text and images alone; got a part of type 'audio'"),
        ({"chosen": [{"role": "assistant", "content": [PLACE]}], "images": [picture(0)]}, "messages of text"),
    ],
)
def test_bad_images(change: dict[str, Any], message: str) -> None:
    row = {"prompt": asks("What is it?"), "chosen": "Tea.", "rejected": "Coffee.", **change}
    with pytest.raises(ValueError, match=message):
        list(read_groups([row], on_bad="error"))


def test_images_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    processor = make_vision("smolvlm").processor
    row = {"prompt": asks("What is it?"), "chosen": "Tea.", "rejected": "Coffee."}
    report = Report()
    groups = read_groups([{**row, "image": str(tmp_path / "none.png")}, {**row, "image": picture(0)}], report=report)
    (found,) = tokenize_groups(groups, processor, report=report)
    assert found.row == 1 and "row 0: the processor refuses its images: " in str(report)
    report, long = Report(), read_groups([{**row, "image": picture(0)}])
    assert not list(tokenize_groups(long, processor, max_length=20, too_long="truncate_prompt", report=report))
    assert report.dropped["too long"] == 2  # nothing is cut off an image
