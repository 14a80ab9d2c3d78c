"""Train a demo model, a small diffusion transformer of the host's own class, on the scenes of ``demo.scenes``.

Muon for the blocks' matrices and AdamW for the rest, warmup - stable - decay, 10 % empty captions for guidance,
exponential moving average. Data, noise and dropped captions depend only on the seed, the step and the shard, so a run
that was interrupted continues exactly. ``python dev.py train-demo NAME`` runs the autoencoder, this, the export and the
report one after the other (demo/train/__main__.py).

On CPU use one worker per core: workers meet once a step, threads at every operation.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import os
import pathlib
import platform
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed, nn

from blockdance_core import families

from .. import architectures, autoencoder, loader, renderer, scenes, text
from ..hosting import launcher, server
from . import precision
from .muon import Muon

logger = logging.getLogger(__name__)
os.environ.setdefault("TORCHINDUCTOR_CPP_USE_DECOMPOSE_TANH", "1")  # its own tanh is several times slower

SHARDS = 2  # the batch is drawn in this many parts, whatever the number of workers
ADAM_RATE = 2e-3
WARMUP = 100  # steps
VALIDATION = 4  # half batches
DROP = 0.1  # share of empty captions
EMA = 0.998
SIGMA_MAX = 4.0  # beyond it an error in the noise weighs no more


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    Attributes:
        batch: Samples a step, a multiple of ``SHARDS``.
        steps: Number of steps.
        decay: Share of the steps in which the rate falls to zero.
        ease: Shares of the steps between which a model that shall predict the noise is led there from noise - x0. From
            the start, the strong noise takes all attention of so narrow a network: it learns to silence the captions.
        muon_rate: Full rate of the blocks' matrices: lower where a block's gates begin open.
        text_rate: Rate of all that comes before the captions' way into the blocks, as a share of AdamW's: low where that
            way is a cross-attention alone, else captions are silenced before the blocks have learned to listen.
        opening: Shares of the steps before which all of them, and then every other one, are on brief clips: the first few
            frames alone, as many as one row of tokens holds, and as many more of them. Pictures are learned before long
            motion, at the same cost a step.
        spread: Mean and deviation of log(sigma / (1 - sigma)), where sigma is the share of noise in a training sample.
    """

    batch: int = 64
    steps: int = 3500
    decay: float = 0.35
    ease: tuple[float, float] = (0.0, 0.0)
    muon_rate: float = 0.02
    text_rate: float = 1.0
    opening: tuple[float, float] = (0.0, 0.0)
    spread: tuple[float, float] = (0.0, 1.0)


RECIPES = {
    "sd3-mini": Recipe(steps=4500),
    "pixart-mini": Recipe(steps=6500, ease=(0.3, 0.6), muon_rate=0.01, text_rate=0.1, spread=(0.4, 1.2)),
    "wan-mini": Recipe(batch=32, steps=10000, muon_rate=0.01, text_rate=0.1, opening=(0.25, 0.65), spread=(0.4, 1.0)),
}


_ZERO = {"bias", "adaLN_modulation", "t_block", "time_projection"}  # what begins as zero: by a part of the name,
_LAST = ("final_layer.linear.weight", "head.head.weight")  # by its end,
_OUTPUTS = ("attn.proj.weight", "mlp.fc2.weight", "self_attn.o.weight", "cross_attn.o.weight", "ffn.2.weight")  # if gated
_TEXT = re.compile(r"text\.|model\.(y_embedder|text_embedding|context_embedder)")


class Trainee(nn.Module):
    """The diffusion model and the text encoder, trained together."""

    def __init__(self, architecture: architectures.Architecture) -> None:
        super().__init__()
        self.model = architecture.network()(
            **architecture.unet_config, dtype=torch.float32, device="cpu", operations=nn
        ).eval()  # a host class that drops captions by itself in training must not
        self.text = text.TextEncoder()
        _initialise(self.model)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The model's prediction at x ``[B, C, (F,) H, W]``, host time steps ``[B]``, word ids ``[B, P, A]``."""
        context, pooled = self.text(tokens)
        return self.model(x.to(context.dtype), timestep, context=context, y=pooled)


def _initialise(model: nn.Module) -> None:
    """Xavier matrices; blocks and a last layer that begin as nothing.

    Where a block's gates are a parameter of their own, they begin open and the layers before them at zero: AdamW moves
    such gates too slowly for a short training. Elsewhere a zero matrix makes the gates, from small embeddings of time and text.
    """
    named = dict(model.named_parameters())
    tables = ("scale_shift_table", "modulation")
    gated = tuple(name.removesuffix(table) for table in tables for name in named if name.endswith("." + table))
    for name, parameter in named.items():
        parts = set(name.split("."))
        if parts & {"scale_shift_table", "modulation"}:
            nn.init.zeros_(parameter)
            if parameter.shape[-2] == 6:  # shift, scale and gate of the attention, then of the layer behind it
                parameter.data[..., [2, 5], :] = 1.0
        elif parts & _ZERO or name.endswith(_LAST) or (name.startswith(gated) and name.endswith(_OUTPUTS)):
            nn.init.zeros_(parameter)
        elif parameter.ndim < 2:
            nn.init.ones_(parameter)
        elif not gated and parts & {"t_embedder", "y_embedder"}:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.xavier_uniform_(parameter.flatten(1))


class Data:
    """Latents, word ids and noise for a step, drawn from seed, step and shard alone."""

    def __init__(self, architecture: architectures.Architecture, folder: pathlib.Path, recipe: Recipe, seed: int) -> None:
        self.architecture = architecture
        self.recipe = recipe
        self.seed = seed
        self.rows = architecture.frames // architecture.unet_config["patch_size"][0] if architecture.moving else 1
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.autoencoder = autoencoder.Autoencoder()
        self.autoencoder.load_state_dict(torch.load(folder / "autoencoder.pt", weights_only=True))
        self.autoencoder.to(self.device).eval().requires_grad_(False)

    def __call__(
        self, step: int, shard: int, count: int, split: str = "train", brief: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """x0 ``[B, C, (F,) H, W]``, word ids ``[B, P, A]``, noise like x0, share of noise ``[B]`` in 0..1.

        Brief clips have the frames of one row of tokens, and B is as many times larger as that.
        """
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 64 + shard)
        rows = self.rows if brief else 1
        frames, count = self.architecture.frames // rows, count * rows
        drawn = scenes.draw(count, generator, split, self.architecture.moving)
        clips = renderer.render_clips(drawn.scenes, generator, frames, self.architecture.size).to(self.device) * 2 - 1
        latent = self.autoencoder.encode(clips.flatten(0, 1))
        x0 = self.architecture.pack(latent.unflatten(0, (count, frames))).contiguous()
        tokens = drawn.said.tokens()
        tokens[torch.rand(count, generator=generator) < DROP] = 0
        noise = torch.randn(x0.shape, generator=generator)
        quantile = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        centre, deviation = self.recipe.spread
        sigma = (centre + deviation * torch.special.ndtri(quantile.clamp(1e-4, 1 - 1e-4))).sigmoid()
        return x0, tokens.to(self.device), noise.to(self.device), sigma.to(self.device)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
    """Attention of ``[B, heads, L, D]`` in two products: for so few tokens on a CPU several times faster than the fused one."""
    assert options.get("attn_mask") is None, "the demo models have no masks"
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.float().softmax(-1).to(v.dtype) @ v


def flow_loss(trainee: nn.Module, batch: tuple[torch.Tensor, ...], part: float = 0.0) -> torch.Tensor:
    """Mean squared error of the velocity noise - x0 at x = (1 - s) x0 + s noise; the model is given 1000 s."""
    x0, tokens, noise, share = batch
    mix = share.view(-1, *[1] * (x0.ndim - 1))
    velocity = trainee((1 - mix) * x0 + mix * noise, share * 1000, tokens)
    return (velocity.float() - (noise - x0)).square().mean()


def epsilon_loss(
    trainee: nn.Module, batch: tuple[torch.Tensor, ...], sigmas: torch.Tensor, part: float = 0.0
) -> torch.Tensor:
    """The same error, of the velocity that a predicted noise - part * x0 implies; shares go to the host's nearest sigma."""
    x0, tokens, noise, share = batch
    sigmas = sigmas.to(share.device)
    index = (sigmas.log() - (share / (1 - share)).log()[:, None]).abs().argmin(1)
    sigma = sigmas[index].view(-1, *[1] * (x0.ndim - 1))
    predicted = trainee((x0 + sigma * noise) / (1 + sigma.square()).sqrt(), index.float(), tokens)
    weight = ((1 + sigma) / (1 + part * sigma)).clamp(max=1 + SIGMA_MAX)
    return ((predicted.float() - (noise - part * x0)) * weight).square().mean()


def objective_of(architecture: architectures.Architecture) -> Callable[..., torch.Tensor]:
    """The loss of a model, from the trainee, a batch, and the part of x0 that a predicted noise may still miss."""
    if architecture.objective == "flow":
        return flow_loss
    settings = architecture.sampling_settings
    betas = torch.linspace(settings["linear_start"], settings["linear_end"], settings["timesteps"], dtype=torch.float64)
    kept = (1 - betas).cumprod(0)
    return functools.partial(epsilon_loss, sigmas=((1 - kept) / kept).sqrt().float())


def part_at(share: float, ease: tuple[float, float]) -> float:
    """How much of x0 the target misses after a share of the training: 1, then falling to 0 between the two shares."""
    start, end = ease
    return min(1.0, max(0.0, (end - share) / max(end - start, 1e-9))) if end else 0.0


def rate_at(step: int, steps: int, decay: float) -> float:
    """Share of the full learning rate: linear warmup, flat, linear decay over the last ``decay`` of ``steps``."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (decay * steps))


def brief_at(step: int, steps: int, opening: tuple[float, float]) -> bool:
    """Whether a step is on brief clips: all of them in the opening, then every other one."""
    return step < opening[0] * steps or (step < opening[1] * steps and step % 2 == 1)


class Masters:
    """Parameters in float32. The network computes with copies, whose gradients gather in one flat vector.

    Args:
        network: Becomes of ``compute_dtype()``, but for the modules named in ``exact``.
        exact: Modules that stay float32.
    """

    def __init__(self, network: nn.Module, exact: Sequence[str] = ()) -> None:
        self.names = [name for name, _ in network.named_parameters()]
        values = [p.detach().float() for p in network.parameters()]
        flat = torch.cat([value.flatten() for value in values])
        self.gradient = torch.zeros_like(flat)
        sizes = [value.numel() for value in values]
        pairs = zip(values, flat.split(sizes), self.gradient.split(sizes), strict=True)
        self.parameters: list[nn.Parameter] = []
        for value, part, gradient in pairs:
            parameter = nn.Parameter(part.view(value.shape))
            parameter.grad = gradient.view(value.shape)
            self.parameters.append(parameter)
        network.to(precision.compute_dtype())
        for name in exact:
            network.get_submodule(name).float()
        self.copies = list(network.parameters())

    @torch.no_grad()
    def gather(self) -> None:
        """Add the copies' gradients to the masters' and forget them."""
        torch._foreach_add_([p.grad for p in self.parameters], [p.grad.float() for p in self.copies])
        for copy in self.copies:
            copy.grad = None

    @torch.no_grad()
    def publish(self, values: Sequence[torch.Tensor] | None = None) -> None:
        """Write the masters, or other values, into the copies."""
        torch._foreach_copy_(self.copies, list(values or self.parameters))


class Run:
    """Everything that a checkpoint holds, and the training loop over it."""

    def __init__(self, options: argparse.Namespace, rank: int) -> None:
        self.options = options
        self.rank = rank
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(options.seed)
        architecture, self.recipe = architectures.ARCHITECTURES[options.name], options.recipe
        self.trainee = Trainee(architecture)
        self.before: dict[str, Any] = _begin_with(self.trainee, options.further_from) if options.further_from else {}
        self.trainee.to(self.device)
        self.data = Data(architecture, options.autoencoder, self.recipe, options.seed)
        self.loss = objective_of(architecture)
        self.record = {
            "name": options.name,
            **dataclasses.asdict(self.recipe),
            "seed": options.seed,
            "optimiser": f"Muon ({self.recipe.muon_rate}) for the matrices of the blocks, AdamW ({ADAM_RATE}) for the rest",
            "warmup": WARMUP,
            "dropped_captions": DROP,
            "average": EMA,
            "easy_captions": scenes.EASY,
            "encoder": self.data.autoencoder.fingerprint(),
            **({"before": self.before} if self.before else {}),
        }
        exact = [name for name, module in self.trainee.named_modules() if name.endswith("patch_embedding")]  # as the host wants
        self.masters = Masters(self.trainee, exact)
        self.parameters = self.masters.parameters
        named = zip(self.masters.names, self.parameters, strict=True)
        hidden = [p for n, p in named if "blocks." in n and p.ndim == 2 and not re.search("adaLN|table", n)]
        chosen = {id(p) for p in hidden}
        self.muon = Muon(hidden)
        rest = [(n, p) for n, p in zip(self.masters.names, self.parameters, strict=True) if id(p) not in chosen]
        groups = [
            {"params": [p for n, p in rest if bool(_TEXT.match(n)) == text], "share": self.recipe.text_rate if text else 1.0}
            for text in (False, True)
        ]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.ema = [p.detach().clone() for p in self.parameters]
        self.step, self.samples = 0, self.before.get("samples", 0)
        self.seconds = float(self.before.get("seconds", 0))
        self.log: list[dict[str, float]] = []
        path = options.out / "checkpoint.pt"
        if path.exists():
            self._load(path)

    def _load(self, path: pathlib.Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        before = state["record"]
        different = [f"{key} {before.get(key)} then, {now} now" for key, now in self.record.items() if before.get(key) != now]
        if different:
            listed = "; ".join(different)
            raise SystemExit(f"{path} is of another run: {listed}. Use another folder, or remove this one.")
        torch._foreach_copy_([p.detach() for p in self.parameters], state["parameters"])
        self.masters.publish()
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.ema = [value.detach() for value in state["ema"]]
        self.step, self.samples, self.seconds, self.log = (state[key] for key in ("step", "samples", "seconds", "log"))
        logger.info("resumed at step %d", self.step)

    def save(self) -> None:
        """Replace the checkpoint in one move."""
        out = self.options.out
        machine = torch.cuda.get_device_name() if self.device.type == "cuda" else f"{platform.machine()} CPU"
        state = {
            "record": self.record,
            "hardware": f"{machine}, {self.options.workers} process(es) of {self.options.threads} thread(s)",
            "torch": str(torch.__version__),
            "precision": str(precision.compute_dtype()).removeprefix("torch."),
            "names": self.masters.names,
            "buffers": dict(self.trainee.named_buffers()),
            "parameters": [p.detach() for p in self.parameters],
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "ema": self.ema,
            "step": self.step,
            "samples": self.samples,
            "seconds": self.seconds,
            "log": self.log,
        }
        torch.save(state, out / "checkpoint.tmp")
        os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")

    def train(self, workers: int) -> None:
        """Train to the last step, saving now and then, or until a file named ``stop`` appears in the folder."""
        if self.options.compile and _compiler_works():
            for block in families.find(self.trainee.model).blocks:
                block.module.compile(dynamic=False)
        shards, first = range(self.rank, SHARDS, workers), self.before.get("steps", 0)
        losses: list[float] = []
        begun = time.monotonic() - self.seconds
        while self.step < self.recipe.steps:
            rate = rate_at(self.step, self.recipe.steps, self.recipe.decay)
            brief = brief_at(self.step, self.recipe.steps, self.recipe.opening)
            loss = torch.zeros(())
            for shard in shards:
                batch = self.data(first + self.step, shard, self.recipe.batch // SHARDS, brief=brief)
                error = self._error(batch) / SHARDS
                error.backward()
                self.masters.gather()
                loss += error.detach().cpu()
            gradient, loss_value, stop = self._gather(loss)
            self.muon.step(self.recipe.muon_rate * rate)
            for group in self.adam.param_groups:
                group["lr"] = ADAM_RATE * rate * group["share"]
            self.adam.step()
            self.masters.publish()
            self.masters.gradient.zero_()
            self.step += 1
            self.samples += self.recipe.batch * (self.data.rows if brief else 1)
            with torch.no_grad():
                torch._foreach_lerp_(self.ema, self.parameters, 1 - min(EMA, self.step / (self.step + 10)))
            losses.append(loss_value)
            self.seconds = time.monotonic() - begun
            if self.step % self.options.every == 0 or stop or self.step == self.recipe.steps:
                self._record(rate, losses, gradient)
                losses = []
            if stop:
                return

    def _error(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.loss(self.trainee, batch, part=part_at(self.step / self.recipe.steps, self.recipe.ease))

    def _gather(self, loss: torch.Tensor) -> tuple[float, float, bool]:
        """Average gradients over the workers in place and clip them; norm, loss, and whether to stop."""
        extra = torch.tensor([loss.item(), float((self.options.out / "stop").exists())], device=self.device)
        gradient = self.masters.gradient
        if distributed.is_initialized():
            distributed.all_reduce(gradient)
            distributed.all_reduce(extra)
        norm = gradient.norm().item()
        gradient *= min(1.0, 1.0 / (norm + 1e-6))
        return norm, extra[0].item(), extra[1].item() > 0

    def _record(self, rate: float, losses: list[float], gradient: float) -> None:
        if self.rank != 0:
            return
        self.masters.publish(self.ema)
        shares = range(1000, 1000 + VALIDATION)
        with torch.no_grad():
            parts = [self._error(self.data(0, k, self.recipe.batch // SHARDS, "validation")).item() for k in shares]
        self.masters.publish()
        row = {
            "step": self.step,
            "samples": self.samples,
            "seconds": round(self.seconds),
            "rate": round(rate, 4),
            "loss": round(sum(losses) / len(losses), 5),
            "validation": round(sum(parts) / len(parts), 5),
            "gradient": round(gradient, 4),
        }
        self.log.append(row)
        before = self.log[-2] if len(self.log) > 1 else {"samples": 0, "seconds": 0.0, **self.before}
        logger.info("%s  %.1f samples/s", row, (row["samples"] - before["samples"]) / (self.seconds - before["seconds"]))
        self.save()


def _begin_with(trainee: Trainee, path: pathlib.Path) -> dict[str, Any]:
    """Take the weights of a finished model; returns the record of its training."""
    metadata, state = loader.read(path)
    for module, prefix in ((trainee.model, loader.MODEL_PREFIX), (trainee.text, loader.TEXT_PREFIX)):
        module.load_state_dict(loader.part(state, prefix))
    record: dict[str, Any] = metadata["training"]
    return record


def _compiler_works() -> bool:
    try:
        return bool(torch.compile(torch.add)(torch.ones(2), 1).sum() == 4)
    except Exception as error:  # noqa: BLE001, whatever a machine without a compiler answers
        logger.warning("not compiled, hence slower: %s", error)
        return False


def _worker(rank: int, options: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s")
    launcher.enter("--use-pytorch-cross-attention", *(() if torch.cuda.is_available() else ("--cpu",)))
    import comfy.model_management
    import comfy.ops

    comfy.model_management.in_training = True  # operations that have gradients
    if not torch.cuda.is_available():
        comfy.ops.scaled_dot_product_attention = attention
    torch.set_num_threads(options.threads)
    if options.workers > 1:
        distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{options.port}", rank=rank, world_size=options.workers
        )
    Run(options, rank).train(options.workers)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--autoencoder", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, help="in place of the recipe's")
    parser.add_argument("--further-from", type=pathlib.Path, metavar="FILE", help="begin with the weights of a finished model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=100, help="steps between log rows and checkpoints")
    parser.add_argument("--workers", type=int, default=1 if torch.cuda.is_available() else SHARDS, choices=(1, SHARDS))
    parser.add_argument("--threads", type=int, default=1, help="per worker")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile each block")
    options = parser.parse_args(arguments)
    options.recipe, options.port = RECIPES[options.name], server.take_port(None)
    if options.steps:
        options.recipe = dataclasses.replace(options.recipe, steps=options.steps)
    if options.further_from:  # the beginning is behind it
        options.recipe = dataclasses.replace(options.recipe, ease=(0.0, 0.0), opening=(0.0, options.recipe.opening[1]))
    options.out.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.spawn(_worker, (options,), nprocs=options.workers)  # also one: the host is left as it is here


if __name__ == "__main__":
    main()
