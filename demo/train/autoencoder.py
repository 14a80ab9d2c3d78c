"""Train the demo autoencoder: ``python -m demo.train.autoencoder --out FOLDER [--minutes 11]``.

L1 on pixels and on their differences (edges), with batch-normalised latents to which noise is added, so that nearby
latents decode to nearby pictures. The checkpoint holds the weights and the latents' mean and scale per channel.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import time

import torch
from torch import nn

from .. import autoencoder, scenes

BATCH = 32
LEARNING_RATE = 2e-3
NOISE = 0.12  # typical standard deviation of the noise on unit-variance latents


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


def train(out: pathlib.Path, minutes: float, seed: int = 0) -> None:
    """Train for a fixed time and write ``autoencoder.pt`` and ``autoencoder.json`` to ``out``."""
    torch.manual_seed(seed)
    model = autoencoder.Autoencoder().to(memory_format=torch.channels_last)
    norm = nn.BatchNorm2d(autoencoder.LATENT_CHANNELS, affine=False, momentum=0.02)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    generator = torch.Generator().manual_seed(seed + 1)
    held_out = torch.Generator().manual_seed(seed + 2)
    check = scenes.render(scenes.draw(128, held_out, "validation"), held_out) * 2 - 1
    out.mkdir(parents=True, exist_ok=True)
    start, step, history = time.monotonic(), 0, []
    while (share := (time.monotonic() - start) / (60 * minutes)) < 1:
        rate = LEARNING_RATE * min(1, (step + 1) / 100) * (0.02 + 0.98 * math.cos(share * math.pi / 2) ** 2)
        for group in optimiser.param_groups:
            group["lr"] = rate
        picture = scenes.render(scenes.draw(BATCH, generator), generator) * 2 - 1
        picture = picture.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latent = norm(model.encode(picture).float())
            level = NOISE * torch.randn(BATCH, 1, 1, 1, generator=generator).abs()
            noisy = latent + level * torch.randn(latent.shape, generator=generator)
            raw = noisy * (norm.running_var + norm.eps).sqrt()[:, None, None] + norm.running_mean[:, None, None]
            decoded = model.decode(raw)
        loss = _loss(decoded.float(), picture)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 100 == 0:
            history.append({"step": step, "loss": round(loss.item(), 5), "psnr": round(psnr(model, check), 2)})
            print(history[-1], f"{step * BATCH / (time.monotonic() - start):.0f} pictures/s", flush=True)
    with torch.no_grad():
        latent = model.encode(scenes.render(scenes.draw(2048, held_out), held_out) * 2 - 1)
    record = {
        "mean": latent.mean((0, 2, 3)).tolist(),
        "std": latent.std((0, 2, 3)).tolist(),
        "psnr": psnr(model, check),
        "steps": step,
        "batch": BATCH,
        "seed": seed,
        "seconds": round(time.monotonic() - start),
        "history": history,
    }
    torch.save(model.state_dict(), out / "autoencoder.pt")
    (out / "autoencoder.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=11.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.out, options.minutes, options.seed)


if __name__ == "__main__":
    main()
