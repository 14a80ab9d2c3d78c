"""Start the host on a machine whose torchvision or torchaudio does not fit its torch.

PyPI ships torchvision and torchaudio as CUDA builds. Beside a CPU torch their extension libraries do not load, and
``import torchvision`` (ComfyUI v0.30.0: comfy/ldm/rt_detr/rtdetr_v4.py, reached from comfy/model_base.py) and
``import torchaudio`` fail. `prepare` makes both importable in this process and writes nothing to disk; the host uses
neither library's compiled operators for what this pack does. Where the libraries load, nothing is changed.

As a script, ``COMFYUI_PATH=... python tests/host/launcher.py <arguments of main.py>`` runs the host's main.py.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_kept: list[Any] = []  # a torch.library.Library takes its definitions back when it is collected


class _Preparer(MetaPathFinder):
    """Looks at each of the two packages when it is first imported; before, torch stays unimported, as main.py wants."""

    def __init__(self) -> None:
        self.pending = {"torchvision": _prepare_torchvision, "torchaudio": _prepare_torchaudio}

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Prepare for the import of `name`, which the other finders then find."""
        if prepare_package := self.pending.pop(name, None):
            prepare_package()


def prepare() -> None:
    """Make torchvision and torchaudio importable beside a torch they were not built for. May be called twice."""
    known = any(isinstance(finder, _Preparer) for finder in sys.meta_path)
    if sys.platform == "linux" and not known:  # on Windows and macOS PyPI has CPU builds
        sys.meta_path.insert(0, _Preparer())


def host_path() -> Path:
    """The ComfyUI checkout named by COMFYUI_PATH.

    Returns:
        The absolute folder that holds main.py.

    Raises:
        RuntimeError: COMFYUI_PATH is unset or names no ComfyUI.
    """
    value = os.environ.get("COMFYUI_PATH", "")
    path = Path(value).resolve()
    if not value or not (path / "main.py").is_file():
        raise RuntimeError(
            f"COMFYUI_PATH is {value!r}, which is no ComfyUI folder (no main.py in it). "
            "Run `python dev.py test`, or set COMFYUI_PATH to a ComfyUI checkout."
        )
    return path


def enter(*arguments: str) -> None:
    """Make the host importable in this process, as if it was started with these arguments; it comes first on the path.

    Args:
        arguments: The command line of main.py, such as `--cpu`; parsed when `comfy` is first imported, which is here.
    """
    sys.path.insert(0, str(host_path()))
    prepare()
    ours, sys.argv = sys.argv, ["main.py", *arguments]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
    finally:
        sys.argv = ours


def main(arguments: list[str]) -> None:
    """Run the host's main.py in this process.

    Args:
        arguments: The command line of main.py, without the program name.
    """
    host = host_path()
    prepare()
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(host), *(entry for entry in sys.path if entry and Path(entry).resolve() != here)]
    sys.argv = [str(host / "main.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _extension_loads(package: str, stem: str) -> bool:
    """Whether a package's compiled library loads; true where there is nothing to load."""
    spec = importlib.util.find_spec(package)  # does not import a top-level package
    if spec is None or not spec.submodule_search_locations:
        return True
    import torch

    folder = Path(spec.submodule_search_locations[0])
    libraries = [p for p in folder.glob(stem + "*") if p.suffix in (".so", ".pyd", ".dylib")]
    try:
        for library in libraries:
            torch.ops.load_library(str(library))
    except OSError:
        return False
    return True


def _prepare_torchvision() -> None:
    """Declare the operators for which torchvision registers fake kernels while it is imported."""
    if _extension_loads("torchvision", "_C"):
        return
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


def _prepare_torchaudio() -> None:
    """Give torchaudio the module it has when built without an extension (torchaudio/_extension/__init__.py)."""
    if _extension_loads("torchaudio", "lib/_torchaudio"):
        return
    stub = ModuleType("torchaudio._extension")
    stub.__dict__.update(
        _IS_TORCHAUDIO_EXT_AVAILABLE=False, _IS_ALIGN_AVAILABLE=False, fail_if_no_align=lambda function: function
    )
    sys.modules[stub.__name__] = stub


if __name__ == "__main__":
    main(sys.argv[1:])
