"""Put the host on sys.path before anything imports comfy, load the pack as the host does, and fix the seeds.

Order on sys.path matters: our nodes/ folder and the host's nodes.py share a name, so the host comes first and this
repository last. `tests/` is on the path too: `from tiny import CASES`.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


def _enter_host() -> None:
    """Make `comfy`, `nodes` (the host's), `tiny` and `blockdance_core` importable, on the CPU."""
    sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() not in (ROOT, TESTS)]
    sys.path += [str(TESTS), str(ROOT)]
    from host import launcher  # tests/host, a namespace package

    try:
        launcher.enter("--cpu")
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from None


_enter_host()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of our own."""
    parser.addoption("--update-docs", action="store_true", help="write docs/models.md and docs/benchmarks.md anew")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in this hook, too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start servers, browsers and environments run one after the other, in one process of several."""
    for item in items:
        if item.path.parent.name in ("browser", "demo", "host", "workflows") or item.path.name == "test_dev.py":
            item.add_marker(pytest.mark.xdist_group("programs"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """For `-m smoke`, leave modules without such a test alone: on an older host they may not even import."""
    module = config.option.markexpr == "smoke" and collection_path.match("test_*.py")
    return True if module and "mark.smoke" not in collection_path.read_text(encoding="utf-8") else None


def pytest_runtest_setup() -> None:
    """One thread, whatever programs set in tests before: a second one gains nothing here, and loses tenfold if it waits."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed every global generator; the value is 0."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session")
def pack() -> ModuleType:
    """The pack loaded from its folder, as the host loads a custom node (ComfyUI v0.30.0 nodes.py, load_custom_node).

    Its modules are `blockdance_pack.nodes...`; `blockdance_core` is the one that tests import, too.
    """
    name = "blockdance_pack"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
