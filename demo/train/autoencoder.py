"""Train the demo autoencoder: ``python -m demo.train.autoencoder --out FOLDER``.

L1 on pixels and on their differences (edges), with batch-normalised latents to which noise is added, so that nearby
latents decode to nearby pictures. Two phases: both halves, then the decoder alone (``--phase 2``), which can be repeated
without touching the latents that a diffusion model has learned.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import platform
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .. import autoencoder, loader, renderer, scenes
from . import precision

BATCH = 32
STEPS = (4000, 3000)  # of each phase
LEARNING_RATE = (2e-3, 1e-3)
NOISE = (0.12, 0.06)  # scale of the noise on unit-variance latents


def _edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.diff(dim=-1), x.diff(dim=-2)


def _loss(decoded: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    edge = sum((a - b).abs().mean() for a, b in zip(_edges(decoded), _edges(picture), strict=True))
    return (decoded - picture).abs().mean() + 0.5 * edge + (decoded - picture).square().mean()


def psnr(model: autoencoder.Autoencoder, picture: torch.Tensor) -> float:
    """Reconstruction PSNR in dB over pictures ``[B, 3, H, W]`` in -1..1, data range 2."""
    with torch.no_grad():
        decoded = model.decode(model.encode(picture)).clamp(-1, 1)
    return 10 * math.log10(4 / (decoded - picture).square().mean().item())


def pictures(count: int, generator: torch.Generator, split: str = "train") -> torch.Tensor:
    """Random scenes ``[count, 3, 64, 64]`` in -1..1."""
    return renderer.render(scenes.draw(count, generator, split).scenes, generator) * 2 - 1


def train(out: pathlib.Path, phase: int, steps: int, seed: int) -> dict[str, Any]:
    """Run one phase, the second on what the first left in ``out``; write ``autoencoder.pt`` and ``autoencoder.json``."""
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = autoencoder.Autoencoder().to(device, memory_format=torch.channels_last)
    norm = nn.BatchNorm2d(autoencoder.LATENT_CHANNELS, affine=False, momentum=0.02).to(device)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    record: dict[str, Any] = {"seed": seed, "batch": BATCH, "hardware": hardware, "torch": str(torch.__version__), "phases": []}
    if phase == 2:
        record = json.loads((out / "autoencoder.json").read_text(encoding="utf-8"))
        model.load_state_dict(torch.load(out / "autoencoder.pt", map_location=device, weights_only=True))
        model.encoder.requires_grad_(False)
        norm.running_mean.copy_(model.mean)
        norm.running_var.copy_(model.std.square())
        norm.eval()
    rate, noise = LEARNING_RATE[phase - 1], NOISE[phase - 1]
    learning = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=rate, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.03)
    generator = torch.Generator().manual_seed(seed + phase)
    check = pictures(128, torch.Generator().manual_seed(seed + 7), "validation").to(device)
    start, history = time.monotonic(), []
    for step in range(1, steps + 1):
        picture = pictures(BATCH, generator).to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision.compute_dtype() == torch.bfloat16):
            latent = norm(model.encoder(picture).float())
            level = noise * torch.randn(BATCH, 1, 1, 1, generator=generator).abs()
            noisy = latent + (level * torch.randn(latent.shape, generator=generator)).to(device)
            raw = noisy * (norm.running_var + norm.eps).sqrt()[:, None, None] + norm.running_mean[:, None, None]
            decoded = model.decoder(raw)
        loss = _loss(decoded.float(), picture)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            history.append({"step": step, "loss": round(loss.item(), 5), "psnr": round(psnr(model, check), 2)})
            print(history[-1], f"{step * BATCH / (time.monotonic() - start):.0f} pictures/s", flush=True)
    if phase == 1:
        with torch.no_grad():
            latent = model.encoder(pictures(2048, generator).to(device))
            model.mean.copy_(latent.mean((0, 2, 3)))
            model.std.copy_(latent.std((0, 2, 3)))
    seconds = round(time.monotonic() - start)
    record["psnr"] = psnr(model, check)
    record["phases"].append({"phase": phase, "steps": steps, "seconds": seconds, "history": history})
    torch.save(model.state_dict(), out / "autoencoder.tmp")
    os.replace(out / "autoencoder.tmp", out / "autoencoder.pt")
    (out / "autoencoder.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return record


def restore(path: pathlib.Path, out: pathlib.Path) -> None:
    """Write what training left behind, ``autoencoder.pt`` and ``autoencoder.json``, from a finished file."""
    metadata, state = loader.read(path)
    out.mkdir(parents=True, exist_ok=True)
    torch.save(state, out / "autoencoder.pt")
    (out / "autoencoder.json").write_text(json.dumps(metadata["training"], indent=1), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--phase", type=int, choices=(1, 2), help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(os.cpu_count() or 1)
    options.out.mkdir(parents=True, exist_ok=True)
    for phase in (options.phase,) if options.phase else (1, 2):
        record = train(options.out, phase, STEPS[phase - 1], options.seed)
        print(f"phase {phase}: {record['psnr']:.2f} dB")


if __name__ == "__main__":
    main()
