"""Values on disk: their digests, and files that are there whole or not at all."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from groupdpo_kernels import AdaBalance, files
from groupdpo_kernels.stepwise import store


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    store.write(path, {"a": torch.ones(3)})
    with pytest.raises(Exception, match="pickle"):
        store.write(path, {"a": lambda: None})
    assert torch.equal(store.read(path)["a"], torch.ones(3)) and list(tmp_path.iterdir()) == [path]


def test_json_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"a": [1, None, "é"]})
    before, known = path.read_bytes(), store.file_digest(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"a": float("nan")})
    with pytest.raises(KeyError), files.replacing(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with files.replacing(path) as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole" and store.file_digest(path) != known


def test_a_living_process_keeps_its_temporary_file(tmp_path: Path) -> None:
    store.write(tmp_path / "x.pt", {})
    host = socket.gethostname()
    mine, dead = (tmp_path / f".y.pt~{host}~{pid}~0.tmp" for pid in (os.getpid(), 2**22 + 1))
    mine.touch()
    dead.touch()
    store.write(tmp_path / "x.pt", {})
    assert mine.exists() and not dead.exists()


def test_plain_values_that_differ_have_digests_that_differ() -> None:
    different = [
        *(None, True, False, 0, 1, -1, 0.0, -0.0, 1.0, "", "1", "None", b"", b"1", "\udc80"),
        *([], {}, [[]], [None], ["a", "b"], ["ab"], ["a", ["b"]], [["a"], "b"], ["a", "b", []]),
        *({"a": 1}, {"a": 1, "b": 2}, {"a": 2, "b": 1}, {1: "a"}, {"1": "a"}, ["a", 1], [["a", 1]]),
        *(AdaBalance(), AdaBalance(1.5), {"ceiling": 2.0, "space": "policy", "normalize": True}),
    ]
    assert len({store.digest(x) for x in different}) == len(different)
    assert store.digest({"a": 1, "b": (2, "x")}) == store.digest({"b": [2, "x"], "a": 1})


def test_tensors_and_arrays_have_digests() -> None:
    x = torch.arange(6, dtype=torch.float32).view(2, 3)
    same = [x, x.clone(), x.T.contiguous().T, nn.Parameter(x)]
    assert len({store.digest(y) for y in same}) == 1
    others = [x, x.T, x.view(6), x.double(), x.bfloat16(), x[:0], torch.tensor(0.0), x.int(), x.numpy()]
    others += [x.numpy().astype("O"), x.numpy()[::-1], numpy.array(["a", "b"]), numpy.float32(1), numpy.int64(1), 1]
    assert len({store.digest(y) for y in others}) == len(others)
    with pytest.raises(TypeError, match="got a object"):
        store.digest([object()])
