"""Train sd3-mini, a small text-to-image MMDiT of the host's own class, on the scenes of ``demo.scenes``.

Rectified flow in the host's convention (``CONST`` and ``ModelSamplingDiscreteFlow``): x_s = (1 - s) x0 + s noise, the
model is given s * 1000 and predicts noise - x0. Logit-normal s, 10 % empty captions for guidance, Muon for the blocks'
matrices and AdamW for the rest, warmup - stable - decay, exponential moving average. Data, noise and dropped captions
depend only on the seed, the step and the shard, so a run that was interrupted continues exactly.

    export PYTHONPATH=.:$COMFYUI_PATH
    python -m demo.train.autoencoder --out RUN/ae
    python -m demo.train.sd3_mini --out RUN --autoencoder RUN/ae --steps 4000 --decay 0.35   # again to resume
    python -m demo.train.export --run RUN

On CPU use one worker per core: workers meet once a step, threads at every operation.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import pathlib
import sys
import time

import torch
from torch import distributed, nn

from .. import autoencoder, scenes, text
from .muon import Muon

logger = logging.getLogger(__name__)

BATCH = 64
SHARDS = 2  # the batch is drawn in this many parts, whatever the number of workers
MUON_RATE = 0.02
ADAM_RATE = 2e-3
WARMUP = 100  # steps
DROP = 0.1  # share of empty captions
EMA = 0.998
UNET_CONFIG = {
    "in_channels": autoencoder.LATENT_CHANNELS,
    "patch_size": 2,
    "input_size": None,
    "depth": 2,  # the host's width is 64 * depth
    "num_blocks": 16,
    "adm_in_channels": text.WIDTH,
    "context_size": text.WIDTH,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": text.WIDTH, "out_features": 128},
    },
    "qk_norm": "rms",
    "pos_embed_scaling_factor": None,
}


class Trainee(nn.Module):
    """The diffusion model and the text encoder, trained together."""

    def __init__(self) -> None:
        super().__init__()
        from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

        self.model = OpenAISignatureMMDITWrapper(**UNET_CONFIG, dtype=torch.float32, device="cpu", operations=nn)
        self.text = text.TextEncoder()
        _initialise(self.model)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Velocity ``[B, 8, 16, 16]`` at x of the same shape, sigma ``[B]`` in 0..1, token ids ``[B, T]``."""
        context, pooled = self.text(tokens)
        return self.model(x, sigma * 1000, context=context, y=pooled)


def _initialise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "adaLN_modulation" in name or "final_layer.linear" in name:
            nn.init.zeros_(parameter)
        elif ".ln_" in name:
            nn.init.ones_(parameter)
        elif "t_embedder" in name or "y_embedder" in name:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.xavier_uniform_(parameter.flatten(1))


class Data:
    """Latents, token ids and noise for a step, drawn from seed, step and shard alone."""

    def __init__(self, folder: pathlib.Path, seed: int, device: torch.device) -> None:
        self.device = device
        self.seed = seed
        self.autoencoder = autoencoder.Autoencoder()
        self.autoencoder.load_state_dict(torch.load(folder / "autoencoder.pt", weights_only=True))
        self.autoencoder.to(device).eval().requires_grad_(False)
        record = json.loads((folder / "autoencoder.json").read_text(encoding="utf-8"))
        self.mean = torch.tensor(record["mean"], device=device)[:, None, None]
        self.std = torch.tensor(record["std"], device=device)[:, None, None]

    def __call__(self, step: int, shard: int, count: int, split: str = "train") -> tuple[torch.Tensor, ...]:
        """x0 ``[B, 8, 16, 16]``, token ids ``[B, T]``, noise like x0, sigma ``[B]`` in 0..1."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 64 + shard)
        drawn = scenes.draw(count, generator, split)
        picture = scenes.render(drawn, generator).to(self.device) * 2 - 1
        x0 = (self.autoencoder.encode(picture) - self.mean) / self.std
        tokens = drawn.tokens()
        tokens[torch.rand(count, generator=generator) < DROP] = 0
        noise = torch.randn(x0.shape, generator=generator)
        quantile = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        sigma = torch.special.ndtri(quantile.clamp(1e-4, 1 - 1e-4)).sigmoid()
        return x0, tokens.to(self.device), noise.to(self.device), sigma.to(self.device)


def flow_loss(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Mean squared error of the predicted velocity noise - x0."""
    x0, tokens, noise, sigma = batch
    mix = sigma[:, None, None, None]
    with torch.autocast(x0.device.type, torch.bfloat16):
        velocity = model((1 - mix) * x0 + mix * noise, sigma, tokens)
    return (velocity.float() - (noise - x0)).square().mean()


def rate_at(step: int, steps: int, decay: float) -> float:
    """Share of the full learning rate: linear warmup, flat, linear decay over the last ``decay`` of ``steps``."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (decay * steps))


class Run:
    """Everything that a checkpoint holds, and the training loop over it."""

    def __init__(self, options: argparse.Namespace, rank: int) -> None:
        self.options = options
        self.rank = rank
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(options.seed)
        self.trainee = Trainee().to(self.device)
        self.data = Data(options.autoencoder, options.seed, self.device)
        named = list(self.trainee.named_parameters())
        hidden = [p for n, p in named if "joint_blocks" in n and p.ndim == 2 and "adaLN" not in n]
        chosen = {id(p) for p in hidden}
        self.parameters = [p for _, p in named]
        self.muon = Muon(hidden)
        self.adam = torch.optim.AdamW(
            [p for p in self.parameters if id(p) not in chosen], betas=(0.9, 0.98), weight_decay=0.0, foreach=True
        )
        self.ema = [p.detach().clone() for p in self.parameters]
        self.step = 0
        self.seconds = 0.0
        self.log: list[dict[str, float]] = []
        path = options.out / "checkpoint.pt"
        if path.exists():
            self._load(path)

    def _load(self, path: pathlib.Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=False)
        self.trainee.load_state_dict(state["trainee"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.ema = [value.detach() for value in state["ema"]]
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]
        logger.info("resumed at step %d", self.step)

    def save(self) -> None:
        """Write checkpoint and log; the checkpoint is replaced in one move."""
        out = self.options.out
        state = {
            "trainee": self.trainee.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "ema": self.ema,
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
            "options": {"steps": self.options.steps, "decay": self.options.decay, "seed": self.options.seed},
        }
        torch.save(state, out / "checkpoint.tmp")
        os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")
        names = [n for n, _ in self.trainee.named_parameters()]
        torch.save(dict(zip(names, self.ema, strict=True)), out / "ema.pt")
        with open(out / "log.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["step", "samples", "seconds", "rate", "loss", "validation", "gradient"])
            writer.writeheader()
            writer.writerows(self.log)

    def train(self, workers: int) -> None:
        """Train to the last step, saving now and then, or until a file named ``stop`` appears in the folder."""
        if self.options.compile:
            for block in self.trainee.model.joint_blocks:
                block.compile()
        shards = range(self.rank, SHARDS, workers)
        losses: list[float] = []
        begun = time.monotonic() - self.seconds
        while self.step < self.options.steps:
            rate = rate_at(self.step, self.options.steps, self.options.decay)
            loss = torch.zeros(())
            for shard in shards:
                part = flow_loss(self.trainee, self.data(self.step, shard, BATCH // SHARDS)) / SHARDS
                part.backward()
                loss += part.detach().cpu()
            gradient, loss_value, stop = self._gather(loss)
            self.muon.step(MUON_RATE * rate)
            for group in self.adam.param_groups:
                group["lr"] = ADAM_RATE * rate
            self.adam.step()
            self.trainee.zero_grad()
            self.step += 1
            with torch.no_grad():
                torch._foreach_lerp_(self.ema, self.parameters, 1 - min(EMA, self.step / (self.step + 10)))
            losses.append(loss_value)
            self.seconds = time.monotonic() - begun
            if self.step % self.options.every == 0 or stop or self.step == self.options.steps:
                self._record(rate, losses, gradient)
                losses = []
            if stop:
                return

    def _gather(self, loss: torch.Tensor) -> tuple[float, float, bool]:
        """Average gradients over the workers in place and clip them; norm, loss, and whether to stop."""
        extra = torch.tensor([loss.item(), float((self.options.out / "stop").exists())], device=self.device)
        flat = torch.cat([p.grad.flatten() for p in self.parameters] + [extra])
        if distributed.is_initialized():
            distributed.all_reduce(flat)
        sizes = [p.numel() for p in self.parameters]
        norm = flat[:-2].norm().item()
        flat[:-2] *= min(1.0, 1.0 / (norm + 1e-6))
        for parameter, part in zip(self.parameters, flat[:-2].split(sizes), strict=True):
            parameter.grad.copy_(part.view_as(parameter))
        return norm, flat[-2].item(), flat[-1].item() > 0

    def _record(self, rate: float, losses: list[float], gradient: float) -> None:
        if self.rank != 0:
            return
        kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.ema)
            validation = flow_loss(self.trainee, self.data(0, 63, 128, "validation")).item()
            torch._foreach_copy_(self.parameters, kept)
        row = {
            "step": self.step,
            "samples": self.step * BATCH,
            "seconds": round(self.seconds),
            "rate": round(rate, 4),
            "loss": round(sum(losses) / len(losses), 5),
            "validation": round(validation, 5),
            "gradient": round(gradient, 4),
        }
        self.log.append(row)
        logger.info("%s  %.1f samples/s", row, len(losses) * BATCH / (self.seconds - self._previous()))
        self.save()

    def _previous(self) -> float:
        return self.log[-2]["seconds"] if len(self.log) > 1 else 0.0


def _worker(rank: int, options: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s")
    sys.argv = [sys.argv[0], "--use-pytorch-cross-attention"] + ([] if torch.cuda.is_available() else ["--cpu"])
    import comfy.options

    comfy.options.enable_args_parsing()
    torch.set_num_threads(options.threads)
    if options.workers > 1:
        distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{options.port}", rank=rank, world_size=options.workers
        )
    Run(options, rank).train(options.workers)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--autoencoder", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--decay", type=float, default=0.3, help="share of the steps in which the rate falls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=100, help="steps between log rows and checkpoints")
    parser.add_argument("--workers", type=int, default=1 if torch.cuda.is_available() else SHARDS, choices=(1, SHARDS))
    parser.add_argument("--port", type=int, default=29511, help="where the workers meet")
    parser.add_argument("--threads", type=int, default=1, help="per worker")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.workers == 1:
        _worker(0, options)
    else:
        torch.multiprocessing.spawn(_worker, (options,), nprocs=options.workers)


if __name__ == "__main__":
    main()
