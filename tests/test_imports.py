"""Imports: of each module first, of the lazy package from several threads, and without a GPU or a use of one."""

from __future__ import annotations

import os
import subprocess
import sys

import groupdpo_kernels

# The last file of each folder, and the homes of the public names. That there is no circle is a law of test_laws.py.
MODULES = [
    *("checks", "threads", "replay", "testing", "lm_head.workspace", "models.split_head", "preference.segments"),
    *("data.rules", "memory.workload", "stepwise.store", "integrations.openrlhf", "cli.options"),
    *sorted({*groupdpo_kernels._HOME_OF.values()}),
]

EACH_FIRST = """
import importlib, os, sys, torch
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            assert not [x for x in sys.modules if x.startswith("groupdpo_kernels")]
            importlib.import_module('groupdpo_kernels.' + name)
        except BaseException as error:
            print(name, type(error).__name__, error, flush=True)
            os._exit(1)
        assert not torch.cuda.is_initialized()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
print("all")
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_module_may_be_the_first() -> None:
    """In a process where nothing of this package is imported yet."""
    assert run(EACH_FIRST, *MODULES).endswith("all\n")


FROM_THREADS = """
import sys, threading
import torch  # its own import is not ours to test
import groupdpo_kernels
sys.setswitchinterval(1e-6)
names = [*groupdpo_kernels.__all__]
barrier, found = threading.Barrier(len(names)), {}
def work(name):
    barrier.wait()
    try:
        found[name] = getattr(groupdpo_kernels, name)
    except BaseException as error:
        found[name] = error
threads = [threading.Thread(target=work, args=(name,)) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert all(found[name] is getattr(groupdpo_kernels, name) for name in names), found
h = torch.randn(4, 8)
def call(_=None):
    barrier.wait()
    found[threading.get_ident()] = groupdpo_kernels.linear_logps(h, torch.ones(5, 8), torch.zeros(4, dtype=torch.int64))
threads = [threading.Thread(target=call) for _ in names]  # the extension is loaded by the first call
for thread in threads: thread.start()
for thread in threads: thread.join()
assert sum(isinstance(x, torch.Tensor) for x in found.values()) == len({t.ident for t in threads})
print("all")
"""


def test_the_names_of_the_package_from_several_threads() -> None:
    assert run(FROM_THREADS) == "all\n"


def test_no_gpu_is_touched() -> None:
    """Not on import, and not by a config: a process that is to be forked, or that waits for its rank, has none yet."""
    code = """
import torch, groupdpo_kernels
from groupdpo_kernels import linear_logps, Objective, model_logps, group_backward
import groupdpo_kernels.integrations.trl, groupdpo_kernels.cli.app, groupdpo_kernels.data, groupdpo_kernels.stepwise
from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer, DPOTrainer, StepwiseDPO
GroupDPOConfig("out", use_cpu=True, report_to=[], bf16=False)
linear_logps(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2]))
assert not torch.cuda.is_initialized()
print("none")
"""
    assert run(code, CUDA_VISIBLE_DEVICES="").endswith("none\n")
