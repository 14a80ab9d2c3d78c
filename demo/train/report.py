"""Judge a demo model through the host's sampler: ``python -m demo.train.report [--count 200] [--sheet PATH]``.

Prints, as JSON, the share of unseen captions drawn right (``demo.detector``: every attribute of every object, and the
background), and draws a sheet of the first pictures with their captions; a red frame marks a picture judged wrong.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import torch

from .. import detector, loader

TILE, TEXT = 160, 92  # pixels


def sample(demo: loader.DemoModel, captions: Sequence[str], cfg: float, seed: int, steps: int = 30) -> torch.Tensor:
    """One picture ``[3, 64, 64]`` in 0..1 for each caption, by the host's Euler sampler."""
    import comfy.sample

    pictures = []
    for start in range(0, len(captions), 16):
        part = captions[start : start + 16]
        latent = loader.empty_latent(demo, len(part))
        noise = comfy.sample.prepare_noise(latent, seed + start)
        result = comfy.sample.sample(
            demo.model, noise, steps, cfg, "euler", "simple", demo.encode(part), demo.encode(""), latent,
            disable_pbar=True, seed=seed,
        )  # fmt: skip
        pictures.append(demo.vae.decode(result).permute(0, 3, 1, 2))
    return torch.cat(pictures)


def tally(verdicts: Sequence[detector.Verdict]) -> dict[str, Any]:
    """Shares of captions and of attributes that are right."""
    by_number: dict[int, list[bool]] = collections.defaultdict(list)
    by_attribute: dict[str, list[bool]] = collections.defaultdict(list)
    for verdict in verdicts:
        by_number[len(verdict.objects)].append(verdict.right)
        by_attribute["background"].append(verdict.background)
        for found in verdict.objects:
            by_attribute["object"].append(all(found.values()))
            for name, right in found.items():
                by_attribute[name].append(right)
    return {
        "captions": len(verdicts),
        "right": _share([v.right for v in verdicts]),
        "right_by_objects": {n: _share(found) for n, found in sorted(by_number.items())},
        "attributes_right": {name: _share(found) for name, found in by_attribute.items()},
    }


def _share(found: list[bool]) -> float:
    return round(sum(found) / len(found), 3)


def sheet(pictures: torch.Tensor, captions: Sequence[str], verdicts: Sequence[detector.Verdict], columns: int = 6) -> Any:
    """Pictures with captions below, as a PIL image."""
    from PIL import Image, ImageDraw, ImageFont

    rows = -(-len(captions) // columns)
    canvas = Image.new("RGB", (columns * (TILE + 12) + 12, rows * (TILE + TEXT) + 12), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for index, (picture, caption, verdict) in enumerate(zip(pictures, captions, verdicts, strict=True)):
        x, y = 12 + index % columns * (TILE + 12), 12 + index // columns * (TILE + TEXT)
        pixels = (picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        if not verdict.right:
            pen.rectangle((x - 4, y - 4, x + TILE + 3, y + TILE + 3), fill=(214, 40, 40))
        canvas.paste(Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC), (x, y))
        pen.text((x, y + TILE + 5), textwrap.fill(caption, 28), fill="black", font=font, spacing=1)
    return canvas


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="sd3-mini", choices=loader.MODELS)
    parser.add_argument("--split", default="test")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--sheet", type=pathlib.Path, help="write the first 30 there")
    options = parser.parse_args()
    sys.argv = [sys.argv[0]] + ([] if torch.cuda.is_available() else ["--cpu"])
    import comfy.options

    comfy.options.enable_args_parsing()
    demo = loader.load_demo(options.name)
    captions = loader.captions(options.name, options.split, options.count, options.seed)
    pictures = sample(demo, captions, options.cfg, options.seed)
    verdicts = [detector.judge(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
    print(json.dumps(tally(verdicts), indent=1))
    if options.sheet:
        sheet(pictures[:30], captions[:30], verdicts[:30]).save(options.sheet, quality=90)


if __name__ == "__main__":
    main()
