"""Pictures of a run. Drawn with Pillow, which the host already has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {"compute": (138, 144, 153), "cache": (230, 159, 0), "reuse": (86, 180, 233), "mixed": (204, 121, 167)}
"""By decision, as in web/blockdance.css; grey and three colours of the colour-blind safe palette of Okabe and Ito."""
_BACKGROUND, _INK, _FAINT = (24, 26, 30), (235, 237, 240), (140, 146, 155)
_LEVELS = ((86, 180, 233), (230, 159, 0), (0, 158, 115), (204, 121, 167), (240, 228, 66), (213, 94, 0), (0, 114, 178))
_WIDTH, _HEIGHT, _MARGIN = 960, 300, 40


def timeline(run: dict[str, Any]) -> np.ndarray:
    """One bar per step: height is the measured time, colour the decision.

    Args:
        run: A run record, see `report.run_record`.

    Returns:
        Picture [300, 960, 3], float32, 0..1.
    """
    image = Image.new("RGB", (_WIDTH, _HEIGHT), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    title, small = ImageFont.load_default(18), ImageFont.load_default(13)
    draw.text((_MARGIN, 14), _heading(run), fill=_INK, font=title)
    floor, ceiling = _HEIGHT - 62, 58
    steps, highest = run["steps"], max(run["dit_ms"], default=0.0) or 1.0
    pitch = (_WIDTH - 2 * _MARGIN) / max(steps, 1)
    for step in range(steps):
        left = _MARGIN + step * pitch
        top = floor - max(3.0, (floor - ceiling) * run["dit_ms"][step] / highest)
        draw.rectangle((left, top, left + max(pitch - 2, 1), floor), fill=COLOURS[run["decisions"][step]])
        if step in (0, steps - 1) or step % max(1, steps // 10) == 0:
            draw.text((left, floor + 4), str(step + 1), fill=_FAINT, font=small)
    if steps:
        draw.text((_MARGIN, 40), f"{highest:.4g} ms", fill=_FAINT, font=small)
    left = float(_MARGIN)
    for name, colour in COLOURS.items():
        count = run["decisions"].count(name)
        if count:
            draw.rectangle((left, _HEIGHT - 30, left + 12, _HEIGHT - 18), fill=colour)
            draw.text((left + 18, _HEIGHT - 32), f"{name} {count}", fill=_INK, font=small)
            left += 120
    draw.text((left + 20, _HEIGHT - 32), run["window"]["text"], fill=_FAINT, font=small)
    return np.asarray(image, dtype=np.float32) / 255.0


def curve(rows: Sequence[dict[str, Any]]) -> Image.Image:
    """How a training goes: mean reward on training pictures (faint) and on held-out ones, a colour a level.

    Args:
        rows: See `policy.training.Trainer.curve`.

    Returns:
        Picture 960 x 300.
    """
    image = Image.new("RGB", (_WIDTH, _HEIGHT), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    small = ImageFont.load_default(13)
    title = f"pass {rows[-1]['epoch'] if rows else 0}: reward gained since the first pass, held-out (thin: training)"
    draw.text((_MARGIN, 14), title, fill=_INK, font=small)
    gains = {
        (name, level): [row[name][level] - rows[0][name][level] for row in rows]
        for name in ("reward", "held_out") for level in range(len(rows[0][name]))
    } if rows else {}
    low, high = (edge((value for line in gains.values() for value in line), default=0.0) for edge in (min, max))
    floor, ceiling, span = _HEIGHT - 30, 46, max(high - low, 1e-9)

    def height(value: float) -> float:
        return floor - (floor - ceiling) * (value - low) / span

    for value in (low, 0.0, high):
        y = height(value)
        draw.line((_MARGIN, y, _WIDTH - _MARGIN, y), fill=(60, 64, 70))
        draw.text((4, y - 7), f"{value:+.2g}", fill=_FAINT, font=small)
    for (name, level), line in gains.items():
        pitch = (_WIDTH - 2 * _MARGIN) / max(len(line) - 1, 1)
        points = [(_MARGIN + pitch * k, height(value)) for k, value in enumerate(line)]
        draw.line([*points, points[-1]], fill=_LEVELS[level % len(_LEVELS)], width=1 if name == "reward" else 3)
    return image


def _heading(run: dict[str, Any]) -> str:
    if not run["steps"]:
        return "; ".join(run["warnings"]) or "no run"
    config = run["config"]
    detail = "every step computed"
    if config.get("group_size", 1) > 1:
        detail = f"N = {config['group_size']}, {config['boundary_label']}, {config['forecast']}"
        if config.get("policy"):
            speed = f"cut {config['policy_cut']:.0%}" if config.get("policy_cut") else f"N = {config['group_size']}"
            detail = f"{speed}, policy {config['policy']}"
        elif config.get("quality", "off") != "off":
            detail = f"{config['quality']}, {config['boundary_label']}"
    return f"{run['model_family'] or 'not accelerated'}: {run['steps']} steps, {run['reused_steps']} reused ({detail})"
