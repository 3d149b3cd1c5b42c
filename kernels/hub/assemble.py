"""The Triton half in the layout of Hugging Face's kernel hub, from the sources of the package: nothing is kept twice.

    python kernels/hub/assemble.py build/hub      build.toml, flake.nix, CARD.md, torch-ext/groupdpo_kernels/

A kernel of the hub is loaded from any path, in several versions at once. So no module of it may name the package, and
its ops live in the namespace that kernel-builder gives each build (`_ops.py`, which it writes). Both are lines of a
known form here, and they are written anew. What the hub has no place for stays behind: models, trainers, the C++
extension.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "groupdpo_kernels"
PARTS = (
    "checks.py",
    "distributed.py",
    "reference.py",
    "replay.py",
    "testing.py",
    "threads.py",
    "lm_head",
    "preference",
)
NAME = "groupdpo_kernels"


def relocatable(text: str, depth: int) -> str:
    """The source of a module that lies `depth` folders below the package, without the package's name in its code."""
    up = "." * (depth + 1)
    text = re.sub(rf"^from {NAME}\.", f"from {up}", text, flags=re.M)
    text = re.sub(rf'import_module\((f?)"{NAME}\.([^"]+)"\)', rf'import_module(\1"{up}\2", __package__)', text)
    with_ops = re.sub(rf'"{NAME}::(\w+)"', r'add_op_namespace_prefix("\1")', text)
    with_ops = re.sub(rf"torch\.ops\.{NAME}\b", "_ops.ops", with_ops)
    with_ops = with_ops.replace(f'torch.library.Library("{NAME}", ', "torch.library.Library(_ops.ops.name, ")
    if with_ops == text:
        return text
    lines = f"from {up} import _ops\nfrom {up}_ops import add_op_namespace_prefix\n"
    return re.sub(r"^import torch\n", "import torch\n" + lines, with_ops, count=1, flags=re.M)


def interface() -> str:
    """The public names of the parts, imported at once: a kernel has no reason to be lazy."""
    text = (PACKAGE / "__init__.py").read_text()
    modules = "|".join(part.removesuffix(".py") for part in PARTS)
    lines = re.findall(rf"^    (from \.(?:{modules})\b.*) as \w+$", text, re.M)
    names = sorted(line.split()[-1] for line in lines)
    version = re.search(r"^__version__ = .*$", text, re.M)
    assert lines and version
    doc = '"""Log-probabilities of tokens without the logits, and preference losses on groups of responses."""'
    return "\n".join([doc, "", *lines, "", version[0], f"__all__ = {names}", ""])


def assemble(target: Path) -> Path:
    """Writes the layout into `target`, which must be new or an earlier one; returns the package within it."""
    if target.exists() and not (target / "build.toml").is_file():
        raise ValueError(f"target must be a new folder, or one that was assembled before; got {target}")
    shutil.rmtree(target, ignore_errors=True)
    package = target / "torch-ext" / NAME
    sources = [
        path for part in PARTS for path in ((PACKAGE / part).rglob("*.py") if "." not in part else [PACKAGE / part])
    ]
    placed = {path: package / path.relative_to(PACKAGE) for path in sources}
    placed |= {path: package / "kernels" / path.name for path in (ROOT / "kernels" / "triton").glob("*.py")}
    for path, to in placed.items():
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(relocatable(path.read_text(), len(to.relative_to(package).parts) - 1))
    (package / "__init__.py").write_text(interface())
    for name in ("build.toml", "flake.nix", "CARD.md"):
        shutil.copy(Path(__file__).parent / name, target / name)
    return package


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(assemble(Path(sys.argv[1])))
