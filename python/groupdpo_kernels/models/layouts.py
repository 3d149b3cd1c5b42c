"""Measures whether a model keeps the sequences of a batch apart, in one row by their position_ids or in padded rows.

    packed   (1, N), position_ids from 0 in each sequence: a model without block-diagonal attention (ALiBi, recurrent
             layers, masks that do not look at position_ids) lets the second sequence see the first
    padded   (B, L) with an attention mask: nearly every causal model keeps rows apart, whatever the padding holds

A sequence goes through the model beside one neighbour, and beside another of the same length. The shapes are equal, so
a model that keeps them apart gives equal bits; with experts, whose groups of tokens change, it gives the same up to
rounding. Then the sequence goes alone: only as much may change as its place in a batch changes.

    shared   a response after the keys and values of its prompt (shared_prompt.py), against the whole sequence; once
             more where a prompt has images

The module never trains, or leaves a flag or the random state changed, and forms logits only where the head
is not called once on all positions. It needs a model that takes plain token ids; all ranks of a sharded model must ask
at the same time. The cost is at most eight forwards of a few tokens, once per model and attention.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .head_call import leaf_of, swapped
from .limits import token_limit
from .probe import head_of, logits_of, one_thread, quiet, unwrap, without_cache
from .shared_prompt import cache_name, prefix_cache, rows_cache, why_not_cached, without_positions
from .split_head import whole

_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str]] = weakref.WeakKeyDictionary()

Batch = dict[str, Tensor]


def why_not_packed(model: nn.Module) -> str:
    """Why sequences may not stand in one row; empty if they may, or if the model takes no plain text to find out."""
    return _remembered(model, "packed", _packed)


def why_not_padded(model: nn.Module) -> str:
    """Why shorter sequences may not be padded on the right; empty if they may, or if the model takes no plain text."""
    return _remembered(model, "padded", _padded)


def why_not_shared(model: nn.Module, longest: int | None = None) -> str:
    """Why the prompt of several responses may not run once for all; empty if it may, or if that is not known.

    longest: the most tokens of a prompt with a response, for models whose positions depend on it. None means any.
    """
    return why_not_cached(unwrap(model), longest) or _remembered(model, "shared", _shared)


def why_not_shared_images(
    model: nn.Module,
    prompt: Tensor,  # (p,) integer, a prompt with images, their tokens included
    inputs_for: Callable[[tuple[int, int]], Batch],  # (B, L) -> what else B sequences of L tokens of this prompt take
) -> str:
    """Why a prompt with images may not run once for its responses; empty if it may. Measured once a model, on this one:
    some models count positions by the shape of an image, so that rows after its keys and values do not continue it.
    """
    return why_not_shared(model, 0) or _remembered(
        model, "shared images", lambda score: _shared_images(score, prompt, inputs_for)
    )


def why_not_left_padded(model: nn.Module) -> str:
    """Why several prompts may not run together, padded on the left; empty if they may, or if that is not known."""
    return _remembered(model, "left-padded", _left_padded)


def check_packed(model: nn.Module, inputs: dict[str, Any]) -> None:
    """ValueError for several sequences in a row of a model that mixes them.

    The model is measured wherever a row has position_ids and no mask, whatever their values, which differ between ranks
    and may lie on a GPU. The values are read only where the model would mix sequences.
    """
    positions = inputs.get("position_ids")
    plain = isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] > 1
    if plain:
        _check_mask(positions, inputs.get("attention_mask"))  # type: ignore[arg-type]
    names = "attention_mask", "cu_seq_lens_q", "seq_idx", "cache", "past_key_values"  # a cache: one sequence a row
    told = any(inputs.get(name) is not None for name in names)
    if not plain or told or inputs.get("input_ids") is None:
        return
    why = why_not_packed(model)
    if not why:
        return
    if bool((positions == 0).any()) and (own := _remembered(model, "placed", _placed)):  # type: ignore[union-attr]
        raise ValueError(f"position_ids must be left out, or count as the model does ({own}); got some from 0")
    if bool((positions[:, 1:] <= positions[:, :-1]).any()):  # type: ignore[index]
        raise ValueError(f"position_ids must be of one sequence a row ({why}): take layout='padded'; got several")


def _check_mask(
    positions: Tensor,  # (B, L)
    mask: Any,
) -> None:
    """ValueError for several sequences in a row under a 2-D mask, which joins them in every model: transformers looks
    for sequences in position_ids only where there is no mask. On a GPU no value is read back, and nothing is checked.
    """
    if not isinstance(mask, Tensor) or mask.shape != positions.shape or positions.device.type != "cpu":
        return
    live = mask.to(positions.device).bool()
    again = (positions[:, 1:] <= positions[:, :-1]) & live[:, 1:] & live[:, :-1]
    if bool(again.any()):
        raise ValueError(
            "attention_mask must be left out where position_ids start again in a row, or be 4-D and block-diagonal: a"
            f" 2-D one lets its sequences see each other; got {tuple(mask.shape)}"
        )


def _remembered(model: nn.Module, layout: str, measure: Callable[[_Scores], str]) -> str:
    bare = unwrap(model)
    parameter = next(bare.parameters(), None)
    if parameter is None or parameter.is_meta or _is_fake(parameter) or torch.compiler.is_compiling():
        return ""  # such a model cannot be measured
    config: Any = getattr(bare, "config", None)
    attention = str(getattr(config, "_attn_implementation", None))
    key = layout, attention, parameter.device.type, parameter.dtype
    known = _known.setdefault(bare, {})
    if key in known:
        return known[key]
    with one_thread(bare):
        try:
            if key not in known:  # another thread may have measured it meanwhile
                known[key] = measure(_Scores(model, bare))
        except _NotMeasured as error:
            return str(error)
    return known[key]


class _NotMeasured(Exception):
    """Whole sequences have failed, which says nothing about the model: memory may be short, or ranks out of step."""


def _is_fake(x: Tensor) -> bool:
    return isinstance(x, torch._subclasses.FakeTensor) or torch._guards.detect_fake_mode() is not None


class _Scores:
    """The hidden states that reach the head for a few tokens, in float32 and without autocast; the (B, L, V) logits
    where the head is not called once on (B, L, D)."""

    def __init__(self, model: nn.Module, bare: nn.Module) -> None:
        self.model, self.bare = model, bare
        self.device = next(bare.parameters()).device
        rows = token_limit(bare) or 0
        # Ids come from the middle of the vocabulary, because special tokens stand at its ends.
        self.ids = (rows // 2 + torch.arange(14)) % rows if rows > 4 else None
        self.eps = max(torch.finfo(p.dtype).eps for p in bare.parameters() if p.is_floating_point())

    @property
    def routed(self) -> bool:
        names = {type(module).__name__.lower() for module in self.bare.modules()}
        return any(word in name for name in names for word in ("expert", "moe", "router"))

    @contextlib.contextmanager
    def _precise(self) -> Iterator[None]:
        kind = self.device.type
        if not torch.is_autocast_enabled(kind):
            yield
            return
        with torch.autocast(kind, enabled=False):
            yield

    def continued(self, prefix: Batch, rows: Batch, prompt_of: Tensor | None) -> Tensor:  # (b, L, D) float32
        """Hidden states of rows after the keys and values of a prefix, which must be there for every layer."""
        cache, name = prefix_cache(), cache_name(self.bare) or "cache"
        self(prefix, **{"use_cache": True, name: cache})
        tensors = cache.take()
        if not tensors or any(x is None for x in tensors):
            kept = sum(x is not None for x in tensors[::2])
            raise ValueError(f"{kept} and no more of its layers keep keys and values")
        place = None if prompt_of is None else prompt_of.to(self.device)
        return self(rows, **{"use_cache": True, name: rows_cache(tensors, place)})

    def __call__(self, batch: Batch, **more: Any) -> Tensor:  # (B, L, D) float32
        inputs = {**without_cache(self.bare), **{name: x.to(self.device) for name, x in batch.items()}, **more}
        inputs = without_positions(self.bare, inputs) if more else inputs
        head = head_of(self.bare)
        seen: list[Tensor] = []

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(whole(hidden))
            return hidden[..., :1].clone()  # stands for logits, without a vocabulary dimension

        with quiet(self.model, head or self.model) as called, self._precise():
            if head is not None:
                with swapped(leaf_of(head), forward):
                    called(**inputs)
            if [x.shape[:-1] for x in seen] != [batch["input_ids"].shape]:  # not called once on all positions
                seen = [logits_of(called(**inputs))]
        self.eps = max(self.eps, torch.finfo(seen[0].dtype).eps)
        return seen[0].float()


def _packed(score: _Scores) -> str:
    if score.ids is None:
        return ""
    first, other, second = score.ids[:4], score.ids[4:8], score.ids[8:11]
    positions = torch.cat([torch.arange(4), torch.arange(3)])[None]

    def beside(neighbour: Tensor) -> Tensor:  # (3, D)
        return score({"input_ids": torch.cat([neighbour, second])[None], "position_ids": positions})[0, 4:]

    return _compare(score, second, beside, first, other, "a sequence sees the one before it in its row")


def _placed(score: _Scores) -> str:
    """Why position_ids from 0 are not those that the model counts itself: RoBERTa begins after its padding index."""
    if score.ids is None:
        return ""
    ids = score.ids[None, 8:11]
    try:
        own, given = score({"input_ids": ids}), score({"input_ids": ids, "position_ids": torch.arange(3)[None]})
    except Exception:  # the caller's own forward says what is wrong
        return ""
    moved = _distance(own, given)
    fits = moved <= 16 * score.eps * float(own.abs().max())
    return "" if fits else f"positions from 0 move the hidden states of {type(score.bare).__name__} by {moved:.1e}"


def _padded(score: _Scores) -> str:
    if score.ids is None:
        return ""
    first, other, second = score.ids[:2], score.ids[4:6], score.ids[8:11]
    longer = score.ids[3:8]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    def beside(padding: Tensor) -> Tensor:  # (3, D)
        ids = torch.stack([torch.cat([second, padding]), longer])
        return score({"input_ids": ids, "attention_mask": mask})[0, :3]

    return _compare(score, second, beside, first, other, "padding on the right changes a sequence")


def _shared(score: _Scores) -> str:
    if score.ids is None:
        return ""
    prompt, responses = score.ids[:4], (score.ids[4:8], score.ids[9:13])
    whole = [torch.cat([prompt, response]) for response in responses]
    rows = {"input_ids": torch.stack(whole)[:, 3:], "position_ids": torch.arange(3, 8).repeat(2, 1)}
    prefix = {"input_ids": prompt[None, :3], "position_ids": torch.arange(3)[None]}
    return _compare_shared(score, whole, prefix, rows, None)


def _shared_images(score: _Scores, prompt: Tensor, inputs_for: Callable[[tuple[int, int]], Batch]) -> str:
    if score.ids is None:
        return ""
    P = len(prompt)
    whole = [torch.cat([prompt.long(), response]) for response in (score.ids[4:8], score.ids[9:13])]
    rows = {"input_ids": torch.stack(whole)[:, P - 1 :], "position_ids": torch.arange(P - 1, P + 4).repeat(2, 1)}
    prefix = {"input_ids": prompt[None, :-1].long(), "position_ids": torch.arange(P - 1)[None]}
    return _compare_shared(score, whole, prefix | inputs_for((1, P - 1)), rows, None, inputs_for)


def _left_padded(score: _Scores) -> str:
    if score.ids is None:
        return ""
    long, short = score.ids[:8], score.ids[8:14]  # prompts of 4 and of 2 tokens, responses of 4
    whole, prompt_of = [long, short, short.flip(0)[[5, 4, 0, 1, 2, 3]]], torch.tensor([0, 1, 1])
    prefix = {
        "input_ids": torch.stack([long[:3], short[[0, 0, 0]]]),
        "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 1]]),
        "position_ids": torch.tensor([[0, 1, 2], [0, 0, 0]]),
    }
    rows = {
        "input_ids": torch.stack([x[-5:] for x in whole]),
        "attention_mask": torch.cat([prefix["attention_mask"][prompt_of], torch.ones(3, 5, dtype=torch.long)], 1),
        "position_ids": torch.arange(5) + torch.tensor([[3], [1], [1]]),
    }
    return _compare_shared(score, whole, prefix, rows, prompt_of)


def _compare_shared(
    score: _Scores,
    whole: list[Tensor],  # (n,) ids each, whole sequences
    prefix: Batch,  # their prompts without the last token
    rows: Batch,  # the last five tokens of each
    prompt_of: Tensor | None,  # (b,) the prompt of each row
    inputs_for: Callable[[tuple[int, int]], Batch] = lambda shape: {},  # what else whole sequences (B, L) take
) -> str:
    """Why rows after a prefix differ from whole sequences in their hidden states; empty if they do not. _NotMeasured
    where whole sequences fail."""
    name = type(score.bare).__name__

    def states(ids: Tensor) -> Tensor:  # (B, L) -> (L, D) of the first
        return score({"input_ids": ids, **inputs_for((ids.shape[0], ids.shape[1]))})[0]

    try:
        alone = [states(ids[None])[-5:] for ids in whole]
        twice = [states(torch.stack([ids, ids]))[-5:] for ids in whole]
        longer = [states(torch.cat([ids, ids[-3:]])[None])[-8:-3] for ids in whole]
    except Exception as error:  # whatever a model raises on an input that it does not expect: images, two streams
        raise _NotMeasured(f"{name} takes no plain text: {type(error).__name__}: {error}") from error
    try:
        found = score.continued(prefix, rows, prompt_of)
    except Exception as error:
        return f"{name} does not take the keys and values of a prompt: {type(error).__name__}: {error}"
    # A float64 model may round in float32 inside: rotary tables, ALiBi. Large weights amplify what is rounded.
    largest = max(float(x.abs().max()) for x in alone)
    scale = max(score.eps, torch.finfo(torch.float32).eps) * largest
    noise, after, apart = (max(map(_distance, some, alone)) for some in (twice, longer, found))
    # Tokens that come later change what a model rounds, and nothing else unless it sees them: then by far more.
    noise = max(noise, after) if after <= 1e-3 * largest else noise
    if not apart <= 16 * max(noise, scale):  # NaN counts as a difference
        return f"in {name} a response after its prompt's keys and values is {apart:.1e} off the whole sequence"
    return ""


def _compare(
    score: _Scores,
    second: Tensor,  # (3,) ids
    beside: Callable[[Tensor], Tensor],  # neighbour -> hidden states (3, D) of `second`
    first: Tensor,  # ids of a neighbour
    other: Tensor,  # ids of another neighbour of the same length
    what: str,
) -> str:
    def in_batch(row: Tensor) -> Tensor:  # (3, D)
        return score({"input_ids": torch.stack([row, second])})[1]

    name = type(score.bare).__name__
    try:
        alone = score({"input_ids": second[None]})[0]
        rows = [in_batch(score.ids[:3]), in_batch(score.ids[4:7])]  # type: ignore[index]
    except Exception:  # whatever a model raises on an input that it does not expect: images, two streams
        return ""
    try:
        found, again = beside(first), beside(other)
    except Exception as error:
        return f"{name} does not take it: {type(error).__name__}: {error}"
    scale = float(alone.abs().max())
    regrouped = _distance(*rows)
    allowed = 8 * regrouped + (16 * score.eps * scale if score.routed else 0.0)
    if not _distance(found, again) <= allowed:
        return f"in {name} {what}: its hidden states move by {_distance(found, again):.1e} with the other's tokens"
    noise = max(regrouped, *(_distance(row, alone) for row in rows))
    apart = _distance(found, alone)
    if not apart <= max(8 * noise, 16 * score.eps * scale):  # NaN counts as a difference
        return f"in {name} {what}: its hidden states are {apart:.1e} off those of the sequence alone"
    return ""


def _distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max())
