"""What the test files assert, counted from their source: a change that makes the suite faster must not lower it.

`python tests/count_assertions.py [REVISION]` prints a line for each file and the sum, of the files on disk or of a git
revision. A statement in a parametrised test counts once; `pytest --collect-only -q` counts its cases.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

CHECKS = ("raises", "warns", "allclose", "gradcheck", "opcheck")


def count(source: str) -> tuple[int, int]:
    """Test functions; assert statements and calls that assert."""
    nodes = list(ast.walk(ast.parse(source)))
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    names = [ast.unparse(n.func).rpartition(".")[2] for n in nodes if isinstance(n, ast.Call)]
    checks = [name for name in names if name.startswith("assert_") or name in CHECKS]
    return len(functions), sum(isinstance(n, ast.Assert) for n in nodes) + len(checks)


def git(*arguments: str) -> str:
    folder = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def sources(revision: str | None) -> dict[str, str]:
    if revision is None:
        return {path.name: path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))}
    names = [name for name in git("ls-tree", "--name-only", revision, ".").split() if name.endswith(".py")]
    return {name: git("show", f"{revision}:./{name}") for name in names}


if __name__ == "__main__":
    counts = {name: count(source) for name, source in sources(sys.argv[1] if len(sys.argv) > 1 else None).items()}
    counts["sum"] = (sum(n for n, _ in counts.values()), sum(n for _, n in counts.values()))
    for name, (functions, checks) in counts.items():
        print(f"{name:32} {functions:5} tests {checks:6} assertions")
