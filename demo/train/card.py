"""Write a model's card from the record in its file and the figures of its report, so that it cannot say anything else."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import safetensors

from .. import architectures, autoencoder, loader, scenes

_ABOUT = {
    "sd3-mini": "A small text-to-image diffusion transformer of ComfyUI's own SD3 class. It is no product of, and shares no "
    "weights with, Stable Diffusion 3.",
    "pixart-mini": "A small text-to-image diffusion transformer of ComfyUI's own PixArt class, with the depth of PixArt-alpha, "
    "captions by cross-attention, and noise prediction on the host's discrete schedule. It shares no weights with PixArt.",
    "wan-mini": "A small text-to-video diffusion transformer of ComfyUI's own Wan 2.1 class. It shares no weights with Wan.",
}


def card(name: str, folder: pathlib.Path) -> str:
    """The card as Markdown, from ``NAME.safetensors``, ``autoencoder.safetensors`` and ``NAME-report.json`` in ``folder``."""
    metadata, first = (_metadata(folder / f"{stem}.safetensors") for stem in (name, loader.AUTOENCODER))
    figures = json.loads((folder / f"{name}-report.json").read_text(encoding="utf-8"))
    architecture, training = architectures.ARCHITECTURES[name], metadata["training"]
    phases = first["training"]["phases"]
    size = (folder / f"{name}.safetensors").stat().st_size / 1e6
    thing = "clip" if architecture.moving else "picture"
    how = f"{figures['steps']} steps of {figures['sampler']}, scheduler {figures['scheduler']}, guidance {figures['cfg']}"
    objective = "the noise" if architecture.objective == "epsilon" else "noise - x0 (rectified flow)"
    rows = architecture.frames // architecture.unet_config["patch_size"][0] if architecture.moving else 1
    brief = f" (brief clips: {rows * training['batch']})" if architecture.moving else ""
    lines = [
        f"# {name}",
        "",
        f"{_ABOUT[name]} Trained from nothing by `demo/train` on drawn scenes, to measure BlockDance on.",
        "",
        f"![Captions and {thing}s]({name}-samples.jpg)",
        "",
        f"The first test captions of each kind for seed {figures['seed']}, not selected, easy ones first; {how}, through "
        "ComfyUI's sampler. A red frame marks what `demo/detector.py` judges wrong."
        + (" Of each clip the first, the middle and the last frame." if architecture.moving else ""),
        "",
        "## What it is",
        "",
        "| | |",
        "|---|---|",
        f"| File | `{name}.safetensors`, {size:.1f} MB, bfloat16, configuration and training record in the metadata |",
        f"| Diffusion transformer | `{architecture.cls}`, {metadata['parameters'] / 1e6:.2f} M parameters with the text "
        f"encoder; latents {' x '.join(map(str, architecture.latent_shape))} |",
        "| Arguments | " + ", ".join(f"`{k}` {_plain(v)}" for k, v in architecture.unet_config.items()) + " |",
        f"| Text encoder | {len(metadata['vocabulary']) - 1} words; one vector for each phrase of a caption, {scenes.PHRASES} "
        "phrases; their mean is the pooled vector |",
        f"| Predicts | {objective}, schedule "
        + ", ".join(f"{k} {v}" for k, v in architecture.sampling_settings.items()) + " |",
        f"| Autoencoder | `autoencoder.safetensors`, convolutions, {autoencoder.DOWNSCALE} pixels to one latent of "
        f"{autoencoder.LATENT_CHANNELS} channels, frame by frame; {first['training']['psnr']:.1f} dB on unseen scenes |",
        "",
        "## Data",
        "",
        "`demo/scenes.py` draws without end; [demo/README.md](../README.md) has the grammar, the kinds of captions and the "
        f"splits. {training['easy_captions']:.0%} of the samples are easy. {thing.capitalize()}s have {architecture.size} x "
        f"{architecture.size} pixels"
        + (f" and {scenes.FRAMES} frames." if architecture.moving else "."),
        "",
        "## Training",
        "",
        "| | Diffusion transformer and text encoder | Autoencoder, both halves, then the decoder alone |",
        "|---|---|---|",
        f"| Steps x batch | {training['steps']:,} x {training['batch']}{brief} = {training['samples']:,} samples | "
        + ", ".join(f"{phase['steps']:,} x {first['training']['batch']}" for phase in phases) + " |",
        f"| Time | {training['seconds'] / 60:.0f} minutes | "
        + " + ".join(f"{phase['seconds'] / 60:.0f}" for phase in phases) + " minutes |",
        f"| Hardware | {training['hardware']}, torch {training['torch']} | {first['training']['hardware']} |",
        f"| Schedule | {training['warmup']} steps up, flat, the last {training['decay']:.0%} linear to 0; the "
        "shipped file in parts, see [demo/README.md](../README.md#train-again) | one cycle each |",
        f"| Seed | {training['seed']} | {first['training']['seed']} |",
        "",
        f"{training['optimiser']}; log(s / (1 - s)) of the share of noise s normal with mean {training['spread'][0]} and "
        f"deviation {training['spread'][1]}; {training['dropped_captions']:.0%} empty captions; gradient norm at most 1; "
        f"averaged weights ({training['average']}); weights and activations in {training.get('precision', 'bfloat16')}, "
        "masters in float32.",
        "",
        f"Loss on validation captions at the end: {training['final_validation_loss']:.4f}, the squared error of noise - x0.",
        "",
        f"![Loss]({name}-loss.png)",
        "",
        "## Does it make what the caption says?",
        "",
        f"{figures['captions']} unseen {figures['split']} captions of each kind, one {thing} each, {how}. Right means: shape, "
        f"colour{', place and motion' if architecture.moving else ' and place'} of every object, the background's colour, "
        "and nothing that was not asked for. Textures, letters, sizes and the fill of the background are not judged. The last "
        "column is the detector on real renders of the same captions.",
        "",
        "| Captions | Right | " + " | ".join(figures["hard"]["attributes_right"]) + " | Real renders |",
        "|---|---|" + "---|" * len(figures["hard"]["attributes_right"]) + "---|",
    ]
    for kind in scenes.DIFFICULTIES:
        one = figures[kind]
        attributes = [f"{share:.1%}" for share in one["attributes_right"].values()]
        cells = [kind, f"**{one['right']:.1%}**", *attributes, f"{one['real_renders_right']:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Are its trajectories easy?",
        "",
        f"SSIM and PSNR (data range 1, mean over captions with a 95 % interval) of a run with {figures['steps'] // 2} steps to "
        f"the run with {figures['steps']} steps and the same seed. An acceleration method is worth something above that line.",
        "",
        "| Captions | Compared | SSIM | PSNR |",
        "|---|---|---|---|",
    ]
    for kind in scenes.DIFFICULTIES:
        half = figures[kind]["half_the_steps"]
        ssim = f"{half['ssim']:.4f} +- {half['ssim_interval']:.4f}"
        lines.append(f"| {kind} | {half['captions']} | {ssim} | {half['psnr']:.1f} dB |")
    more = f", and then with `--further {training['steps'] - training['before']['steps']}`" if "before" in training else ""
    lines += ["", f"Made by `python dev.py train-demo {name}`{more}.", ""]
    return "\n".join(lines)


def _metadata(path: pathlib.Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework="pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items()}


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=architectures.ARCHITECTURES)
    parser.add_argument("--models", type=pathlib.Path, default=loader.FOLDER, help="folder of the models")
    options = parser.parse_args(arguments)
    (options.models / f"{options.name}.md").write_text(card(options.name, options.models), encoding="utf-8")


if __name__ == "__main__":
    main()
