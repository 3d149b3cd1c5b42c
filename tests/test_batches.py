"""Groups -> tokens -> batches -> a loss: what is scored, and where it lies."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from preference_rows import EXAMPLES, SYSTEM, TEA, says, user
from tiny_models import BASE
from tiny_tokenizers import CHATML, byte_level_bpe
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader

from groupdpo_kernels import Objective, PreferenceGroups, data, group_backward, model_logps, preference_loss, seq_logps
from groupdpo_kernels.data import Group, Report, collate, merge_prompts, read_groups, tokenize_groups, top_k
from groupdpo_kernels.data.batches import micro_batches

# ---- tokens ----------------------------------------------------------------------------------------------------------


def tokens_of(tokenizer: Any, *groups: Group, **options: Any) -> list[Any]:
    return list(tokenize_groups(groups, tokenizer, **options))


def test_plain_text_is_prompt_and_response_with_eos(bpe: Any) -> None:
    group = Group("How long does tea", [" steep?", "steep? Hi.</s>"], [True, False], 7)
    (tokens,) = tokens_of(bpe, group)
    assert tokens.row == 7 and tokens.positive == [True, False]
    assert bpe.decode(tokens.prompt) == "How long does tea"
    assert [bpe.decode(r) for r in tokens.responses] == [" steep?</s>", "steep? Hi.</s>"]  # one eos, never two
    (tokens,) = tokens_of(bpe, group, add_eos=False)
    assert [bpe.decode(r) for r in tokens.responses] == [" steep?", "steep? Hi.</s>"]


def test_no_token_spans_the_border(bpe: Any) -> None:
    """ "Th" + "ree" is one token of the whole text: the response keeps its own tokens."""
    whole = bpe("Three")["input_ids"]
    (tokens,) = tokens_of(bpe, Group("Th", ["ree", "e"], [True, False], 0), add_eos=False)
    assert tokens.prompt.tolist() + tokens.responses[0].tolist() != whole
    assert tokens.prompt.tolist() == bpe("Th")["input_ids"] and tokens.responses[0].tolist() == bpe("ree")["input_ids"]


def test_bos_is_put_before_plain_prompts_alone() -> None:
    tokenizer = byte_level_bpe(bos=True)
    (plain,) = tokens_of(tokenizer, Group("Tea?", ["Green.", "Coffee."], [True, False], 0))
    assert plain.prompt.tolist() == tokenizer("Tea?")["input_ids"] and plain.prompt[0] == 1
    assert all(1 not in r for r in plain.responses)
    (chat,) = tokens_of(tokenizer, Group(TEA, ["Green.", "Coffee."], [True, False], 0))
    assert 1 not in chat.prompt  # a template writes its own


def test_no_space_is_put_between_prompt_and_response(sentencepiece_like: Any) -> None:
    tokenizer = sentencepiece_like
    assert tokenizer.convert_ids_to_tokens(tokenizer("Green.")["input_ids"]) == ["<s>", "▁Green."]
    (tokens,) = tokens_of(tokenizer, Group("Tea?", [" Green.", "Green.", "\nHi."], [True, False, False], 0))
    assert tokenizer.convert_ids_to_tokens(tokens.prompt) == ["<s>", "▁Tea?"]
    responses = [tokenizer.convert_ids_to_tokens(r) for r in tokens.responses]
    assert responses[0] == ["▁Green.", "</s>"]
    assert responses[1] == [*"Green.", "</s>"]
    assert responses[2] == ["<0x0A>", *"Hi.", "</s>"]
    for text, ids in zip([" Green.", "Green.", "\nHi."], tokens.responses):
        assert [*tokens.prompt.tolist(), *ids.tolist()[:-1]] == tokenizer("Tea?" + text)["input_ids"]


def test_conversations_go_through_the_template(bpe: Any) -> None:
    group = Group([SYSTEM, *TEA], ["Three minutes.", "An hour."], [True, False], 0)
    (tokens,) = tokens_of(bpe, group)
    header = bpe.apply_chat_template(group.prompt, tokenize=False, add_generation_prompt=True)
    assert bpe.decode(tokens.prompt) == header
    assert [bpe.decode(r) for r in tokens.responses] == ["Three minutes.</s>", "An hour.</s>"]  # without the line end
    whole = bpe.apply_chat_template([*group.prompt, says("An hour.")], tokenize=False)
    assert whole == header + "An hour.</s>\n"


QWEN = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATS = {"one turn": TEA, "a system prompt": [SYSTEM, *TEA], "turns": [*user("Hi."), says("Hello."), *TEA]}


def qwen_like(bos: str | None = None) -> Any:
    """A tokenizer whose template has a default system prompt and ends turns with eos and a line end, as Qwen's has."""
    tokenizer = byte_level_bpe(bos=bos is not None)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.bos_token, tokenizer.chat_template = bos, QWEN
    return tokenizer


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("bos", [None, "<s>"], ids=["without bos", "with bos"])
def test_tokens_are_those_of_the_template_applied_once(bos: str | None, chat: str) -> None:
    """Together they have one bos and one eos for each turn, and the default system prompt does not come twice."""
    tokenizer, prompt, answers = qwen_like(bos), CHATS[chat], ["Three minutes.", "No idea."]
    (tokens,) = tokens_of(tokenizer, Group(prompt, answers, [True, False], 0))
    line_end = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for text, response in zip(answers, tokens.responses):
        found = [*tokens.prompt.tolist(), *response.tolist()]
        whole = tokenizer.apply_chat_template([*prompt, says(text)], tokenize=True, return_dict=False)
        assert found + line_end == whole
        assert found.count(1) == (bos is not None) and found[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(found).count("You are helpful.") == (prompt[0]["role"] != "system")
        assert response.tolist().count(tokenizer.eos_token_id) == 1


def test_chat_by_choice(bpe: Any) -> None:
    text, turn = (Group(prompt, ["A", "B"], [True, False], 0) for prompt in ("Tea?", user("Tea?")))
    as_text, as_turn = (tokens_of(bpe, group)[0].prompt for group in (text, turn))
    assert torch.equal(tokens_of(bpe, turn, chat=False)[0].prompt, as_text)
    assert torch.equal(tokens_of(bpe, text, chat=True)[0].prompt, as_turn)
    assert len(as_turn) > len(as_text)
    report = Report()
    assert not tokens_of(bpe, Group([SYSTEM, *TEA], ["A", "B"], [True, False], 3), chat=False, report=report)
    assert report.first["template"].startswith("row 3: chat=False takes one turn")


def test_templates_that_do_not_fit(bpe: Any, sentencepiece_like: Any) -> None:
    group = Group([*TEA, {"role": "tool", "content": "x"}], ["A", "B"], [True, False], 4)
    with pytest.raises(ValueError, match="row 4: the chat template refuses it: no tools"):
        tokens_of(bpe, group, on_bad="error")
    with pytest.raises(ValueError, match="tokenizer has no chat_template for the conversation of row 5"):
        tokens_of(sentencepiece_like, Group(TEA, ["A", "B"], [True, False], 5))
    thinking = byte_level_bpe()
    thinking.chat_template = CHATML + "{% if think and add_generation_prompt %}<think>{% endif %}"
    group = Group(TEA, ["A", "B"], [True, False], 6)
    assert tokens_of(thinking, group)
    with pytest.raises(ValueError, match="row 6: the chat template does not continue its own prompt"):
        tokens_of(thinking, group, template_options={"think": True}, on_bad="error")
    no_eos = transformers.PreTrainedTokenizerFast(tokenizer_object=thinking.backend_tokenizer)
    with pytest.raises(ValueError, match="eos"):
        tokens_of(no_eos, group)
    assert tokens_of(no_eos, Group("Tea?", ["A", "B"], [True, False], 6), add_eos=False)


def test_too_long() -> None:
    tokenizer = byte_level_bpe(bos=True)
    texts = ["ABCDEFG", "XY", "ABCDEFGHIJKLMNOPQRST"]  # a token a character, and eos
    group = Group("0123456789", texts, [True, False, False], 2)  # and bos

    def lengths(max_length: int, **options: Any) -> tuple[int, list[int]]:
        (tokens,) = tokens_of(tokenizer, group, max_length=max_length, **options)
        assert len(tokens.prompt) + max(map(len, tokens.responses)) <= max_length
        return len(tokens.prompt), [len(r) for r in tokens.responses]

    assert lengths(32) == (11, [8, 3, 21])
    report = Report()
    assert lengths(31, report=report, on_bad="error") == (11, [8, 3])  # dropping it is the choice made
    assert report.dropped == {"too long": 1}
    with pytest.raises(ValueError, match="row 2: a response of 21 tokens has room for 20, with a prompt of 11"):
        tokens_of(tokenizer, group, max_length=31, too_long="error")
    assert lengths(25, too_long="truncate_prompt") == (4, [8, 3, 21])
    (tokens,) = tokens_of(tokenizer, group, max_length=25, too_long="truncate_prompt")
    assert tokenizer.decode(tokens.prompt) == "<s>789"
    assert lengths(23, too_long="truncate_prompt") == (2, [8, 3, 21])
    assert lengths(22, too_long="truncate_prompt") == (11, [8, 3])  # without the long one nothing is cut
    with pytest.raises(ValueError, match="row 2: a response of 21 tokens has room for 20"):
        tokens_of(tokenizer, group, max_length=22, too_long="truncate_prompt", on_bad="error")
    report = Report()
    assert not tokens_of(tokenizer, group, max_length=5, report=report)
    assert report.dropped == {"too long": 3, "no positive": 1}
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        tokens_of(tokenizer, group, max_length=1)
    with pytest.raises(ValueError, match="too_long must be one of drop, error, truncate_prompt"):
        tokens_of(tokenizer, group, max_length=8, too_long="cut")


def test_a_response_is_not_cut() -> None:
    """A prompt of two tokens and a response of three, with room for three: its first token would have no context, and
    without its last it would be another response. With room for four a token of the prompt goes."""
    group, report = Group("Hi", ["AB", "C"], [True, False], 0), Report()
    tokenizer = byte_level_bpe()
    for too_long in ("drop", "truncate_prompt"):
        assert not tokens_of(tokenizer, group, max_length=3, too_long=too_long, report=report)
    assert report.dropped["too long"] == 3  # the shorter one has room where the prompt gives way
    (tokens,) = tokens_of(tokenizer, group, max_length=4, too_long="truncate_prompt")
    assert tokenizer.decode(tokens.prompt) == "i" and [len(ids) for ids in tokens.responses] == [3, 2]
    (step,) = collate([tokens]).micro_batches
    assert step.cu_seqlens.tolist() == [0, 3, 5]


def test_texts_without_tokens() -> None:
    words = Tokenizer(models.BPE({"</s>": 0, "a": 1, "b": 2, "c": 3}, []))  # no token for anything else
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    report = Report()
    groups = [Group("a", ["b", "z", "c"], [True, False, False], 0), Group("z", ["b", "c"], [True, False], 1)]
    (tokens,) = tokens_of(tokenizer, *groups, report=report)
    assert [r.tolist() for r in tokens.responses] == [[2, 0], [3, 0]]
    assert report.dropped == {"empty": 1, "no prompt": 1} and report.kept == {"tokenized": (1, 2)}


# ---- batches ---------------------------------------------------------------------------------------------------------


def random_groups(n: int, seed: int, vocab: int = 509) -> list[data.TokenGroup]:
    r = random.Random(seed)

    def ids(longest: int) -> torch.Tensor:
        return torch.tensor([r.randrange(3, vocab) for _ in range(r.randint(1, longest))], dtype=torch.int32)

    groups = []
    for g in range(n):
        sides = [True, False] + [r.random() < 0.5 for _ in range(r.randint(0, 4))]
        r.shuffle(sides)
        groups.append(data.TokenGroup(ids(9), [ids(7) for _ in sides], sides, g))
    return groups


LIMITS = [{}, {"max_sequences": 1}, {"max_sequences": 3}, {"max_tokens": 16}, {"max_tokens": 40, "max_sequences": 4}]


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_collate(layout: str, limits: dict[str, int], sort: bool) -> None:
    for seed in range(3):
        groups = random_groups(7, seed)
        step = collate(groups, layout, sort=sort, pad_id=1, **limits)
        sequences = [(g.prompt.tolist(), r.tolist(), side) for g in groups for r, side in zip(g.responses, g.positive)]
        expected = [sequences[i] for i in step.order.tolist()]
        assert sorted(step.order.tolist()) == list(range(len(sequences)))
        assert sort or step.order.tolist() == list(range(len(sequences)))
        assert step.groups.positive.tolist() == [side for *_, side in expected]
        sizes = [len(g.responses) for g in groups]
        if not sort:
            assert step.groups.cu_groups.diff().tolist() == sizes
        found = []
        for mb in step.micro_batches:
            B, L = mb.input_ids.shape
            assert mb.targets.shape == (B, L) and all(x.shape == (B, L) for x in mb.inputs.values())
            assert limits.get("max_tokens", 10**9) >= B * L
            lengths = mb.cu_seqlens.diff().tolist()
            assert len(lengths) <= limits.get("max_sequences", 10**9) and (layout == "packed" or len(lengths) == B)
            assert mb.cu_seqlens.dtype == torch.int32 and mb.cu_seqlens[0] == 0
            assert torch.equal(mb.live(mb.targets), mb.targets[mb.targets != -100])
            scored = mb.live(mb.targets).split(lengths)
            if layout == "packed":
                rows = mb.input_ids[0].tensor_split((mb.inputs["position_ids"][0] == 0).nonzero()[1:, 0])
            else:
                rows = [ids[mask.bool()] for ids, mask in zip(mb.input_ids, mb.inputs["attention_mask"])]
                assert (mb.input_ids[mb.inputs["attention_mask"] == 0] == 1).all()
            for ids, response in zip(rows, scored):
                assert ids[-len(response) :].tolist() == response.tolist()
                found.append((ids[: -len(response)].tolist(), response.tolist()))
            # What stands at a live place is the token before its target.
            before = mb.live(mb.input_ids).split(lengths)
            for (prompt, response), b in zip(found[-len(lengths) :], before):
                assert b.tolist() == [prompt[-1], *response[:-1]]
        assert found == [(prompt, response) for prompt, response, _ in expected]
        if not limits:
            assert len(step.micro_batches) == 1


def test_sorting_puts_the_longest_groups_first_and_keeps_them_whole() -> None:
    def size(step: data.PreferenceBatch) -> int:
        return sum(mb.input_ids.numel() for mb in step.micro_batches)

    def sums(step: data.PreferenceBatch) -> torch.Tensor:
        return torch.cat([seq_logps(mb.live(mb.targets).double(), mb.cu_seqlens) for mb in step.micro_batches])

    groups = random_groups(30, 3)
    step = collate(groups, "padded", max_sequences=8, sort=True)
    plain = collate(groups, "padded", max_sequences=8)
    widths = [mb.input_ids.shape[1] for mb in step.micro_batches]
    assert widths == sorted(widths, reverse=True)
    assert size(step) < size(plain)
    assert sorted(step.groups.cu_groups.diff().tolist()) == sorted(plain.groups.cu_groups.diff().tolist())
    undone = torch.empty(step.groups.num_sequences, dtype=torch.float64)
    undone[step.order] = sums(step)
    assert torch.equal(undone, sums(plain))


def test_collate_refuses() -> None:
    groups = random_groups(3, 0)
    longest = max(len(g.prompt) + len(r) for g in groups for r in g.responses)
    with pytest.raises(ValueError, match=rf"max_tokens must be at least {longest}, the sequence of row \d; got"):
        collate(groups, max_tokens=longest - 1)
    with pytest.raises(ValueError, match="groups must hold at least one group"):
        collate([])
    with pytest.raises(ValueError, match="layout must be one of packed, padded; got 'ragged'"):
        collate(groups, "ragged")
    with pytest.raises(ValueError, match="max_sequences must be at least 1"):
        collate(groups, max_sequences=0)


def test_responses_without_sides_become_micro_batches(bpe: Any) -> None:
    """What is only scored needs no positive and no negative, and a long one gets a micro-batch by itself."""
    texts = [Group("Tea?", [" Green."], [True], 0), Group("Hi.", [" No idea. " * 9], [False], 1)]
    assert tokens_of(bpe, *texts) == []
    empty, report = Group("Hi.", [""], [True], 2), Report()
    short, long = tokens_of(bpe, *texts, empty, both_sides=False, report=report)
    assert (short.row, long.row) == (0, 1) and report.dropped == {"empty": 1}
    sequences = [(g.prompt, g.responses[0]) for g in (short, long, short)]
    found = micro_batches(sequences, max_tokens=20)
    assert [len(mb.input_ids) for mb in found] == [1, 1, 1] and found[1].input_ids.shape[1] > 20
    for mb, (_, response) in zip(found, sequences):
        assert torch.equal(mb.live(mb.targets), response.long())
    (packed,) = micro_batches(sequences, "packed")
    assert packed.cu_seqlens.diff().tolist() == [len(response) for _, response in sequences]
    with pytest.raises(ValueError, match="max_tokens must be at least 1; got 0"):
        micro_batches(sequences, max_tokens=0)


def test_batches_move_and_pass_through_a_loader() -> None:
    groups = random_groups(10, 1)
    steps = list(DataLoader(groups, batch_size=4, collate_fn=collate))
    assert [step.groups.num_groups for step in steps] == [4, 4, 2]
    moved = steps[0].to("meta")
    mb = moved.micro_batches[0]
    tensors = [mb.input_ids, mb.targets, mb.cu_seqlens, mb.live_index, *mb.inputs.values()]
    assert all(x.is_meta for x in [*tensors, moved.groups.positive, moved.order])


# ---- all of it -------------------------------------------------------------------------------------------------------


def test_from_rows_to_a_loss_as_if_each_response_were_alone(bpe: Any) -> None:
    rows = [EXAMPLES[case][0] for case in ("ultrafeedback", "nectar", "alpaca", "texts", "lists", "sets")]
    report = Report()
    groups = merge_prompts(read_groups(rows, rule=top_k(1), report=report), report=report)
    tokens = list(tokenize_groups(groups, bpe, max_length=128, report=report))
    assert report.kept["tokenized"] == (len(tokens), sum(len(g.responses) for g in tokens)) and len(tokens) == 4

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**BASE | {"vocab_size": len(bpe)})
    model = transformers.LlamaForCausalLM(config).double().eval()
    objective = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)

    alone = []  # the sum over the response of log p, from the logits of one unpadded sequence
    ref_logps = torch.randn(sum(len(g.responses) for g in tokens), dtype=torch.float64)
    for group in tokens:
        for response in group.responses:
            ids = torch.cat([group.prompt, response]).long()
            logps = model(ids[None]).logits[0].log_softmax(-1)
            alone.append(logps[:-1].gather(1, ids[1:, None])[len(group.prompt) - 1 :, 0])
    lengths = torch.tensor([0, *map(len, alone)]).cumsum(0).int()
    sides = PreferenceGroups.from_lists(g.positive for g in tokens)
    expected = preference_loss(torch.cat(alone), lengths, sides, objective, ref_logps)
    expected.loss.backward()
    d_parameters = [p.grad.clone() for p in model.parameters()]

    def forward(mb: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return mb.live(model_logps(model, mb.input_ids, mb.targets, **mb.inputs)), mb.cu_seqlens

    for layout in ("packed", "padded"):
        step = collate(tokens, layout)
        token_logps, cu_seqlens = forward(step.micro_batches[0])
        torch.testing.assert_close(token_logps, torch.cat(alone), rtol=1e-11, atol=1e-11)
        loss = preference_loss(token_logps, cu_seqlens, step.groups, objective, ref_logps).loss
        torch.testing.assert_close(loss, expected.loss, rtol=1e-11, atol=1e-11)
        for limits in ({"max_sequences": 2}, {"max_tokens": 150, "sort": True}):
            step = collate(tokens, layout, **limits)
            assert len(step.micro_batches) > 1
            model.zero_grad()
            result = group_backward(step.micro_batches, forward, step.groups, objective, ref_logps[step.order])
            torch.testing.assert_close(result.loss, expected.loss.detach(), rtol=1e-11, atol=1e-11)
            undone = torch.empty_like(result.seq_logps)
            undone[step.order] = result.seq_logps
            torch.testing.assert_close(undone, torch.stack([x.sum() for x in alone]), rtol=1e-11, atol=1e-11)
            for p, d in zip(model.parameters(), d_parameters):
                torch.testing.assert_close(p.grad, d, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_fifty_tokens_more_of_prompt_change_no_loss(layout: str) -> None:
    """IPO by means over the responses' tokens: their number is that of the response. The model sees a token and nothing
    before it, so that the responses' log-probabilities stay what they are."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE | {"max_position_embeddings": 128}))
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    groups = [g._replace(responses=g.responses[:2], positive=[True, False]) for g in random_groups(3, 5)]
    more = torch.arange(3, 53, dtype=torch.int32)
    longer = [g._replace(prompt=torch.cat([more, g.prompt])) for g in groups]
    reference = torch.linspace(-20, -5, 6)
    losses = []
    for each in (groups, longer):
        step = collate(each, layout)
        (mb,) = step.micro_batches
        with torch.no_grad():
            logps = mb.live(model_logps(model, mb.input_ids, mb.targets, **mb.inputs))
        objective = Objective("ipo", average=True)
        losses.append(preference_loss(logps, mb.cu_seqlens, step.groups, objective, reference).loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
