"""What somebody gets who installs a file of dist/: that file in an environment of its own, and a call of each kind.

    python tests/installed_package.py cpu                        what this Python has installed, with the C++ op
    python tests/installed_package.py reference --file FILE      FILE, installed in a fresh environment, without it

`make dist` and the workflow that builds wheels run it. torch is not installed once more: a fresh environment finds this
one's, and all other packages, by a path; the file under test comes first. It is no test of pytest, which would import
what lies beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path


def try_in_a_fresh_environment(file: Path, impl: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", file.resolve()], check=True, cwd=folder)
        site = Path(folder, "lib", f"python{sys.version_info.major}.{sys.version_info.minor}", "site-packages")
        here = [path for path in sys.path if Path(path).name == "site-packages"]
        (site / "borrowed.pth").write_text("\n".join(here))  # a path, whose own .pth files (editable installs) rest
        subprocess.run([python, "-I", __file__, impl], check=True, cwd=folder)
        commands = Path(folder, "bin", "groupdpo-kernels")
        subprocess.run([commands, "check"], check=True, cwd=folder, stdout=subprocess.DEVNULL)


def try_what_is_installed(impl: str) -> None:
    import torch

    import groupdpo_kernels as g

    site = Path(sysconfig.get_path("purelib"))
    assert site in Path(g.__file__).parents, f"{g.__file__} is not of {site}"
    assert importlib.metadata.version("groupdpo-kernels") == g.__version__
    assert (Path(g.__file__).parent / "py.typed").is_file()

    torch.manual_seed(0)
    hidden = torch.randn(9, 16, requires_grad=True)  # (T, D): 3 responses of 3 tokens
    weight = torch.randn(50, 16, requires_grad=True)  # (V, D)
    targets = torch.randint(50, (9,))
    found = g.explain(hidden, weight, targets).impl
    assert found == impl, f"{found} computes, not {impl}"
    logps = g.linear_logps(hidden, weight, targets)
    eager = torch.log_softmax(hidden @ weight.T, -1)[range(9), targets]
    torch.testing.assert_close(logps, eager)
    groups = g.PreferenceGroups.from_lists([[True, False, False]])
    objective = g.Objective("mpo", reference_free=True)
    losses = (g.preference_loss(values, torch.arange(0, 10, 3), groups, objective).loss for values in (logps, eager))
    ours, theirs = (torch.autograd.grad(loss, (hidden, weight)) for loss in losses)
    torch.testing.assert_close(ours, theirs)

    import groupdpo_kernels.kernels  # the Triton half is where the package looks for it

    print(f"groupdpo-kernels {g.__version__}, torch {torch.__version__}: {impl}, right")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("impl", choices=["cpu", "reference"], help="the implementation that a CPU must get")
    parser.add_argument("--file", type=Path, help="an sdist or a wheel; without it, what is installed")
    options = parser.parse_args()
    if options.file:
        try_in_a_fresh_environment(options.file, options.impl)
    else:
        try_what_is_installed(options.impl)
