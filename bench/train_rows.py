"""Trains a small causal LM on text that this machine has, and writes what its rows of logits look like.

    python bench/train_rows.py                      a few minutes on 2 cores; writes bench/data/trained.safetensors
    python bench/train_rows.py --quick --out FILE   seconds: a file of the same form, of a model that knows nothing

Text: sources of the Python standard library (no tests, no tables) and the documentation, licences, READMEs and metadata
of installed packages, each text once; one file in 20 is held out. Tokens: byte-level BPE trained on the rest. Model: a
Llama, head tied to the embedding. Rows: runs of 16 neighbouring positions of held-out files.

The file holds, of each row, what bench.recorded_rows needs to redraw it at any shape: log-probabilities at a grid
of ranks, the ids of the first ranks (as ranks of the prior, which is what an id means there), the target, how its tail
follows the prior; and the row's exact statistics, which a redrawn row is held against. It never holds weights.
Texts differ between machines, and so does the file; the seed alone does not fix it.
Precondition: torch, transformers, tokenizers. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# At the end of the path: the directory kernels/ must not come before a package of that name.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench.recorded_rows import GRAD_TOL, HEAD, RECORDED, rank_grid, row_statistics, shared_candidates, summarise
from groupdpo_kernels import linear_logps

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "lib2to3", "turtledemo"}
LENGTH, RUN = 256, 16
START = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:6.1f} s] {text}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------------- text


def paths() -> Iterator[Path]:
    stdlib, site = (Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib"))
    for path in sorted(stdlib.rglob("*.py")):
        if not SKIPPED & set(path.relative_to(stdlib).parts):
            yield path
    for path in sorted(site.rglob("*")):
        named = path.name.upper().startswith(("LICENSE", "LICENCE", "README", "METADATA", "NOTICE"))
        prose = path.suffix in (".md", ".rst") or (path.suffix in (".txt", "") and named)
        if prose and path.is_file():
            yield path


def read_texts(limit: int) -> tuple[list[str], list[str], dict[str, int]]:
    """(training texts, held-out texts, sizes in characters)."""
    parts: tuple[list[str], list[str]] = ([], [])
    seen, sizes, total = set(), {"code": 0, "prose": 0}, 0
    for path in paths():
        text = path.read_text(errors="ignore")
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen or len(text) < 500:
            continue
        seen.add(digest)
        parts[digest[0] % 20 == 0].append(text[:200_000])  # one huge file must not be the corpus
        sizes["code" if path.suffix == ".py" else "prose"] += len(parts[digest[0] % 20 == 0][-1])
        total += len(text)
        if total > limit:
            break
    return *parts, sizes


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Any, texts: list[str]) -> Tensor:  # (N,) of all texts, each ended by id 0
    encoded = tokenizer.encode_batch(texts)
    return torch.tensor([i for x in encoded for i in (*x.ids, 0)])


# -------------------------------------------------------------------------------------------------------------- model


@torch.no_grad()
def orthogonal_step(matrices: list[Tensor], momenta: list[Tensor], rate: float) -> None:
    """Muon: momentum, its singular values drawn to 1 by five Newton-Schulz steps. In float32: torch's own computes in
    bf16, for which most CPUs have no unit."""
    for p, momentum in zip(matrices, momenta):
        assert p.grad is not None
        momentum.mul_(0.95).add_(p.grad)
        x = p.grad + 0.95 * momentum
        tall = x.shape[0] > x.shape[1]
        x = (x.T if tall else x) / x.norm().clamp(min=1e-12)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
        p.mul_(1 - 0.05 * rate).sub_(x.T if tall else x, alpha=rate * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def build(vocabulary: int, width: int, layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def train(model: Any, tokens: Tensor, steps: int, batch: int) -> None:
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    ids = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in ids]
    adam = torch.optim.AdamW(outer, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    momenta = [torch.zeros_like(p) for p in inner]
    warm = max(1, min(50, steps // 5))
    windows = tokens[: (len(tokens) - 1) // LENGTH * LENGTH + 1]
    starts = torch.arange(0, len(windows) - LENGTH, LENGTH)
    order = torch.cat([starts[torch.randperm(len(starts))] for _ in range(1 + steps * batch // len(starts))])
    smooth = math.log(model.config.vocab_size)
    for step in range(steps):
        rows = torch.stack([windows[s : s + LENGTH + 1] for s in order[step * batch : (step + 1) * batch].tolist()])
        hidden = model.model(rows[:, :-1]).last_hidden_state
        loss = -linear_logps(hidden, model.lm_head.weight, rows[:, 1:]).mean()
        model.zero_grad()
        loss.backward()
        factor = min((step + 1) / warm, max(0.02, (steps - step) / (steps - warm)))
        adam.param_groups[0]["lr"] = factor * 3e-3
        adam.step()
        orthogonal_step(inner, momenta, factor * 0.02)
        smooth += 0.05 * (loss.item() - smooth)
        if step % 50 == 49 or step + 1 == steps:
            say(f"step {step + 1} of {steps}: loss {smooth:.3f}, {(step + 1) * batch * LENGTH:,} tokens")


# --------------------------------------------------------------------------------------------------------------- rows


Text = tuple[Tensor, Tensor]  # hidden (n, D), targets (n,): neighbouring rows


@torch.no_grad()
def held_out_texts(model: Any, tokens: Tensor, windows: int) -> list[Text]:
    starts = torch.arange(0, len(tokens) - LENGTH, LENGTH)
    starts = starts[torch.linspace(0, len(starts) - 1, windows).long()]
    texts = []
    for start in starts.tolist():
        window = tokens[start : start + LENGTH + 1]
        texts.append((model.model(window[None, :-1]).last_hidden_state[0, LENGTH // 4 :], window[1 + LENGTH // 4 :]))
    return texts


@torch.no_grad()
def record(
    texts: list[Text],
    weight: Tensor,  # (V, D)
    rows: int,
) -> dict[str, Any]:
    """What the file holds: RUN rows each of `rows` / RUN of the texts. The prior of an id is its log-probability, mean
    over rows; not the log of its count, for the logits of rare ids do not follow that: with it 1.6 times as many ids
    became candidates as the model has."""
    grid = rank_grid(len(weight))
    V, prior = len(weight), torch.zeros(len(weight))
    for hidden, _ in texts:
        prior += (hidden @ weight.T).log_softmax(-1).mean(0) / len(texts)
    prior, by_prior = prior.sort(descending=True)
    norms = tail_norms([hidden for hidden, _ in texts], weight[by_prior], prior, grid)
    prior_rank = torch.empty_like(by_prior).scatter_(0, by_prior, torch.arange(V))
    kept: dict[str, list[Tensor]] = {}
    hidden_of_kept: list[Tensor] = []
    everything = []
    for i, (hidden, targets) in enumerate(texts):
        everything.append(row_statistics(hidden, weight, targets, GRAD_TOL))
        if i % max(1, len(texts) * RUN // rows) or len(hidden_of_kept) * RUN == rows:
            continue
        begin = int(torch.randint(0, len(hidden) - RUN + 1, ()))
        hidden, targets = hidden[begin : begin + RUN], targets[begin : begin + RUN]
        hidden_of_kept.append(hidden)
        logps = (hidden @ weight.T).log_softmax(-1)[:, by_prior]
        ranked, ids = logps.sort(-1, descending=True)
        target = prior_rank[targets]
        tail = torch.ones_like(logps, dtype=torch.bool).scatter_(1, ids[:, :HEAD], False)
        x, n = prior.expand_as(logps), tail.sum(-1)
        x_mean, y_mean = (torch.where(tail, a, 0).sum(-1, True) / n[:, None] for a in (x, logps))
        dx, dy = torch.where(tail, x - x_mean, 0), torch.where(tail, logps - y_mean, 0)
        slope = (dx * dy).sum(-1) / dx.square().sum(-1)
        values = {
            "logps": ranked[:, grid - 1].half(),
            "ids": ids[:, :HEAD].to(torch.int32).to(torch.uint16),
            "target_rank": (logps > logps.gather(1, target[:, None])).sum(-1).to(torch.int32),
            "target_id": target.to(torch.int32),
            "slope": slope,
            "spread": (dy - slope[:, None] * dx).square().sum(-1).div(n).sqrt(),
            "statistics": row_statistics(hidden, weight, targets, GRAD_TOL),
        }
        for name, value in values.items():
            kept.setdefault(name, []).append(value)
    data: dict[str, Any] = {name: torch.cat(values) for name, values in kept.items()}
    rank_of_id = prior_rank[256:].add(1).log()  # the first 256 are bytes
    return data | {
        "V": V,
        "run": RUN,
        "prior": prior[grid - 1],
        "norms": norms,
        "scatter": (torch.arange(257, V + 1).log() - rank_of_id).std().item(),
        "sharing": torch.tensor(shared_candidates(torch.cat(hidden_of_kept), weight)),
        "held_out": torch.tensor(summarise(torch.cat(everything))),
    }


def tail_norms(texts: list[Tensor], weight: Tensor, prior: Tensor, grid: Tensor) -> Tensor:  # (len(grid),)
    """How far an id's log-probability strays from its prior, at the grid of ranks of the prior, where it is not among a
    row's first: what the length of a weight row is for. Rare ids stray less. Root mean square over ids is 1."""
    squares, count = torch.zeros_like(prior), torch.zeros_like(prior)
    for hidden in texts:
        logps = hidden @ weight.T
        dx, dy = prior - prior.mean(), logps - logps.mean(-1, keepdim=True)
        stray = dy - (dy @ dx)[:, None] / dx.square().sum() * dx  # what each row's own slope leaves
        first = torch.ones_like(logps).scatter_(1, logps.topk(HEAD).indices, 0)
        squares += (stray.square() * first).sum(0)
        count += first.sum(0)
    mean = squares / count.clamp(min=1)
    mean = (mean / mean.mean()).cumsum(0)
    edges = [0, *((grid[1:] + grid[:-1]) // 2).tolist(), len(prior)]  # a cell of ranks about each rank of the grid
    sums = [mean[b - 1] - (mean[a - 1] if a else 0) for a, b in itertools.pairwise(edges)]
    return torch.stack([x / (b - a) for x, a, b in zip(sums, edges, edges[1:])]).sqrt()


def write(data: dict[str, Any], made_by: str, path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: x.contiguous() for name, x in data.items() if isinstance(x, Tensor)}
    texts = {name: str(x) for name, x in data.items() if name not in tensors} | {"made_by": made_by}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, texts)
    say(f"{path}: {path.stat().st_size:,} bytes; held-out means {data['held_out']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a tiny model, a few steps: tests the script, not the rows")
    add("--out", type=Path, default=RECORDED["trained"])
    add("--steps", type=int, help="of 1024 tokens; default 900")
    add("--seed", type=int, default=0)
    add("--model", type=Path, help="keep the weights here; if they are, train nothing")
    options = parser.parse_args()
    if options.quick and options.out == RECORDED["trained"]:
        parser.error("--quick needs --out: its rows are not worth keeping")
    torch.set_num_threads(1)  # a model this small trains slower on two threads when another process wants a core
    torch.manual_seed(options.seed)
    vocabulary, width, layers, rows, windows = (1024, 64, 1, 32, 4) if options.quick else (16384, 256, 3, 512, 128)
    steps = options.steps or (8 if options.quick else 900)
    texts, held, sizes = read_texts(400_000 if options.quick else 2**62)
    say(f"{len(texts)} texts to train on, {len(held)} held out; characters: {sizes}")
    tokenizer = train_tokenizer(texts, vocabulary)
    tokens, held_tokens = encode(tokenizer, texts), encode(tokenizer, held)
    say(f"{len(tokens):,} tokens to train on, {len(held_tokens):,} held out")
    model = build(vocabulary, width, layers)
    if options.model and options.model.exists():
        model.load_state_dict(torch.load(options.model, weights_only=True))
    else:
        train(model, tokens, steps, 2 if options.quick else 4)
        if options.model:
            torch.save(model.state_dict(), options.model)
    data = record(held_out_texts(model, held_tokens, windows), model.lm_head.weight, rows)
    made_by = (
        f"bench/train_rows.py, seed {options.seed}, {steps} steps, {sizes['code']:,} characters of code and "
        f"{sizes['prose']:,} of prose, {len(tokens):,} tokens, torch {torch.__version__}"
    )
    write(data, made_by, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
