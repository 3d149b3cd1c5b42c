"""Groups of texts become token ids, and then tensors for `model_logps` and `group_backward`.

Prompt and response are tokenised apart, as in generation: no token spans the border, all responses of a group have the
same prompt tokens, and the tokens of the response are scored, its end of text included. Of a response of several turns
those of the assistant are scored, as they are generated; what tools and users say between is masked.

    padded   (S, L)   one sequence a row, padded on the right, with an attention mask
    packed   (1, N)   all sequences in one row, with position_ids from 0 in each: no padding

Both hold the same sequences, and `MicroBatch.live` picks the same vector (T,) from either. With `share_prompt` a prompt
is computed once for its responses: `Prompts` holds all of it but its last token, which begins each of the rows.

The module never imports transformers, or breaks the order of a group.
It needs a tokenizer with the interface of transformers, and its chat template for conversations.
The cost is the tokenizer's; collation is linear, without a loop over tokens.
"""

from __future__ import annotations

import copy
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain, groupby, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import (
    check_count,
    check_device,
    check_flags,
    check_iterable,
    check_kind,
    one_of,
    shown,
)
from ..preference.group_backward import SharedPrompt
from ..preference.groups import PreferenceGroups
from .formats import BadRow, Group, Report
from .images import Pictures, inputs_of, processed, processor_of, prompt_tokens, repeated
from .templates import Rendered, Texts, Tokens


class TokenGroup(NamedTuple):
    """A prompt and its responses as token ids."""

    prompt: Tensor  # (p,) int32
    responses: list[Tensor]  # (n_i,) int32 each
    positive: list[bool]
    row: int  # number of the row that it was read from
    weight: float = 1.0  # what the group counts in the loss
    response_weights: list[float] | None = None  # what each response counts in its side; None for 1 each
    scored: list[Tensor] | None = None  # (n_i,) bool each, the tokens of the assistant; None for all
    pictures: Pictures | None = None  # the images of the prompt, whose tokens have their places

    def scored_of(self, i: int) -> Tensor:  # (n_i,) bool
        return torch.ones(len(self.responses[i]), dtype=torch.bool) if self.scored is None else self.scored[i]

    @property
    def longest(self) -> int:
        """Number of tokens of the prompt with its longest response."""
        return len(self.prompt) + max(map(len, self.responses))

    @property
    def shares_prompt(self) -> bool:
        """Whether its responses share their prompt where `collate` is asked for that: if it saves an eighth of their
        tokens, which is about where it breaks even. With images it is also asked for `share_images`."""
        saved = (len(self.prompt) - 1) * (len(self.responses) - 1)
        return 8 * saved >= sum(len(self.prompt) + len(response) for response in self.responses)


def tokenize_groups(
    groups: Iterable[Group],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    too_long: str = "drop",
    chat: bool | None = None,
    template_options: Mapping[str, Any] | None = None,
    add_eos: bool = True,
    assistant_only: bool = True,
    both_sides: bool = True,
    on_bad: str = "drop",
    report: Report | None = None,
) -> Iterator[TokenGroup]:
    """Yields the token ids of the groups, a few hundred groups at a time.

    A conversation goes through the chat template. The prompt is what the template writes with the header of an answer,
    the response is what it adds for the answer. White space after a final eos is cut off, as it is never sampled. Plain
    text begins with the special tokens that the tokenizer puts first and ends with its eos.

    Where a response has several turns, a template with the keyword `generation` says which of its tokens are the
    assistant's (`return_assistant_tokens_mask`). With another each turn of the assistant is what the template adds to
    the header of its answer; a template that renders these turns otherwise alone than in the whole is refused.

    Images need a processor of text and images in place of the tokenizer; it is asked for the tokens of their prompts.

    Args:
        max_length: the most tokens that a prompt and a response have together. None sets no limit.
        too_long: what happens to a longer response: "drop", "error", or "truncate_prompt", which cuts off the left of
            the prompt (after a bos) for the whole group. A response that leaves no room for a prompt token is dropped,
            and so is a longer one to a prompt with images.
        chat: True makes a text prompt the turn of a user; False takes a conversation of one turn as plain text; None
            leaves each as it is.
        template_options: arguments of the chat template, for example {"enable_thinking": False}.
        add_eos: whether plain text ends with the tokenizer's eos. A chat template ends its turns itself.
        assistant_only: whether the turns of tools and users in a response are masked, and not scored.
        both_sides: whether a group without a positive or a negative is dropped. False drops only an empty group.
        on_bad: "drop" leaves out what cannot be used; "error" raises ValueError.
        report: a Report, which is filled.
    """
    one_of("on_bad", on_bad, ("drop", "error"))
    one_of("too_long", too_long, ("drop", "error", "truncate_prompt"))
    if max_length is not None:
        check_count("max_length", max_length, 2)  # a token of each
    check_iterable("groups", groups, "an iterable of Groups")
    template_options = {} if template_options is None else template_options
    check_kind("template_options", template_options, Mapping, "a dict of options")
    check_kind("report", report := Report() if report is None else report, Report, "a Report")
    check_flags(add_eos=add_eos, assistant_only=assistant_only, both_sides=both_sides)
    if chat is not None:
        check_flags(chat=chat)
    processor, tokenizer = processor_of(tokenizer), tokenizer_of(tokenizer)
    _check_tokenizer("tokenizer", tokenizer)
    texts = Texts(tokenizer, chat, dict(template_options), assistant_only, processor)
    limit = _Limit(max_length, too_long, getattr(tokenizer, "bos_token_id", None))
    encoder = _Encoder(tokenizer, add_eos)
    return _tokenize_groups(groups, texts, encoder, limit, both_sides, on_bad, report)


def _tokenize_groups(
    groups: Iterable[Group],
    renderer: Texts,
    encoder: _Encoder,
    limit: _Limit,
    both_sides: bool,
    on_bad: str,
    report: Report,
) -> Iterator[TokenGroup]:
    pending = iter(groups)
    while chunk := list(islice(pending, 256)):
        rendered: list[Rendered] = []
        for group in chunk:
            check_kind("groups", group, Group, "Groups, as read_groups yields them")
            try:
                rendered.append(renderer.render(group, partial(report.drop, row=group.row, on_bad=on_bad)))
            except BadRow as bad:
                report.drop(bad, group.row, on_bad)
        prompts = encoder.encode([r.prompt for r in rendered])
        texts = [x for r in rendered for x in r.responses if not isinstance(x, Tokens)]
        pieces = iter(encoder.continuations([piece.text for text in texts for piece in text]))
        for r, prompt in zip(rendered, prompts):
            tokens = [x if isinstance(x, Tokens) else Tokens.joined(x, islice(pieces, len(x))) for x in r.responses]
            if r.plain:
                prompt = encoder.lead + prompt
                tokens = [each.ended(encoder.eos) for each in tokens]
            most = limit
            if r.pictures is not None:
                try:
                    made = processed(renderer.processor, r.pictures)
                except Exception as error:  # whatever a processor raises on an image that it cannot read
                    why = f"the processor refuses its images: {type(error).__name__}: {error}"
                    report.drop(BadRow("malformed", why), r.group.row, on_bad)
                    continue
                prompt = prompt_tokens(made)
                if limit.too_long == "truncate_prompt":  # an image has as many tokens as the model makes of it
                    most = limit._replace(too_long="drop")
            for found in _usable(r.group, prompt, tokens, most, both_sides, on_bad, report):
                yield found._replace(pictures=r.pictures)


def _usable(
    group: Group,
    prompt: list[int],
    responses: list[Tokens],
    limit: _Limit,
    both_sides: bool,
    on_bad: str,
    report: Report,
) -> Iterator[TokenGroup]:
    """Yields the group with the responses that have tokens and fit, unless it then lacks a side or any response."""
    if not prompt:
        report.drop(BadRow("no prompt", "its prompt has no tokens"), group.row, on_bad)
        return
    kept, room = [], limit.room(prompt)
    for i, (ids, scored) in enumerate(responses):
        if not any(scored):
            report.drop(BadRow("empty", "a response has no tokens"), group.row, on_bad)
        elif room is not None and len(ids) > room:
            detail = f"a response of {len(ids)} tokens has room for {room}, with a prompt of {len(prompt)}"
            detail += f" and at most {limit.max_length} together"
            choice = {"drop": "drop", "error": "error", "truncate_prompt": on_bad}[limit.too_long]
            report.drop(BadRow("too long", detail), group.row, choice)
        else:
            kept.append(i)
    group = group.only(kept)
    if report.has_both_sides(group.positive, group.row, on_bad) if both_sides else kept:
        report.keep("tokenized", len(kept))
        tokens = [responses[i] for i in kept]
        sizes = [len(each.ids) for each in tokens]
        prompt = limit.cut(prompt, max(sizes))
        flat = torch.frombuffer(array("i", chain(prompt, *(each.ids for each in tokens))), dtype=torch.int32)
        first, *rest = flat.split([len(prompt), *sizes])
        marks = None if all(all(each.scored) for each in tokens) else [torch.tensor(each.scored) for each in tokens]
        yield TokenGroup(first, rest, group.positive, group.row, group.weight, group.response_weights, marks)


def check_processing_class(given: Any) -> None:
    """TypeError for what is neither None nor a tokenizer, nor a processor with one."""
    if given is not None:
        _check_tokenizer("processing_class", tokenizer_of(given))


def _check_tokenizer(name: str, tokenizer: Any) -> None:
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        raise TypeError(f"{name} must be a tokenizer or processor of transformers; got {shown(tokenizer)}")


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer of a processor, with the processor's chat template if it has none; a tokenizer as it is."""
    tokenizer = getattr(processing_class, "tokenizer", None)
    if tokenizer is None or hasattr(processing_class, "convert_tokens_to_ids"):  # some tokenizers hold another one
        return processing_class
    template = getattr(processing_class, "chat_template", None)
    if template and not tokenizer.chat_template:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer


class _Limit(NamedTuple):
    """How many tokens a sequence may have, and what happens to a longer one."""

    max_length: int | None
    too_long: str
    bos: int | None

    def room(self, prompt: list[int]) -> int | None:
        """The most tokens that a response may have."""
        if self.max_length is None:
            return None
        least = min(len(prompt), 1 + (prompt[0] == self.bos)) if self.too_long == "truncate_prompt" else len(prompt)
        return self.max_length - least

    def cut(self, prompt: list[int], longest: int) -> list[int]:
        """The end of the prompt that fits beside the longest response, with a bos kept in front."""
        if self.max_length is None or len(prompt) + longest <= self.max_length:
            return prompt
        bos = prompt[:1] if prompt[0] == self.bos else []
        return bos + prompt[len(prompt) + longest + len(bos) - self.max_length :]


class _Encoder:
    """Ids of texts, without special tokens, and what the tokenizer puts around a text."""

    def __init__(self, tokenizer: Any, add_eos: bool) -> None:
        self.tokenizer = tokenizer
        if add_eos and tokenizer.eos_token_id is None:
            raise ValueError("tokenizer must have an eos token to end a response with, or add_eos must be False")
        self.eos: list[int] = [tokenizer.eos_token_id] if add_eos else []
        end, letter, both = self.encode(["\n", "a", "\na"])
        # Some tokenizers (SentencePiece: Llama 2, Mistral) put a space before every text, also before a response. There
        # a response is tokenised after a line end, which merges with nothing, and the line end is taken off.
        self.before = end if end and both != end + letter and both[: len(end)] == end else None
        marked = tokenizer("a")["input_ids"]
        starts = (k for k in range(len(marked)) if marked[k : k + len(letter)] == letter)
        self.lead: list[int] = marked[: next(starts, 0)]

    def encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def continuations(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that continue another text."""
        if self.before is None:
            return self.encode(texts)
        n = len(self.before)
        found = self.encode(["\n" + text for text in texts])
        for ids, text in zip(found, texts):
            if ids[:n] != self.before:
                raise ValueError(f"tokenizer merges a line end with what follows it; cannot place {shown(text)}")
        return [ids[n:] for ids in found]


# ---- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MicroBatch:
    """Some of the sequences of a step: `model_logps(model, mb.input_ids, mb.targets, **mb.inputs)`."""

    input_ids: Tensor  # (B, L) int64
    targets: Tensor  # (B, L) int64, the next token where it belongs to a response, -100 elsewhere
    inputs: dict[str, Tensor]  # position_ids or attention_mask, (B, L) int64
    cu_seqlens: Tensor  # (s+1,) int32, offsets of the sequences in the vector of live tokens
    live_index: Tensor  # (T,) int64, places of the live tokens in the flattened batch

    def live(
        self,
        values: Tensor,  # (B, L), as model_logps gives them
    ) -> Tensor:  # (T,)
        """The values at the response tokens, in order. It does not wait for the device."""
        return values.reshape(-1)[self.live_index]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MicroBatch:
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        inputs = {name: move(x) for name, x in self.inputs.items()}
        return MicroBatch(
            move(self.input_ids), move(self.targets), inputs, move(self.cu_seqlens), move(self.live_index)
        )


@dataclass(frozen=True)
class Prompts:
    """Prompts without their last tokens: `attach(model).prefix(prompts.input_ids, **prompts.inputs)`."""

    input_ids: Tensor  # (B, P) int64, padded on the left
    inputs: dict[str, Tensor]  # position_ids and, where there are several prompts, attention_mask, (B, P) int64

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Prompts:
        inputs = {name: x.to(device, non_blocking=non_blocking) for name, x in self.inputs.items()}
        return Prompts(self.input_ids.to(device, non_blocking=non_blocking), inputs)


@dataclass(frozen=True)
class PreferenceBatch:
    """Groups as tensors: the sequences of all micro-batches, in order, are the S sequences of `groups`."""

    parts: list[Any]  # what group_backward takes: a MicroBatch, or a SharedPrompt of Prompts and MicroBatches
    groups: PreferenceGroups
    order: Tensor  # (S,) int64, each sequence's place before the sort: `out[order] = seq_logps` undoes it

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """All micro-batches, in order. Those that share a prompt hold only its last token."""
        return [mb for part in self.parts for mb in (part.micro_batches if isinstance(part, SharedPrompt) else [part])]

    @property
    def computed_tokens(self) -> int:
        """The number of positions that a forward of all parts computes, with padding, without empty parts."""
        rows = [mb for mb in self.micro_batches if len(mb.live_index)]
        prompts = [
            part.prompt
            for part in self.parts
            if isinstance(part, SharedPrompt) and any(len(mb.live_index) for mb in part.micro_batches)
        ]
        return sum(x.input_ids.numel() for x in (*prompts, *rows))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PreferenceBatch:
        def move(part: Any) -> Any:
            if not isinstance(part, SharedPrompt):
                return part.to(device, non_blocking)
            return SharedPrompt(part.prompt.to(device, non_blocking), [*map(move, part.micro_batches)])

        return PreferenceBatch([*map(move, self.parts)], self.groups.to(device, non_blocking), self.order.to(device))


def collate(
    groups: Sequence[TokenGroup],
    layout: str = "padded",
    *,
    max_tokens: int | None = None,
    max_sequences: int | None = None,
    sort: bool = False,
    pad_id: int = 0,
    share_prompt: bool = False,
    prompts_together: bool = True,
    pad_responses: bool = True,
    of: PreferenceGroups | None = None,
    processor: Any = None,
    share_images: bool = False,
) -> PreferenceBatch:
    """One step's groups as tensors, in as many micro-batches as the limits demand, or in one without limits. Their
    weights are those of `groups` in the result.

        step = collate(tokens[:8], "packed", max_tokens=16384, sort=True)

        def forward(mb):
            return mb.live(model_logps(model, mb.input_ids, mb.targets, **mb.inputs)), mb.cu_seqlens

        group_backward(step.parts, forward, step.groups, objective)

    Args:
        layout: "padded", right for nearly every model, or "packed", without padding, for models that keep sequences
            apart by their position_ids: rotary attention of transformers 5 does, flash or not; ALiBi and recurrent
            layers do not. `model_logps` measures it, and refuses sequences that the model would mix.
        max_tokens: the most tokens of a micro-batch, padding included, and of the prompt that it shares.
        max_sequences: the most sequences of a micro-batch, which may hold parts of several groups.
        sort: whether the longest groups come first, so that rows of a padded micro-batch have similar lengths and the
            largest micro-batch is the first. Groups stay whole; `order` says where each sequence came from.
        pad_id: the token id of the padding, which is masked and never scored.
        share_prompt: whether the responses of a group share their prompt, for a model that can
            (`models.why_not_shared`); forward is then a SharedForward, for example `models.SharedPromptForward`.
            Responses are padded, whatever the layout. A prompt is shared where that saves an eighth of the group's
            tokens, since it costs a further backward and attention in two parts.
        prompts_together: whether several small groups may share one forward of their prompts, padded on the left
            (`models.why_not_left_padded`), where all of their responses fit in one micro-batch.
        pad_responses: whether responses of different lengths that share a prompt may be in one micro-batch. False is
            for what counts positions, such as the auxiliary loss of a mixture of experts.
        of: the PreferenceGroups of these sequences, in this order, for groups that span ranks: of one this rank may
            have one side alone, or nothing. None makes them.
        processor: the processor of text and images, for groups with images. A micro-batch holds responses to one such
            prompt, padded, and among its inputs the prompt's pixels, once for each of them.
        share_images: whether prompts with images are shared too, for a model that can (`why_not_shared_images`); the
            prompt then has the pixels, and its rows have none.
    """
    check_kind("groups", groups, Sequence, "a list of TokenGroups")
    for group in groups:
        check_kind("groups", group, TokenGroup, "TokenGroups, as tokenize_groups yields them")
    check_flags(sort=sort, share_prompt=share_prompt, prompts_together=prompts_together)
    check_flags(pad_responses=pad_responses, share_images=share_images)
    check_count("pad_id", pad_id, 0)
    limits = _Limits.checked(max_tokens, max_sequences)
    if of is not None:
        check_kind("of", of, PreferenceGroups, "PreferenceGroups or None")
    if not groups:
        raise ValueError("groups must hold at least one group; got none")
    if (
        processor is None
        and (seen := next((group.row for group in groups if group.pictures is not None), None)) is not None
    ):
        raise ValueError(f"processor must be given for groups with images, as row {seen} has; got None")
    one_of("layout", layout, ("packed", "padded"))
    sides = [positive for group in groups for positive in group.positive]
    if of is not None and of.positive.tolist() != sides:
        raise ValueError(f"of must have the sides of these sequences, {sides}; got {of.positive.tolist()}")
    if of is not None and sort:
        raise ValueError("sort must be False where `of` says which sequences belong together; got True")
    longest = [g.longest for g in groups]
    if max_tokens is not None and max(longest) > max_tokens:
        row = groups[longest.index(max(longest))].row
        raise ValueError(f"max_tokens must be at least {max(longest)}, the sequence of row {row}; got {max_tokens}")
    places = sorted(range(len(groups)), key=lambda g: -longest[g]) if sort else range(len(groups))
    first = list(accumulate((len(g.responses) for g in groups), initial=0))
    parts: list[Any] = []
    run_options = (limits, share_prompt, share_images, prompts_together)
    for shared, run in _runs([groups[g] for g in places], *run_options):
        if shared:
            part = _shared_prompt(run, limits, pad_id, pad_responses)
            if run[0].pictures is not None:
                ids, inputs = part.prompt.input_ids, inputs_of(processor, run[0].pictures)
                more = repeated(inputs, (1, ids.shape[1]))
                part = part._replace(prompt=Prompts(ids, part.prompt.inputs | more))
            parts.append(part)
        else:
            for _, some in groupby(run, key=lambda group: id(group.pictures)):  # a prompt with images is by itself
                same = [*some]
                sequences = [(g.prompt, x, g.scored_of(i)) for g in same for i, x in enumerate(g.responses)]
                if same[0].pictures is None:
                    parts += _micro_batches(sequences, layout, limits, pad_id)
                else:
                    inputs = inputs_of(processor, same[0].pictures)
                    for mb in _micro_batches(sequences, "padded", limits, pad_id):
                        more = repeated(inputs, (mb.input_ids.shape[0], mb.input_ids.shape[1]))
                        parts.append(replace(mb, inputs={**mb.inputs, **more}))
    return PreferenceBatch(
        parts,
        _preference_groups([groups[g] for g in places]) if of is None else of,
        torch.tensor([i for g in places for i in range(first[g], first[g + 1])]),
    )


def _preference_groups(groups: Sequence[TokenGroup]) -> PreferenceGroups:
    """Their sides, and their weights where one has any."""
    each = [group.response_weights or [1.0] * len(group.responses) for group in groups]
    return PreferenceGroups.from_lists(
        [group.positive for group in groups],
        weights=[group.weight for group in groups] if any(group.weight != 1 for group in groups) else None,
        response_weights=each if any(group.response_weights for group in groups) else None,
    )


def empty_part(device: torch.device | str, with_prompt: bool = False) -> MicroBatch | SharedPrompt:
    """A micro-batch of two tokens that scores nothing, or one after a prompt of one token: a part of a step for a rank
    that must run a forward where it has nothing left."""
    check_device("device", device)
    check_flags(with_prompt=with_prompt)
    ids = torch.ones(1, 2, dtype=torch.long, device=device)
    targets, none = torch.full_like(ids, -100), ids[0, :0]
    offsets = torch.zeros(1, dtype=torch.int32, device=device)
    if not with_prompt:
        return MicroBatch(ids, targets, {"attention_mask": ids}, offsets, none)
    first = torch.zeros_like(ids[:, :1])
    places = {"position_ids": torch.arange(1, 3, device=device)[None]}
    return SharedPrompt(Prompts(ids[:, :1], {"position_ids": first}), [MicroBatch(ids, targets, places, offsets, none)])


def micro_batches(
    sequences: Sequence[tuple[Tensor, ...]],  # prompt (p,), response (n,), integer; scored (n,) bool unless all are
    layout: str = "padded",
    *,
    max_tokens: int | None = None,
    max_sequences: int | None = None,
    pad_id: int = 0,
) -> list[MicroBatch]:
    """Micro-batches of sequences, in order, which need not belong to groups. The options are those of `collate`, but a
    sequence longer than max_tokens is a micro-batch by itself."""
    one_of("layout", layout, ("packed", "padded"))
    marked = [(x[0], x[1], x[2] if len(x) > 2 else torch.ones(len(x[1]), dtype=torch.bool)) for x in sequences]
    return _micro_batches(marked, layout, _Limits.checked(max_tokens, max_sequences), pad_id)


class _Limits(NamedTuple):
    """The limits of a micro-batch; None where there is none."""

    tokens: int | None
    sequences: int | None

    @classmethod
    def checked(cls, max_tokens: int | None, max_sequences: int | None) -> _Limits:
        for name, value in {"max_tokens": max_tokens, "max_sequences": max_sequences}.items():
            if value is not None:
                check_count(name, value)
        return cls(max_tokens, max_sequences)

    def fit(self, tokens: int, sequences: int) -> bool:
        most_tokens, most_sequences = (math.inf if limit is None else limit for limit in self)
        return tokens <= most_tokens and sequences <= most_sequences

    def split(self, lengths: list[int], packed: bool = False, equal: bool = False) -> Iterator[tuple[int, int]]:
        """Yields ranges of sequences, in order, each as long as the limits allow; `equal` also ends one where the
        length changes."""
        start, total, longest = 0, 0, 0
        for i, n in enumerate(lengths):
            count, total, longest = i - start + 1, total + n, max(longest, n)
            fits = self.fit(total if packed else longest * count, count) and not (equal and n != lengths[start])
            if not fits and i > start:
                yield start, i
                start, total, longest = i, n, n
        yield start, len(lengths)


def _micro_batches(
    sequences: Sequence[tuple[Tensor, Tensor, Tensor]], layout: str, limits: _Limits, pad_id: int
) -> list[MicroBatch]:
    lengths = [len(prompt) + len(response) for prompt, response, _ in sequences]
    parts = limits.split(lengths, layout == "packed")
    return [_micro_batch(sequences[start:end], layout, pad_id) for start, end in parts]


def _runs(
    groups: Iterable[TokenGroup], limits: _Limits, share_prompt: bool, share_images: bool, prompts_together: bool
) -> Iterator[tuple[bool, list[TokenGroup]]]:
    """Yields the groups in runs, in order: (False, groups that share no prompt), or (True, groups whose prompts run
    together). The latter are several only where all of their rows fit in one micro-batch, and where padding adds at
    most a quarter to the tokens of their prompts.
    """
    run: list[TokenGroup] = []
    shared = False
    for group in groups:
        shares = share_prompt and group.shares_prompt and (share_images or group.pictures is None)
        joins = shares == shared and (not shares or (prompts_together and _run_together([*run, group], limits)))
        if run and not joins:
            yield shared, run
            run = []
        run, shared = [*run, group], shares
    yield shared, run


def _run_together(groups: list[TokenGroup], limits: _Limits) -> bool:
    if any(group.pictures is not None for group in groups):
        return False
    prompts = [len(group.prompt) - 1 for group in groups]
    rows = [len(response) for group in groups for response in group.responses]
    padded = max(prompts) * len(prompts)
    return limits.fit(padded + max(rows) * len(rows), len(rows)) and 4 * padded <= 5 * sum(prompts)


def _shared_prompt(groups: Sequence[TokenGroup], limits: _Limits, pad_id: int, pad_responses: bool) -> SharedPrompt:
    """The prompts of some groups that run together, and the micro-batches of their responses."""
    lengths = torch.tensor([len(group.prompt) - 1 for group in groups])  # (B,)
    position = torch.arange(int(lengths.max())) - (lengths.max() - lengths).unsqueeze(1)  # (B, P), negative in padding
    mask = (position >= 0).long()
    prompts = _filled(mask, [group.prompt[:-1] for group in groups], pad_id)
    several = {"attention_mask": mask} if len(groups) > 1 else {}
    rows = [(g, x, group.scored_of(i)) for g, group in enumerate(groups) for i, x in enumerate(group.responses)]
    left = limits if limits.tokens is None else limits._replace(tokens=limits.tokens - prompts.numel())
    made = []
    for start, end in left.split([len(response) for _, response, _ in rows], equal=not pad_responses):
        of = torch.tensor([g for g, _, _ in rows[start:end]])  # (b,)
        responses, marks = [x for _, x, _ in rows[start:end]], [x for _, _, x in rows[start:end]]
        sizes = torch.tensor([*map(len, responses)])  # (b,)
        column = torch.arange(int(sizes.max()))
        live = column < sizes.unsqueeze(1)  # (b, n)
        begins = torch.stack([groups[g].prompt[-1] for g in of]).long()
        ids = torch.cat([begins.unsqueeze(1), _filled(live, responses, pad_id)[:, :-1]], 1)
        place = column.minimum(sizes.unsqueeze(1) - 1)  # padding repeats a position, so that there is one for it
        inputs = {"position_ids": lengths[of].unsqueeze(1) + place}
        if several:
            inputs |= {"attention_mask": torch.cat([mask[of], live.long()], 1), "prompt_of": of}
        scored = _filled(live, marks, 0).bool()
        offsets = torch.nn.functional.pad(scored.sum(1).cumsum(0), (1, 0)).int()
        index = scored.reshape(-1).nonzero()[:, 0]
        targets = _filled(live, responses, -100).where(scored, -100)
        made.append(MicroBatch(ids, targets, inputs, offsets, index))
    return SharedPrompt(Prompts(prompts, {"position_ids": position.clamp(min=0), **several}), made)


def _filled(
    live: Tensor,  # (b, n)
    parts: Sequence[Tensor],  # the tokens of each row
    fill: int,
) -> Tensor:  # (b, n) int64
    out = torch.full(live.shape, fill)
    out[live.bool()] = torch.cat([*parts]).long()
    return out


def _micro_batch(sequences: Sequence[tuple[Tensor, Tensor, Tensor]], layout: str, pad_id: int) -> MicroBatch:
    prompts, responses, marks = zip(*sequences)
    lengths = torch.tensor([len(prompt) + len(response) for prompt, response in zip(prompts, responses)])  # (S,)
    flat = torch.cat([x for pair in zip(prompts, responses) for x in pair]).long()  # (N,), as the tensors below
    scored = torch.cat([x for p, own in zip(prompts, marks) for x in (torch.zeros(len(p), dtype=torch.bool), own)])
    sequence = torch.repeat_interleave(torch.arange(len(sequences)), lengths)
    position = torch.arange(len(flat)) - (lengths.cumsum(0) - lengths)[sequence]
    # Targets are shifted by one; none crosses into another sequence, since each begins with a token of its prompt.
    targets = flat.where(scored, -100).roll(-1)
    if layout == "packed":
        place, shape, inputs = torch.arange(len(flat)), (1, len(flat)), {"position_ids": position.unsqueeze(0)}
    else:
        L = int(lengths.max())
        place, shape = sequence * L + position, (len(sequences), L)
        inputs = {"attention_mask": (torch.arange(L) < lengths.unsqueeze(1)).long()}

    def placed(values: Tensor, fill: int) -> Tensor:
        return torch.full((shape[0] * shape[1],), fill).index_copy_(0, place, values).reshape(shape)

    counts = torch.tensor([int(own.sum()) for own in marks])
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    return MicroBatch(placed(flat, pad_id), placed(targets, -100), inputs, cu_seqlens, place[targets != -100])
