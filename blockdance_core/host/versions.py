"""What a calibration or a training was made with, for its record."""

from __future__ import annotations

from pathlib import Path

import comfyui_version
import torch

_PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def versions() -> dict[str, str]:
    """Versions of this pack, the host and torch."""
    lines = _PROJECT.read_text(encoding="utf-8").splitlines()
    pack = next(line.split('"')[1] for line in lines if line.startswith("version"))
    return {"pack": pack, "comfyui": comfyui_version.__version__, "torch": str(torch.__version__)}
