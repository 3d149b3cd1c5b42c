"""Processes that begin in the middle of things: forks after the op has run, with threads and without, workers of data
loaders, and processes that are spawned. They give the bits of their parent, or say why not; none waits for ever."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_script
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from groupdpo_kernels import Objective, PreferenceGroups, linear_logps, preference_loss
from groupdpo_kernels.data import TokenGroup, collate
from groupdpo_kernels.lm_head import logit_cache
from groupdpo_kernels.testing import Case, make_inputs
from groupdpo_kernels.threads import Lock


def compute() -> list[Tensor]:
    """More rows than one thread's share, gradients, and a loss over their sums."""
    inputs = make_inputs(Case("", 1100, 24, 700, "", bias=True))
    logps = linear_logps(inputs.hidden, inputs.weight, inputs.targets, inputs.bias)
    offsets = torch.arange(0, 1101, 11)
    loss = preference_loss(logps, offsets, PreferenceGroups.pairs(50), Objective("ipo"), torch.zeros(100)).loss
    leaves = [inputs.hidden, inputs.weight, inputs.bias]
    return [logps.detach(), loss.detach(), *torch.autograd.grad(loss, [x for x in leaves if x is not None])]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def forked(work: Callable[[], bool], seconds: float = 120) -> None:
    """work() in a fork of this process, which must return True in time."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError(f"not ended after {seconds} s")


def says_why() -> bool:
    """With several threads, which are lost, in words; on one thread as ever; and so in what this process forks."""
    try:
        compute()
    except RuntimeError as error:
        assert "torch's threads must be one in a process that was forked after they had run" in str(error)
        assert str(error).endswith("got 2")
    else:
        return False
    expected: list[Tensor] = torch.load(os.environ["EXPECTED"])
    torch.set_num_threads(1)
    return same(compute(), expected) and (forked(lambda: same(compute(), expected)) is None)


def in_a_thread(work: Callable[[], bool]) -> bool:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join(120)
    return found == [True]


def begin_with_threads(folder: str) -> None:
    """What a process with threads does: forks before they run, after, and of another thread than has run on them."""
    torch.set_num_threads(1)
    expected = compute()
    os.environ["EXPECTED"] = f"{folder}/expected.pt"
    torch.save(expected, os.environ["EXPECTED"])
    forked(lambda: same(compute(), expected))
    torch.set_num_threads(2)
    forked(lambda: same(compute(), expected))  # with threads of its own
    assert same(compute(), expected)
    forked(says_why)
    forked(lambda: in_a_thread(lambda: same(compute(), expected)))  # a new thread has its own
    assert in_a_thread(lambda: forked(lambda: same(compute(), expected)) is None)
    assert same(compute(), expected)  # the parent is as it was


def test_forks_of_a_process_with_threads(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import test_forks\ntest_forks.begin_with_threads({str(tmp_path)!r})\nprint('all the same')\n"
    )
    ended = run_script(script, timeout=400)
    assert ended.returncode == 0 and ended.stdout == "all the same\n", ended.stderr


def test_a_lock_that_another_thread_holds_is_open_in_a_fork() -> None:
    """That thread is not there to open it. The budget of kept logits, and patches, have such locks."""
    lock, taken, done = Lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock, logit_cache._lock:
            taken.set()
            done.wait(120)

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait(120)

    def work() -> bool:
        with lock, lock:
            return logit_cache._in_use() >= 0

    try:
        forked(work)
        with Lock() as _:
            forked(work)  # within another
    finally:
        done.set()
        holder.join()


def test_a_fork_within_a_lock_leaves_it() -> None:
    lock = Lock()

    def work() -> bool:
        lock.__exit__()
        with lock:
            return True

    with lock:
        forked(work)


# ------------------------------------------------------------------------------------------------------- data loaders


class Scored(Dataset[Any]):
    """Each item computes, as a worker would that scores what it loads."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> list[Tensor]:
        return compute()


def tokens(n: int, row: int) -> TokenGroup:
    ids = torch.arange(n, dtype=torch.int32) + row
    return TokenGroup(ids, [ids[:2], ids[:3]], [True, False], row)


def first(items: list[Any]) -> Any:
    return items[0]


@pytest.mark.parametrize("start", ["fork", "forkserver", "spawn"])
def test_workers_of_a_data_loader(start: str) -> None:
    """After the op has run in this process. Fork is the way that a loader takes by itself on Linux."""
    expected = compute()
    options: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": start, "timeout": 200}
    for found in DataLoader(Scored(), batch_size=1, collate_fn=first, **options):
        assert same(found, expected)


def test_a_collator_in_the_workers_of_a_data_loader() -> None:
    groups: Any = [tokens(5, 0), tokens(7, 1)]
    for function in (collate, partial(collate, share_prompt=True, max_sequences=2)):
        (step,) = DataLoader(groups, batch_size=2, collate_fn=function, num_workers=1, multiprocessing_context="fork")
        assert repr(step) == repr(function(groups))
