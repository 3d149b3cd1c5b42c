"""Stores values on disk under the hash of what they depend on: files are written and read whole or not at all.

`digest` hashes plain values, tensors and arrays, `tensor_digests` a model's weights; `write` puts tensors and plain
values into a file, as `files.replacing` does; `read` gives them back if the file is whole and carries the keys that it
is asked for.

It never unpickles anything but tensors and plain values. It needs what `files` needs.
The cost is BLAKE2b of what is hashed, written or read (0.6 GB/s a core; weights on up to 8 cores). A file is a line of
magic, the hash of the rest, and the rest as `torch.save` writes it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import json
import os
import pickle
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from ..files import naming, replacing
from ..models.adapters import active_adapters, adapter_configs

_MAGIC = b"groupdpo_kernels 1\n"
# BLAKE2b is 2.6 times as fast as SHA-256 on a core without SHA instructions.
_hash = functools.partial(hashlib.blake2b, digest_size=32)
_HEADER = len(_MAGIC) + _hash().digest_size


# ------------------------------------------------------------------------------------------------------------- digests


def digest(x: Any) -> str:
    """Hash of a value: plain, a tensor, an array, or mappings, sequences and dataclasses of these. A NamedTuple with a
    property `files`, paths, is hashed with the bytes of these files."""
    sha = _hash()
    _feed(sha, x)
    return sha.hexdigest()


def _feed(sha: Any, x: Any) -> None:
    """Adds a value as its kind, its size and its content, so that no two values feed the same bytes."""
    if getattr(getattr(x, "dtype", None), "hasobject", False):  # its bytes are pointers
        x = x.tolist()
    if isinstance(x, Tensor):
        x = getattr(x, "to_local", lambda x=x: x)().detach().cpu().contiguous()
        sha.update(f"tensor {x.dtype} {tuple(x.shape)};".encode())
        sha.update((ctypes.c_char * x.nbytes).from_address(x.data_ptr()) if x.nbytes else b"")
    elif isinstance(x, Mapping):
        sha.update(f"mapping {len(x)};".encode())
        for name in sorted(x, key=str):
            _feed(sha, name)
            _feed(sha, x[name])
    elif isinstance(x, (list, tuple)):
        sha.update(f"sequence {len(x)};".encode())
        for value in x:
            _feed(sha, value)
        for path in getattr(x, "files", ()):  # what a path names may change in place
            _feed(sha, Path(path).read_bytes())
    elif x is None or isinstance(x, (str, bytes, bool, int, float)):
        content = x if isinstance(x, bytes) else str(x).encode("utf-8", "surrogatepass")
        sha.update(f"{type(x).__name__} {len(content)};".encode() + content)
    elif hasattr(x, "tobytes"):  # arrays of NumPy, images of PIL
        kind, content = [str(getattr(x, name, "")) for name in ("dtype", "mode", "shape", "size")], x.tobytes()
        if hasattr(x, "getpalette"):  # content may be indices of colours
            kind.append(str(x.getpalette()))
        sha.update(f"{type(x).__name__} {kind} {len(content)};".encode() + content)
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        sha.update(f"{type(x).__name__};".encode())
        _feed(sha, {field.name: getattr(x, field.name) for field in dataclasses.fields(x)})
    else:
        kinds = "plain values, tensors, arrays, or mappings, sequences and dataclasses of these"
        raise TypeError(f"data and options must be {kinds}; got a {type(x).__qualname__}")


def hashers() -> ThreadPoolExecutor:
    """Threads that hash side by side, which releases the interpreter's lock."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def tensor_digests(model: nn.Module) -> dict[str, str]:
    """{name: hash of dtype, shape and bytes} of the state dict. A sharded tensor gives this rank's part."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta or hasattr(parameter, "ds_id"):
            raise ValueError(f"weights must be at hand; {name} is on meta or sharded by ZeRO-3: give `fingerprint`")
    tensors = model.state_dict()
    with hashers() as pool:
        return dict(zip(tensors, pool.map(digest, tensors.values())))


def description(model: nn.Module) -> str:
    """What decides a model's outputs besides its weights: its config, its adapters' configs, the active adapter."""
    configs = [getattr(model, "config", None), *adapter_configs(model).values()]
    told = [config.to_dict() for config in configs if hasattr(config, "to_dict")]
    for config in told:  # drops where the model came from, and the versions that saved it
        for name in ("_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version"):
            config.pop(name, None)
    active = active_adapters(model)
    adapter = active[0] if len(active) == 1 else str(active or "")

    def plain(x: Any) -> Any:  # a set has no order, and a repr may hold an address
        return sorted(map(str, x)) if isinstance(x, (set, frozenset)) else type(x).__qualname__

    return json.dumps([adapter, told], sort_keys=True, default=plain)


# --------------------------------------------------------------------------------------------------------------- files


class UnusableFileError(Exception):
    """A file exists but cannot be used: it is damaged, foreign, or of other keys."""


class _HashingFile:
    """A file object that passes writes on and hashes them."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha = file, _hash()
        self.error: OSError | None = None  # torch.save raises another error in its place, without the reason

    def write(self, data: Any) -> int:
        self.sha.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes a file that is whole and on disk once this returns; until then `path` is as it was."""
    with replacing(path) as file:
        file.write(bytes(_HEADER))
        payload = _HashingFile(file)
        try:
            torch.save(content, cast(IO[bytes], payload))
        except Exception as error:
            raise payload.error or error from None
        file.seek(0)
        file.write(_MAGIC + payload.sha.digest())


def file_digest(path: Path) -> str:
    """Hash of a file's bytes."""
    with naming(path), open(path, "rb") as file:
        sha = _hash()
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()


def read(path: Path, **keys: Any) -> dict[str, Any]:
    """The content given to `write`. FileNotFoundError; UnusableFileError unless it is a whole file with these keys."""
    with naming(path), open(path, "rb") as file:
        header, sha = file.read(_HEADER), _hash()
        while block := file.read(2**20):
            sha.update(block)
        if not header.startswith(_MAGIC):
            raise UnusableFileError(f"{path} is not a file of groupdpo_kernels")
        if header != _MAGIC + sha.digest():
            raise UnusableFileError(f"{path} is damaged: its checksum does not fit")
        file.seek(_HEADER)
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as e:
            raise UnusableFileError(f"{path} holds more than tensors and plain values") from e
    if not isinstance(content, dict) or any(content.get(name) != value for name, value in keys.items()):
        raise UnusableFileError(f"{path} belongs to other weights, data or options")
    return content
