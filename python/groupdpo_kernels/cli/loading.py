"""Loads rows from disk, and tokenizers and models from disk or a hub, with errors that name what is wrong."""

from __future__ import annotations

import codecs
import io
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from ..checks import one_of, shown
from ..models.limits import token_limit
from ..stepwise.store import digest

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# A line is held whole, as bytes, text and values: several times its length.
LONGEST_LINE = 2**27
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",  # begins as UTF-16 does
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file with one JSON object a line, in UTF-8, or in UTF-16 or UTF-32 after a byte order mark.

    It skips empty lines, and holds one line at a time. A ValueError names the line that is wrong.
    """
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}, must be a JSON object: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}, must be a JSON object; got {shown(line.strip())}")
        yield row


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError for a name that it has twice: JSON would silently take the last."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"an object must have each name once; got {shown(name)} twice")
        found[name] = value
    return found


def _lines(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        start = file.read(4)
        encoding = next((name for mark, name in _ENCODINGS.items() if start.startswith(mark)), None)
        file.seek(0)
        if encoding is not None:
            words = io.TextIOWrapper(file, encoding, newline="\n")
            try:
                yield from _bounded(path, words)
            except UnicodeError as error:
                name = encoding.replace("utf", "UTF")
                raise ValueError(f"{path} begins as {name} and must be so to its end: {error}") from None
            return
        for number, line in enumerate(_bounded(path, file), 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                found = f"byte {line[error.start]:#04x} at place {error.start + 1}"
                raise ValueError(f"{path}, line {number}, must be UTF-8; got {found}: save the file as UTF-8") from None


def _bounded(path: Path, file: IO[Any]) -> Iterator[Any]:
    """The lines of a file. ValueError for one that is too long."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            most = f"{LONGEST_LINE // 2**20} Mi characters"
            raise ValueError(f"{path}, line {number}, must have at most {most}: is the file one JSON object a line?")
        yield line


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
    except Exception as error:  # a folder with a model alone, or a file that is cut short, gives any kind
        raise ValueError(f"tokenizer must be a folder or a hub name that holds one; {where}: {error}") from error


def load_model(where: str, dtype: str, device: torch.device, seed: int = 0) -> Any:
    """A causal LM from a folder, a hub name, or a config.json, whose weights are then drawn with this seed."""
    import transformers

    one_of("dtype", dtype, DTYPES)
    check_place("model", where)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # about its own names
    try:
        if Path(where).is_file():
            model = _from_config(Path(where), seed)
            model = model.to(DTYPES[dtype] or model.dtype)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=DTYPES[dtype] or "auto")
    except (OSError, ValueError, TypeError, ImportError):
        raise
    except Exception as error:  # of a value in its config, or of a file of weights that is cut short
        raise ValueError(
            f"model must be one that transformers loads; {where}: {type(error).__name__}: {error}"
        ) from error
    return model.to(device)


def _from_config(path: Path, seed: int) -> Any:
    """A model with random weights."""
    import transformers

    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
        kind = config.pop("model_type")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        wanted = "a folder, a hub name or a config.json with a model_type"
        raise ValueError(f"model must be {wanted}; {path}: {error!r}") from None
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **config))


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
