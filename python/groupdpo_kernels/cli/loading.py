"""Loads rows from disk, and tokenizers and models from disk or a hub, with errors that name what is wrong."""

from __future__ import annotations

import codecs
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..checks import one_of
from ..models.limits import token_limit
from ..stepwise.store import digest

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file with one JSON object a line, in UTF-8, or in UTF-16 after a byte order mark. It skips
    empty lines. A ValueError names the line that is wrong.
    """
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}, must be a JSON object: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}, must be a JSON object; got {line.strip()!r:.60}")
        yield row


def _lines(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            try:
                yield from path.read_text(encoding="utf-16").split("\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} begins as UTF-16 and must be so to its end: {error}") from None
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                found = f"byte {line[error.start]:#04x} at place {error.start + 1}"
                raise ValueError(f"{path}, line {number}, must be UTF-8; got {found}: save the file as UTF-8") from None


def existing(what: str, path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{what} must be a file; {path} is {'a folder' if path.is_dir() else 'not there'}")
    return path


def device_of(name: str) -> torch.device:
    """The device of this name; "auto" takes the GPU if torch can use one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that torch can use; torch {torch.__version__} finds no GPU, got {name!r}")
    return device


def load_tokenizer(where: str) -> Any:
    from transformers import AutoTokenizer

    check_place("tokenizer", where)
    try:
        return AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, TypeError, KeyError) as error:  # a folder with a model alone gives any of these
        raise ValueError(f"tokenizer must be a folder or a hub name that holds one; {where}: {error}") from error


def load_model(where: str, dtype: str, device: torch.device, seed: int = 0) -> Any:
    """A causal LM from a folder, a hub name, or a config.json, whose weights are then drawn with this seed."""
    import transformers

    one_of("dtype", dtype, DTYPES)
    check_place("model", where)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # about its own names
    if Path(where).is_file():
        try:
            config = json.loads(Path(where).read_text())
            kind = config.pop("model_type")
        except (ValueError, KeyError, AttributeError) as error:
            wanted = "a folder, a hub name or a config.json with a model_type"
            raise ValueError(f"model must be {wanted}; {where}: {error!r}") from None
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **config))
        model = model.to(DTYPES[dtype] or model.dtype)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=DTYPES[dtype] or "auto")
    return model.to(device)


def check_fit(model: Any, tokenizer: Any) -> None:
    """ValueError for a tokenizer with ids for which the model has no embedding."""
    rows, ids = token_limit(model), len(tokenizer)
    if rows is not None and ids > rows:
        raise ValueError(f"tokenizer must have no more ids than the model has embeddings, {rows}; got {ids}")


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash of what decides a tokenizer's ids. Take it before the first use: a tokenizer may keep its last limit."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    template = [str(tokenizer.chat_template), *_rendered(tokenizer)]
    return digest([type(tokenizer).__qualname__, content, special, template])


_PROBES: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "q"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}],
)


def _rendered(tokenizer: Any) -> list[str]:
    """Some conversations as the chat template renders them now: a template that prints the date changes tomorrow."""
    if not tokenizer.chat_template:
        return []
    found = []
    for probe in _PROBES:
        try:
            found.append(tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template may refuse a role with any error
            found.append(type(error).__name__)
    return found


def check_place(what: str, where: str) -> None:
    """FileNotFoundError for a path that does not exist: it would be taken for a hub name, and give a network error."""
    path = Path(where)
    local = path.is_absolute() or where.startswith((".", "~")) or where.endswith(".json") or where.count(os.sep) > 1
    if local and not path.exists():
        raise FileNotFoundError(f"{what} must be a folder or a hub name; {where} is not there")
