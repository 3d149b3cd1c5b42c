"""Hidden states, heads and targets whose rows of logits are as peaked as a model's: what a path that skips small
probabilities is measured on. Random inputs make every row flat, where nothing can be skipped.

`flat`: an untrained head. `trained`: rows of held-out text, recorded from a small LM that bench/train_rows.py trained.
`smollm2`: rows of the answers that SmolLM2-135M-Instruct gave at temperature 1, recorded by bench/sample_rows.py: what
training on a model's own samples sees. `confident`: rows of `trained` sharpened by one temperature to a mean entropy of
0.4 nats, the targets drawn from the sharpened rows; no model is recorded there, it bounds what a larger one may save.

How a row is redrawn at any (T, D, V). A weight row is a random direction, longer for likelier ids, plus its prior (how
likely the id is in general: its mean log-probability) along a direction that all share. hidden is the sum of: that
shared direction (the tail follows the prior with the recorded slope), the span of the weight rows of the recorded first
ranks and of the target (least squares gives them their log-probabilities exactly), and noise outside that span, which
gives the tail its spread. The offset between head and tail is then set by the tail as it came out. Ids are recorded as
ranks of the prior, so rows share their first candidates as the recorded ones do; the tail shares less.

At another V, ranks up to HEAD stay and those beyond are stretched log-linearly to V; the mass between two ranks stays.
Below D = 8 HEAD only D / 8 first ranks are exact: more of them make more noise in the tail than its spread (measured at
D = 256 with 96 of them: entropy 1.2 for 4.8). `describe_rows` says what came out. Rows beyond the
recorded ones repeat their curves over other ids of similar prior.

Never imported by the package: tests, benchmarks and profiling import it. Deterministic for a seed, device and number of
threads. Precondition: the repository, whose bench/data holds the recorded rows.
Cost: one to two products of 2 T D V FLOP, two more for `confident`; weight in float32, blocks of logits of 2^26 bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

PROFILES = ("flat", "trained", "smollm2", "confident")
DATA = Path(__file__).resolve().parent / "data"
RECORDED = {name: DATA / f"{name}.safetensors" for name in ("trained", "smollm2")}
HEAD = 96  # first ranks that are recorded with their ids
GRAD_TOL = 2.0**-7  # of the statistics recorded with the rows: candidates have p >= 2^-12
CONFIDENT_ENTROPY = 0.4  # nats
BLOCK_BYTES = 2**26
# Of the recorded norms. No power is right in all: over 512 rows the model has 266 candidates a row, 5868 distinct ones;
# redrawn at power 0 it is 243 and 8840, at 0.3 227 and 7190, at 1 183 and 4771.
NORM_POWER = 0.25


def draw_profile(
    name: str,
    T: int,
    D: int,
    V: int,
    dtype: torch.dtype,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:  # hidden (T, D), weight (V, D) of dtype, targets (T,) int64
    """Inputs of `linear_logps` with rows of that profile: one of PROFILES."""
    if name not in PROFILES:
        raise ValueError(f"a profile is one of {', '.join(PROFILES)}; got {name!r}")
    if min(T, D - 1, V - 1) < 1:
        raise ValueError(f"a profile needs T >= 1, D >= 2 and V >= 2; got {T}, {D} and {V}")
    generator = torch.Generator(device).manual_seed(seed)
    if name == "flat":
        hidden = torch.randn(T, D, generator=generator, device=device)
        hidden /= hidden.square().mean(-1, keepdim=True).sqrt()
        weight = torch.randn(V, D, generator=generator, device=device).mul_(0.02)
        targets = torch.randint(0, V, (T,), generator=generator, device=device)
        return hidden.to(dtype), weight.to(dtype), targets
    recorded = load_rows(RECORDED["trained" if name == "confident" else name])
    wanted = _Wanted.draw(recorded, T, D, V, generator)
    weight, along = _weight(wanted, D, V, generator)
    rounded = weight.to(dtype)
    weight = rounded.float()  # the rows are solved for the head as it is after rounding
    hidden = _hidden(wanted, weight, along, generator)
    targets = wanted.targets
    if name == "confident":
        hidden *= _sharpening(hidden, weight)
        targets = torch.cat([_sample(x, generator) for x in _logps(hidden.to(dtype), weight)])
    return hidden.to(dtype), rounded, targets


class Rows(NamedTuple):
    """Means over rows."""

    entropy: float  # nats
    candidates: float  # p >= grad_tol / 32, and the target
    kept_mass: float  # on the candidates
    dropped_mass: float  # on the others
    not_target: float  # 1 - p_target
    sparse_rows: float  # share of rows that drop at most grad_tol (1 - p_target)


def describe_rows(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (T,)
    grad_tol: float = GRAD_TOL,
) -> Rows:
    """How peaked softmax(hidden @ weight.T) is, and how much a sparse backward of that tolerance could skip."""
    return summarise(row_statistics(hidden, weight, targets, grad_tol), grad_tol)


def summarise(
    statistics: Tensor,  # (T, 4) of row_statistics
    grad_tol: float = GRAD_TOL,
) -> Rows:
    entropy, candidates, dropped, not_target = statistics.double().unbind(-1)
    sparse = (dropped <= grad_tol * not_target).double()
    kept = 1 - dropped
    return Rows(*(x.mean().item() for x in (entropy, candidates, kept, dropped, not_target, sparse)))


def row_statistics(hidden: Tensor, weight: Tensor, targets: Tensor, grad_tol: float) -> Tensor:
    """(T, 4) float32, a row each: entropy, candidates, dropped mass, 1 - p_target."""
    found, start = [], 0
    for logps in _logps(hidden, weight.float()):
        y = targets[start : start + len(logps), None]
        start += len(logps)
        p = logps.exp()
        kept = (p >= grad_tol / 32).scatter_(1, y, True)
        entropy = -(p * logps).sum(-1)
        dropped = p.masked_fill(kept, 0).sum(-1)
        not_target = -torch.expm1(logps.gather(1, y).squeeze(1))
        found.append(torch.stack([entropy, kept.sum(-1).float(), dropped, not_target], -1))
    return torch.cat(found)


def shared_candidates(hidden: Tensor, weight: Tensor, grad_tol: float = GRAD_TOL) -> tuple[float, float]:
    """(ids that are a candidate of some row, what part of all candidates the 256 commonest of them are)."""
    uses = torch.zeros(len(weight), dtype=torch.long, device=weight.device)
    for logps in _logps(hidden, weight.float()):
        uses += (logps >= math.log(grad_tol / 32)).sum(0)
    first = uses.sort(descending=True).values[:256].sum()
    return float((uses > 0).sum()), (first / uses.sum()).item()


# ------------------------------------------------------------------------------------------------------ recorded rows


@dataclass(frozen=True)
class Recorded:
    """What is kept of N rows of a vocabulary of V. An id is a rank of the prior, from 0."""

    V: int
    run: int  # neighbouring positions of one text
    logps: Tensor  # (N, len(rank_grid(V))) at those ranks
    ids: Tensor  # (N, HEAD) of the first ranks
    target_rank: Tensor  # (N,) from 0
    target_id: Tensor  # (N,)
    slope: Tensor  # (N,) of the log-probabilities past HEAD over the prior
    spread: Tensor  # (N,) of what that leaves: standard deviation
    prior: Tensor  # (len(rank_grid(V)),) mean log-probability of an id, at those ranks
    norms: Tensor  # (len(rank_grid(V)),) how far an id strays from that, in the mean 1
    scatter: float  # standard deviation of log id - log rank of the prior, of the tokenizer
    statistics: Tensor  # (N, 4) of row_statistics, of the model's own rows
    sharing: Tensor  # (2,) of `shared_candidates` of the recorded rows
    held_out: Tensor  # (6,) Rows of all held-out rows that were looked at
    made_by: str


def rank_grid(V: int) -> Tensor:  # (n,) int64, from 1 to V
    """Ranks at which curves are kept: all to 16, then four an octave."""
    octaves = (2 ** (torch.arange(16, 4 * math.ceil(math.log2(V)) + 1) / 4)).round().long()
    return torch.cat([torch.arange(1, 17), octaves, torch.tensor([V])]).clamp(max=V).unique()


def load_rows(path: Path) -> Recorded:
    if not path.exists():
        raise FileNotFoundError(f"{path}: recorded rows are in the repository; bench/train_rows.py writes such a file")
    return _load(path, path.stat().st_mtime_ns)


@cache
def _load(path: Path, changed: int) -> Recorded:
    tensors, texts = read_safetensors(path)
    whole = {"ids", "target_rank", "target_id"}
    kept = {name: x.to(torch.int32).long() if name in whole else x.float() for name, x in tensors.items()}
    return Recorded(
        int(texts["V"]), int(texts["run"]), **kept, scatter=float(texts["scatter"]), made_by=texts["made_by"]
    )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the texts of a file. Read here, since a machine with a GPU may have torch and nothing else."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8:start])
    texts = header.pop("__metadata__", {})
    dtypes = {"F32": torch.float32, "F16": torch.float16, "U16": torch.uint16, "I32": torch.int32}
    tensors = {}
    for name, x in header.items():
        begin, end = x["data_offsets"]
        size = dtypes[x["dtype"]].itemsize
        flat = torch.frombuffer(content, dtype=dtypes[x["dtype"]], count=(end - begin) // size, offset=start + begin)
        tensors[name] = flat.view(x["shape"]).clone()
    return tensors, texts


def _interpolate(
    curves: Tensor,  # (N, n) over rank_grid(V)
    V: int,
    ranks: Tensor,  # (N or 1, m) from 1, need not be whole
) -> Tensor:  # (N, m)
    """Linear in the log of the rank."""
    grid = rank_grid(V).log()
    x = ranks.double().log().float().clamp(0, grid[-1].item())
    right = torch.searchsorted(grid, x).clamp(1, len(grid) - 1)
    part = (x - grid[right - 1]) / (grid[right] - grid[right - 1])
    right, part = (a.expand(len(curves), -1) for a in (right, part))
    return torch.lerp(curves.gather(1, right - 1), curves.gather(1, right), part)


@dataclass(frozen=True)
class _Stretch:
    """Ranks of the recorded vocabulary and of another: the same to the knee, then log-linear."""

    knee: int
    power: float  # log(own / knee) / log(other / knee)

    @classmethod
    def to(cls, own: int, other: int) -> _Stretch:
        knee = min(HEAD, max(1, other // 8))
        return cls(knee, math.log(own / knee) / math.log(other / knee))

    def own(self, ranks: Tensor) -> Tensor:  # recorded ranks at the other's
        x = ranks.float()
        return torch.where(x <= self.knee, x, self.knee * (x / self.knee) ** self.power)

    def other(self, ranks: Tensor) -> Tensor:
        x = ranks.float()
        return torch.where(x <= self.knee, x, self.knee * (x / self.knee) ** (1 / self.power))

    def log_density(self, ranks: Tensor) -> Tensor:  # log of d own / d other, at recorded ranks
        x = ranks.float()
        inner = math.log(self.power) + (1 - 1 / self.power) * (x / self.knee).log()
        return torch.where(x <= self.knee, 0.0, inner)


# ------------------------------------------------------------------------------------------------- what a row shall be


@dataclass(frozen=True)
class _Wanted:
    """The rows to realise. K ids a row have exact log-probabilities: the first ranks, and the target."""

    ids: Tensor  # (T, K)
    logps: Tensor  # (T, K)
    targets: Tensor  # (T,)
    slope: Tensor  # (T,)
    spread: Tensor  # (T,)
    log_tail: Tensor  # (T,) log of the mass beyond the K ids
    prior: Tensor  # (V,) by id, of mean 0
    norms: Tensor  # (V,) by id, of mean square 1

    @classmethod
    def draw(cls, recorded: Recorded, T: int, D: int, V: int, generator: torch.Generator) -> _Wanted:
        device = generator.device
        N, run = len(recorded.ids), recorded.run
        K = max(1, min(HEAD, V // 8, D // 8))
        stretch = _Stretch.to(recorded.V, V)
        order = torch.randperm(N // run, generator=generator, device=device).cpu()
        t = torch.arange(T)
        row = order[t % N // run] * run + t % run
        # The first K - 1 ranks and the target; where the target is among them, the rank K.
        outside = recorded.target_rank >= K - 1
        rank = torch.arange(1, K + 1).expand(N, K).clone()
        rank[outside, -1] = recorded.target_rank[outside] + 1
        ids = recorded.ids[:, :K].clone()
        ids[outside, -1] = recorded.target_id[outside]
        logps = _interpolate(recorded.logps, recorded.V, rank) + stretch.log_density(rank)
        slot = recorded.target_rank.clamp(max=K - 1)
        log_tail = torch.log1p(-logps.exp().sum(-1).clamp(max=1 - 1e-6))
        ranks = torch.arange(1, V + 1)
        own = stretch.own(ranks)
        prior = _interpolate(recorded.prior[None], recorded.V, own[None])[0] + stretch.log_density(own)
        prior -= prior.mean()
        norms = _interpolate(recorded.norms[None], recorded.V, own[None])[0] ** NORM_POWER
        norms /= norms.square().mean().sqrt()
        factor = _tail_factor(recorded, stretch, K, ids, prior, norms)
        # In a repeated text every id moves to one of similar prior: one table a text, so neighbours share.
        text = t // run
        texts = int(text[-1]) + 1
        moved = torch.randn(texts, recorded.V, generator=generator, device=device).cpu()
        moved[: N // run] = 0
        cell = torch.rand(texts, recorded.V, generator=generator, device=device).cpu()
        own_ids = ids[row]
        place = (own_ids + cell[text[:, None], own_ids]) * (0.25 * moved[text[:, None], own_ids]).exp()
        by_rank = stretch.other(place.clamp(min=1e-3)).long().clamp(max=V - 1)
        by_rank = _distinct(by_rank, V)
        # A BPE id is itself not far from a rank of the prior.
        noise = torch.randn(V, generator=generator, device=device).cpu() * recorded.scatter
        id_of_rank = ranks.log().add(noise).argsort().argsort()
        by_id = (torch.empty_like(x).scatter_(0, id_of_rank, x) for x in (prior, norms))
        ids = id_of_rank[by_rank]
        targets = ids.gather(1, slot[row, None]).squeeze(1)
        slope, spread = recorded.slope * factor, recorded.spread * factor
        values = (ids, logps[row], targets, slope[row], spread[row], log_tail[row], *by_id)
        return cls(*(x.to(device) for x in values))


def _distinct(ids: Tensor, V: int) -> Tensor:  # (T, K) -> (T, K)
    """Equal ids of a row move up to the next free ones; at the end of the vocabulary, down."""
    ordered, where = ids.sort(-1)
    steps = torch.arange(ids.shape[1])
    ordered = (ordered - steps).cummax(-1).values + steps
    ordered = torch.minimum(ordered, V - ids.shape[1] + steps)
    return torch.empty_like(ids).scatter_(1, where, ordered)


def _tail_factor(
    recorded: Recorded, stretch: _Stretch, K: int, ids: Tensor, prior: Tensor, norms: Tensor
) -> Tensor:  # (N,)
    """What slope and spread are multiplied by, so that a tail of slope x prior + norm x spread x normal has the
    recorded one's entropy, which its upper end decides: recorded tails are no normal distributions."""
    V = len(prior)
    own = torch.arange(1, recorded.V + 1)
    logps = _interpolate(recorded.logps, recorded.V, own[None])[:, K:]
    q = logps.softmax(-1)
    target = (q * (-(q.log() + stretch.log_density(own[K:])))).sum(-1)
    # Cells of the prior, without the row's own K ids.
    edges = torch.logspace(0, math.log2(V), 200, base=2.0).round().long().unique()
    edges[-1] = V + 1
    cell = torch.searchsorted(edges, torch.arange(1, V + 1), right=True) - 1
    size = torch.bincount(cell, minlength=len(edges) - 1).float()
    u, square = (torch.zeros_like(size).index_add_(0, cell, x) / size for x in (prior, norms.square()))
    at = stretch.other(ids.float() + 0.5).long().clamp(max=V - 1)
    left = size.expand(len(ids), -1).scatter_add(1, cell[at], -torch.ones(ids.shape)).clamp(min=0.01 * size)
    low, high = torch.full((len(ids), 1), 0.05), torch.full((len(ids), 1), 4.0)
    for _ in range(24):
        factor = (low * high).sqrt()
        slope, variance = factor * recorded.slope[:, None], (factor * recorded.spread[:, None]) ** 2 * square
        log_mass = left.log() + slope * u + variance / 2
        log_z = log_mass.logsumexp(-1, keepdim=True)
        entropy = log_z - ((log_mass - log_z).exp() * (slope * u + variance)).sum(-1, keepdim=True)
        flat = entropy > target[:, None]
        low, high = torch.where(flat, factor, low), torch.where(flat, high, factor)
    return (low * high).sqrt().squeeze(1)


# ------------------------------------------------------------------------------------------------------- construction


def _weight(wanted: _Wanted, D: int, V: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(V, D) float32: random directions of the id's norm, and the prior, scaled to 1, along a shared direction.
    (D,) float32: what weight maps to the prior."""
    weight = torch.randn(V, D, generator=generator, device=generator.device).mul_(wanted.norms[:, None] * D**-0.5)
    shared = torch.randint(0, 2, (D,), generator=generator, device=generator.device).mul_(2).sub_(1) * D**-0.5
    size = wanted.prior.square().mean().sqrt().clamp(min=1e-6)
    # Along the shared direction nothing but the prior.
    weight.addr_(wanted.prior / size - weight @ shared, shared)
    return weight, shared * size


def _hidden(wanted: _Wanted, weight: Tensor, along: Tensor, generator: torch.Generator) -> Tensor:  # (T, D) float32
    (T, K), D = wanted.ids.shape, weight.shape[1]
    u, direction = wanted.prior, along / along.norm()
    hidden = torch.empty(T, D, device=u.device)
    block = max(1, BLOCK_BYTES // (4 * max(K * D, len(weight))))
    for start in range(0, T, block):
        t = slice(start, start + block)
        ids, slope, spread = wanted.ids[t], wanted.slope[t, None], wanted.spread[t, None]
        rows = weight[ids]  # (t, K, D)
        rows -= (rows @ direction)[..., None] * direction  # the first ranks leave the slope alone
        gram = rows @ rows.mT
        gram.diagonal(dim1=-2, dim2=-1).add_(1e-4)
        factor = torch.linalg.cholesky(gram)

        def span(logits: Tensor, rows: Tensor = rows, factor: Tensor = factor) -> Tensor:
            """(t, K) logits of the first ranks -> the smallest (t, D) that gives them."""
            return (torch.cholesky_solve(logits[..., None], factor).mT @ rows).squeeze(1)

        noise = torch.randn(len(ids), D, generator=generator, device=u.device)
        noise -= (noise @ direction)[:, None] * direction
        noise -= span((rows @ noise[..., None]).squeeze(-1))
        noise /= noise.norm(dim=-1, keepdim=True)
        base = slope * along
        lacking = wanted.logps[t] - (weight[ids] @ base[..., None]).squeeze(-1)
        lse = (slope * u + (spread * wanted.norms) ** 2 / 2).logsumexp(-1, keepdim=True) - wanted.log_tail[t, None]
        settled = False  # with room before and after lse moved, the tail's spread did not depend on it
        for products in range(3):
            head = span(lacking + lse)
            room = (spread.square() * D - head.square().sum(-1, keepdim=True)).clamp(min=0).sqrt()
            hidden[t] = base + head + room * noise
            if products == 2 or (settled and room.min() > 0):
                break
            settled = bool(room.min() > 0)
            tail = (hidden[t] @ weight.T).scatter_(1, ids, -math.inf).logsumexp(-1, keepdim=True)
            lse = tail - wanted.log_tail[t, None]  # the tail as it came out moves the first ranks
    return hidden


# --------------------------------------------------------------------------------------------------------- confidence


def _logps(hidden: Tensor, weight: Tensor) -> Iterator[Tensor]:  # (t, V) float32, blocks of rows
    for rows in hidden.float().split(max(1, BLOCK_BYTES // (4 * len(weight)))):
        yield (rows @ weight.T).log_softmax(-1)


def _sharpening(hidden: Tensor, weight: Tensor) -> float:
    """The factor of hidden that gives CONFIDENT_ENTROPY, by bisection over every row's first 512 log-probabilities:
    sharpened to that, what is past them is nothing."""
    first = torch.cat([x.topk(min(512, len(weight))).values for x in _logps(hidden, weight)])
    low, high = 0.1, 100.0
    for _ in range(20):
        scale = math.sqrt(low * high)
        logps = (first * scale).log_softmax(-1)
        entropy = -torch.sum(logps.exp() * logps, -1, dtype=torch.float64).mean().item()
        low, high = (scale, high) if entropy > CONFIDENT_ENTROPY else (low, scale)
    return scale


def _sample(logps: Tensor, generator: torch.Generator) -> Tensor:  # (t, V) -> (t,)
    draws = torch.rand(len(logps), 1, generator=generator, device=logps.device)
    sums = logps.exp().cumsum(-1)
    return torch.searchsorted(sums, draws * sums[:, -1:]).squeeze(1).clamp(max=logps.shape[1] - 1)
