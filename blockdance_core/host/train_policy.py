"""Train an adaptive policy for a model of your own, in ComfyUI's Python.

    python custom_nodes/ComfyUI-BlockDance/blockdance_core/host/train_policy.py --checkpoint sd3.safetensors
        --prompts prompts.txt --policy models/blockdance/calibrated.safetensors --out models/blockdance/looks.safetensors

With several processes or machines, torchrun in place of python. Started again, it goes on where it ended.
docs/training-a-policy.md takes it from the beginning.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

PACK = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # the host comes first on the path, and this folder last: its nodes/ hides the host's nodes.py
    HOST = Path(os.environ.get("COMFYUI_PATH") or PACK.parents[1])
    sys.path[:] = [str(HOST), *(entry for entry in sys.path[1:] if entry), str(PACK)]

if TYPE_CHECKING:
    from blockdance_core.host.training import Design, Progress
    from blockdance_core.policy.training import Settings


def add_arguments(top: argparse.ArgumentParser) -> None:
    """What every training can be told, whatever the model."""
    top.add_argument("--published", action="store_true", help="the method as published: every step decided by itself, network "
                     "of 0.08 B parameters, REINFORCE, lambda 2; what is named besides still counts")
    top.add_argument("--choices", choices=("schedules", "steps"), help="decide among calibrated schedules, or every step")
    top.add_argument("--start", type=float, metavar="SHARE", help="share of the steps computed before the decision")
    top.add_argument("--forecast", choices=("taylor", "taylor2", "delta", "hold"), help="what a step decided by itself injects")
    top.add_argument("--tradeoffs", type=float, nargs="+", metavar="LAMBDA", help="weight of quality, for each level")
    for name, kind, about in (
        ("width", int, "of the network"), ("depth", int, "of the network, in blocks"), ("heads", int, "of its attention"),
        ("maps", int, "3: looks at latent, estimate and its change; 1: at the latent"),
        ("epochs", int, "at most so many passes"), ("patience", int, "stop after so many passes without gain"),
        ("group", int, "choices tried of a picture in a pass"), ("rate", float, "learning rate"),
        ("held-out", float, "share of the prompts held out"),
    ):
        top.add_argument(f"--{name}", type=kind, help=about)
    top.add_argument("--no-baseline", action="store_true", help="do not subtract the mean reward of a group")
    top.add_argument("--no-sharing", action="store_true", help="sample the first steps again in every rollout")
    top.add_argument("--boundaries", default="", metavar="LIST", help="for choices steps: block indices, or shares")
    top.add_argument("--seed", type=int, default=0, help="of noise, weights and draws")


def chosen(options: argparse.Namespace, depth: int) -> tuple[Design, Settings]:
    """Design and settings from the command line, for a model of so many blocks."""
    import dataclasses

    from blockdance_core.host.measured import parse_boundaries
    from blockdance_core.host.training import PUBLISHED, Design
    from blockdance_core.policy.training import Settings

    design, settings = PUBLISHED if options.published else (Design(), Settings())
    given = {name: value for name, value in vars(options).items() if value is not None}
    if "tradeoffs" in given:
        given["tradeoffs"] = tuple(given["tradeoffs"])
    given["boundaries"] = parse_boundaries(options.boundaries, depth)
    design = dataclasses.replace(design, **{f.name: given[f.name] for f in dataclasses.fields(Design) if f.name in given})
    settings = dataclasses.replace(settings, **{f.name: given[f.name] for f in dataclasses.fields(Settings) if f.name in given})
    return (dataclasses.replace(design, share=not options.no_sharing),
            dataclasses.replace(settings, baseline=settings.baseline and not options.no_baseline))


@contextlib.contextmanager
def console() -> Iterator[Progress]:
    """A progress bar for each part of the work, on stderr, in the first process."""
    from tqdm import tqdm

    from blockdance_core.host.processes import rank

    bars: dict[str, Any] = {}

    def show(what: str, done: int, of: int, curve: Sequence[dict[str, Any]]) -> None:
        if rank():
            return
        if what not in bars:
            bars[what] = tqdm(desc=what, file=sys.stderr)
        bar = bars[what]
        bar.total = of
        bar.update(done - bar.n)
        if curve:
            bar.set_postfix_str(" ".join(f"{gain - first:+.4f}" for gain, first in zip(
                curve[-1]["held_out"], curve[0]["held_out"], strict=True)))

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()


def told(record: dict[str, Any]) -> str:
    """What came of it, in lines."""
    alike = record["held_out_alike"] or [None] * len(record["held_out"])
    lines = [
        f"  lambda {weight:<6g} reward {reward:.4f}" + ("" if same is None else f", the same schedule for all {same:.4f}")
        for weight, reward, same in zip(record["tradeoffs"], record["held_out"], alike, strict=True)]
    cost = record["cost"]
    return "\n".join([
        f"held-out pictures: {record['held_out_pictures']}, after pass {record['best_pass']} of {record['passes']}", *lines,
        f"{cost['rollouts']:.0f} rollouts, {cost['calls']:.0f} calls of the model, {cost['seconds'] / 60:.1f} minutes"])


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = top.add_argument_group("the model: files, or names in ComfyUI's model folders")
    source.add_argument("--checkpoint", help="a checkpoint with everything in it")
    source.add_argument("--diffusion-model", help="or the diffusion model alone, with:")
    source.add_argument("--clip", nargs="+", default=[], help="text encoders")
    source.add_argument("--clip-type", default="stable_diffusion", help="as in CLIPLoader, such as sd3, flux, wan, pixart")
    source.add_argument("--vae", help="for rewards that look at pictures")
    source.add_argument("--clip-vision", help="for the reward clip")
    work = top.add_argument_group("what is sampled")
    work.add_argument("--prompts", type=Path, required=True, help="a text file, one prompt a line")
    work.add_argument("--negative", default="")
    work.add_argument("--size", default="1024x1024", metavar="WxH[xF]", help="in pixels, and frames of a video")
    work.add_argument("--steps", type=int, default=30)
    work.add_argument("--cfg", type=float, default=5.0)
    work.add_argument("--sampler", default="euler")
    work.add_argument("--scheduler", default="simple")
    work.add_argument("--policy", type=Path, help="calibrated schedules to start from")
    work.add_argument("--reward", default="fidelity", help="fidelity, ssim, clip, image-reward, or such as 'ssim + 0.5 clip'")
    work.add_argument("--out", type=Path, required=True, help="the policy file")
    add_arguments(top.add_argument_group("the training"))  # type: ignore[arg-type]
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; 0 on success."""
    from blockdance_core.host.processes import device_arguments, processes, select_gpu

    options = _parser().parse_args(arguments)
    select_gpu()
    ours, sys.argv = sys.argv, ["main.py", *device_arguments()]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    sys.argv = ours
    logging.basicConfig(level=logging.WARNING)
    with processes():
        try:
            _train(options)
        except (ValueError, ImportError, OSError) as error:
            raise SystemExit(f"train_policy: {error}") from error
    return 0


def _train(options: argparse.Namespace) -> None:
    from blockdance_core.host.attach import depth_of
    from blockdance_core.host.processes import rank
    from blockdance_core.host.rewards import by_name
    from blockdance_core.host.training import train
    from blockdance_core.policy import load

    lines = [line.strip() for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    model, clip, vae, clip_vision = _loaded(options)
    reward = by_name(options.reward, vae, clip, clip_vision)
    base = load(options.policy) if options.policy else None
    design, settings = chosen(options, depth_of(model))
    prompts = [_prompt(options, model, clip, line, options.seed + k) for k, line in enumerate(lines)]
    with console() as progress:
        _, record = train(model, prompts, options.out, base, design, settings, reward, [[line] for line in lines],
                          record={"files": [options.checkpoint or options.diffusion_model], "size": options.size},
                          progress=progress)
    if not rank():
        sys.stdout.write(f"{told(record)}\n{options.out}\n")


def _loaded(options: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """MODEL, CLIP, VAE and CLIP vision, as far as they were named."""
    import comfy.clip_vision
    import comfy.sd
    import comfy.utils
    import folder_paths

    def found(name: str, kind: str) -> str:
        path = name if os.path.isfile(name) else folder_paths.get_full_path(kind, name)
        if path is None:
            raise ValueError(f"There is no file {name}, neither here nor among ComfyUI's {kind}.")
        return str(path)

    clip = vae = None
    if options.checkpoint:
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(found(options.checkpoint, "checkpoints"))
    elif options.diffusion_model:
        model = comfy.sd.load_diffusion_model(found(options.diffusion_model, "diffusion_models"))
    else:
        raise ValueError("Name a --checkpoint or a --diffusion-model.")
    if options.clip:
        kind = getattr(comfy.sd.CLIPType, options.clip_type.upper(), None)
        if kind is None:
            raise ValueError(f"--clip-type {options.clip_type} is unknown: see the list of the CLIPLoader node.")
        clip = comfy.sd.load_clip([found(name, "text_encoders") for name in options.clip], clip_type=kind)
    if options.vae:
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(found(options.vae, "vae")))
    if clip is None:
        raise ValueError("There is no text encoder in that file: name it with --clip.")
    vision = comfy.clip_vision.load(found(options.clip_vision, "clip_vision")) if options.clip_vision else None
    return model, clip, vae, vision


def _prompt(options: argparse.Namespace, model: Any, clip: Any, line: str, seed: int) -> Any:
    import torch

    from blockdance_core.host.rollout import prompt_of

    def encoded(words: str) -> Any:
        return clip.encode_from_tokens_scheduled(clip.tokenize(words))

    try:
        sides = [int(part) for part in options.size.lower().split("x")]
        width, height, frames = (*sides, 1)[: max(len(sides), 3)]
    except ValueError:
        raise ValueError(f"--size {options.size!r} is no size: expected such as 1024x1024, or 832x480x81.") from None
    form = model.get_model_object("latent_format")
    across, along = getattr(form, "spacial_downscale_ratio", 8), getattr(form, "temporal_downscale_ratio", 4)
    moving = [(frames - 1) // along + 1] if form.latent_dimensions == 3 else []
    latent = torch.zeros(1, form.latent_channels, *moving, height // across, width // across)
    return prompt_of(model, encoded(line), encoded(options.negative), {"samples": latent}, seed, options.steps, options.cfg,
                     options.sampler, options.scheduler)


if __name__ == "__main__":
    raise SystemExit(main())
