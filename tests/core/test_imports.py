"""Arrows of the design: nodes -> blockdance_core.host -> blockdance_core; nothing heavy at import of the pack."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "blockdance_core"
HOST = ("comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "server", "nodes", "execution")


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def modules(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.py")) if "__pycache__" not in path.parts]


@pytest.mark.parametrize("path", modules(CORE), ids=lambda path: str(path.relative_to(CORE)))
def test_core_imports_the_host_only_inside_host(path: Path) -> None:
    names = imported(path)
    assert not any(name.split(".")[0] in ("nodes", "demo", "tests") for name in names), "upward"
    if "host" in path.relative_to(CORE).parts:
        return
    assert not [name for name in names if name.split(".")[0] in HOST]
    assert not [name for name in names if name.startswith(("blockdance_core.host", ".host"))]


def test_core_works_without_the_host_on_the_path() -> None:
    names = [*(path.stem for path in CORE.glob("*.py") if path.stem != "__init__"), "policy", "families"]
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(f'blockdance_core.{name}' for name in names)}; "
            "assert not [m for m in sys.modules if m.split('.')[0] in ('comfy', 'comfy_api')]")
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/", timeout=120)


@pytest.mark.parametrize("path", modules(ROOT / "nodes"), ids=lambda path: path.name)
def test_nodes_do_no_tensor_maths_of_their_own(path: Path) -> None:
    names = imported(path)
    assert not [name for name in names if name.split(".")[0] == "comfy" and name != "comfy.model_patcher"]
    assert not any(name.startswith("torch.") for name in names)


def test_pack_init_imports_nothing_heavy() -> None:
    names = {name.split(".")[0] for name in imported(ROOT / "__init__.py", top_level_only=True)}
    assert names <= {"__future__", "importlib", "os", "sys", "pathlib", "typing"}


def test_only_cp1252_characters_in_python_files() -> None:
    for path in [*modules(CORE), *modules(ROOT / "nodes"), ROOT / "__init__.py", *modules(ROOT / "tests")]:
        path.read_text(encoding="utf-8").encode("cp1252")
