"""Judge a demo model through the host's sampler, on captions it has never seen.

Writes, as JSON: the share of easy and of hard captions drawn right (``demo.detector``: shape, colour, place and motion of
every object, the background, nothing else), the same for real renders of the same captions, which is the most that the
detector can see, and how far the pictures move when half of the steps are left out. Draws a sheet of the first pictures
with their captions; a red frame marks what was judged wrong.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import pathlib
import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

import torch

from blockdance_core import metrics
from blockdance_core.host.processes import device_arguments

from .. import detector, loader, renderer, scenes
from ..architectures import ARCHITECTURES
from ..hosting import launcher

TILE, TEXT = 144, 118  # pixels
SHEET = 12  # captions of each difficulty
BATCH = 16


def sample(demo: loader.DemoModel, captions: Sequence[str], seed: int, **changed: Any) -> torch.Tensor:
    """One picture ``[3, H, W]`` or clip ``[F, 3, H, W]`` in 0..1 for each caption, through the host's sampler.

    Args:
        demo: The model.
        captions: The captions.
        seed: Seed of the noise.
        changed: ``sampler``, ``scheduler``, ``cfg`` or ``steps`` in place of the model's own.
    """
    import comfy.sample

    how = {**demo.sampling, **changed}
    pictures = []
    for start in range(0, len(captions), BATCH):
        part = captions[start : start + BATCH]
        latent = loader.empty_latent(demo.model, len(part))
        noise = comfy.sample.prepare_noise(latent, seed + start)
        result = comfy.sample.sample(
            demo.model, noise, how["steps"], how["cfg"], how["sampler"], how["scheduler"], demo.encode(part), demo.encode(""),
            latent, disable_pbar=True, seed=seed,
        )  # fmt: skip
        pictures.append(demo.vae.decode(result).movedim(-1, -3))
    return torch.cat(pictures)


def judge(pictures: torch.Tensor, captions: Sequence[str]) -> list[detector.Verdict]:
    """The detector on each picture."""
    return [detector.judge(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]


def tally(verdicts: Sequence[detector.Verdict]) -> dict[str, Any]:
    """Shares of captions and of attributes that are right."""
    by_attribute: dict[str, list[bool]] = collections.defaultdict(list)
    for verdict in verdicts:
        by_attribute["background"].append(verdict.background)
        by_attribute["nothing else"].append(verdict.nothing_else)
        for found in verdict.objects:
            for name, right in found.items():
                by_attribute[name].append(right)
    return {
        "right": _share([v.right for v in verdicts]),
        "attributes_right": {name: _share(found) for name, found in by_attribute.items()},
    }


def fidelity(pictures: torch.Tensor, reference: torch.Tensor) -> dict[str, Any]:
    """Mean SSIM with its 95 % interval over the captions, and mean PSNR in dB, data range 1; clips by frame."""
    frames = (pictures.reshape(-1, *pictures.shape[-3:]), reference.reshape(-1, *reference.shape[-3:]))
    channels_last = [f.movedim(-3, -1) for f in frames]
    ssim = metrics.ssim(*channels_last).reshape(len(pictures), -1).mean(1)
    psnr = metrics.psnr(*channels_last).reshape(len(pictures), -1).mean(1)
    half = 1.96 * ssim.std().item() / math.sqrt(len(ssim))
    return {"ssim": round(ssim.mean().item(), 4), "ssim_interval": round(half, 4), "psnr": round(psnr.mean().item(), 2)}


@dataclasses.dataclass(frozen=True)
class Judged:
    """Captions, what a model made of them, and the detector's verdicts."""

    captions: list[str]
    pictures: torch.Tensor
    verdicts: list[detector.Verdict]


def measure(demo: loader.DemoModel, split: str, count: int, compared: int, seed: int) -> tuple[dict[str, Any], list[Judged]]:
    """All figures of a model, for both difficulties, and what they are of.

    Args:
        demo: The model.
        split: Split of the captions.
        count: Captions of each difficulty that are judged.
        compared: How many of them are sampled again with half of the steps.
        seed: Seed of captions and noise.
    """
    architecture = ARCHITECTURES[demo.name]
    figures: dict[str, Any] = {"model": demo.name, "split": split, "captions": count, "seed": seed, **demo.sampling}
    judged = []
    for difficulty in scenes.DIFFICULTIES:
        generator = torch.Generator().manual_seed(seed)
        drawn = scenes.draw(count, generator, split, architecture.moving, difficulty)
        captions = drawn.said.captions()
        real = renderer.render_clips(drawn.scenes, generator, architecture.frames, architecture.size)
        pictures = sample(demo, captions, seed)
        fewer = sample(demo, captions[:compared], seed, steps=demo.sampling["steps"] // 2)
        judged.append(Judged(captions, pictures, judge(pictures, captions)))
        figures[difficulty] = {
            **tally(judged[-1].verdicts),
            "real_renders_right": _share([v.right for v in judge(real if architecture.moving else real[:, 0], captions)]),
            "half_the_steps": {"captions": compared, **fidelity(fewer, pictures[:compared])},
        }
    return figures, judged


def sheet(judged: Sequence[Judged]) -> Any:
    """The first captions of each difficulty with what was made of them, of clips three frames, as a PIL image."""
    from PIL import Image, ImageDraw, ImageFont

    moving = judged[0].pictures.ndim == 5
    columns, wide = (4, 3 * TILE) if moving else (8, TILE)
    tall = TILE + (60 if moving else TEXT)
    shown = [item for one in judged for item in list(zip(one.captions, one.pictures, one.verdicts, strict=True))[:SHEET]]
    canvas = Image.new("RGB", (columns * (wide + 12) + 12, -(-len(shown) // columns) * tall + 12), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for index, (caption, picture, verdict) in enumerate(shown):
        x, y = 12 + index % columns * (wide + 12), 12 + index // columns * tall
        frames = picture[:: (len(picture) - 1) // 2] if moving else picture[None]
        if not verdict.right:
            pen.rectangle((x - 4, y - 4, x + wide + 3, y + TILE + 3), fill=(214, 40, 40))
        for k, frame in enumerate(frames):
            pixels = (frame.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            canvas.paste(Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC), (x + k * TILE, y))
        pen.text((x, y + TILE + 5), textwrap.fill(caption, wide // 6), fill="black", font=font, spacing=1)
    return canvas


def _share(found: Sequence[bool]) -> float:
    return round(statistics.fmean(found), 3)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=ARCHITECTURES)
    parser.add_argument("--models", type=pathlib.Path, help="folder of the models")
    parser.add_argument("--split", default="validation", choices=scenes.SPLITS)
    parser.add_argument("--count", type=int, default=100, help="captions of each difficulty")
    parser.add_argument("--compared", type=int, default=32, help="of these, sampled with half the steps too")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures there")
    parser.add_argument("--sheet", type=pathlib.Path, help="write the pictures there")
    options = parser.parse_args(arguments)
    launcher.enter(*device_arguments())
    demo = loader.load_demo(options.name, options.models)
    figures, judged = measure(demo, options.split, options.count, options.compared, options.seed)
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if options.sheet:
        sheet(judged).save(options.sheet, quality=88)


if __name__ == "__main__":
    main()
