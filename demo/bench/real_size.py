"""Models of real size with random weights: is the measured cut the arithmetic one, and what do memory and time cost?

Random weights draw nothing, so nothing is said of fidelity. Meant for a GPU and bf16; on the CPU the scales make it small.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from demo.bench import rivals, runner
from demo.bench.methods import Setting, attached, planned

ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Size:
    """A model as its release is built.

    Attributes:
        base: Name of the host's class in ``comfy.supported_models``.
        config: Its configuration.
        depths: The configuration's entries that count blocks.
        latent: Shape of one latent, ``(C, H, W)`` or ``(C, F, H, W)``.
        text: Shape of one text, tokens and channels.
        pooled: Channels of the pooled text, if the model takes one.
        batched: Whether it runs with guidance, that is two samples to a call.
        note: What stands for something else.
    """

    base: str
    config: dict[str, Any]
    depths: tuple[str, ...]
    latent: tuple[int, ...]
    text: tuple[int, int]
    pooled: int = 0
    batched: bool = True
    note: str = ""


_PIXART = {
    "patch_size": 2, "in_channels": 4, "hidden_size": 1152, "depth": 28, "num_heads": 16, "caption_channels": 4096,
    "model_max_length": 120, "pred_sigma": True,
}
MODELS = {
    "sd3-medium": Size(
        "SD3",
        {
            "in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 24, "input_size": None, "adm_in_channels": 2048,
            "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
            "num_patches": 36864, "pos_embed_max_size": 192, "num_blocks": 24,
        },
        ("num_blocks",), (16, 128, 128), (154, 4096), 2048,
    ),
    "pixart-alpha": Size("PixArtAlpha", _PIXART | {"micro_condition": True}, ("depth",), (4, 128, 128), (120, 4096)),
    "dit-xl-2": Size(
        "PixArtAlpha", _PIXART | {"micro_condition": False}, ("depth",), (4, 64, 64), (1, 4096),
        note="PixArt's class without micro-conditions and with one text token stands for the class label",
    ),
    "wan-2.1-1.3b": Size(
        "WAN21_T2V",
        {"dim": 1536, "ffn_dim": 8960, "freq_dim": 256, "num_heads": 12, "num_layers": 30, "in_dim": 16, "out_dim": 16,
         "text_dim": 4096, "text_len": 512, "patch_size": [1, 2, 2]},
        ("num_layers",), (16, 21, 60, 104), (512, 4096),
    ),
    "flux": Size(
        "Flux",
        {"in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072,
         "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000,
         "qkv_bias": True, "txt_ids_dims": []},
        ("depth", "depth_single_blocks"), (16, 128, 128), (512, 4096), 768, batched=False,
    ),
}


KEY = ("model", "setting", "compiled", "steps", "tokens_scale", "layers_scale")
"""What tells a row from all others."""


def measure(options: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """One row of a model for each setting and form (eager; on a GPU compiled, too)."""
    if name not in MODELS:
        raise SystemExit(f"Unknown model {name!r}. Known: {', '.join(MODELS)}.")
    size = scaled(MODELS[name], options.tokens_scale, options.layers_scale)
    about = {"model": name, "tokens_scale": options.tokens_scale, "layers_scale": options.layers_scale, "note": size.note}
    return [
        {**about, "compiled": compiled, **row} for compiled in ((False, True) if torch.cuda.is_available() else (False,))
        for row in _rows(size, compiled, (options.steps or [30])[0])
    ]


def scaled(size: Size, tokens: float, layers: float) -> Size:
    """The same model with a smaller picture and fewer blocks; two blocks, and 40 latent pixels, at least."""
    sides = tuple(max(40, round(side * tokens) // 2 * 2) for side in size.latent[-2:])
    depths = {name: max(2, round(size.config[name] * layers)) for name in size.depths}
    return dataclasses.replace(size, config=size.config | depths, latent=(*size.latent[:-2], *sides))


def build(size: Size) -> Any:
    """A MODEL of random weights: bf16 on a GPU, else float32."""
    from comfy import model_management, model_patcher, supported_models

    base = getattr(supported_models, size.base)
    config = base({**base.unet_config, **size.config})
    device = model_management.get_torch_device()
    config.set_inference_dtype(torch.float32 if model_management.is_device_cpu(device) else torch.bfloat16, None)
    model = config.get_model({}, "", device=device)
    torch.manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        parameter.requires_grad_(False).normal_(std=0.02)
    return model_patcher.ModelPatcher(model, device, device)


def _rows(size: Size, compiled: bool, steps: int) -> Iterator[dict[str, Any]]:
    from blockdance_core import families

    model = build(size)
    network = model.model.diffusion_model
    depth = len(families.find(network).blocks)
    if compiled:
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        set_torch_compile_wrapper(model=model, backend="inductor", keys=[
            f"diffusion_model.{part}.{index}" for part, module in network.named_children()
            if isinstance(module, torch.nn.ModuleList) for index in range(len(module))
        ])
    every_other = rivals.uniform(steps, 2, rivals.Reuse(depth - 1, rivals.RESIDUAL))
    settings = (
        Setting("inactive", attached(group_size=1)), Setting("paper N=2", attached(preset="paper", group_size=2)),
        Setting("all blocks N=2", planned(every_other)),
    )
    _sample(size, model, runner.FULL, steps)
    for setting in settings:
        _sample(size, model, setting, steps)  # compiles and allocates
        pairs = [[_sample(size, model, one, steps) for one in (setting, runner.FULL)] for _ in range(ROUNDS)]
        runs, full = zip(*pairs, strict=True)
        ms, full_ms = (statistics.median(one["ms"] for one in part) for part in (runs, full))
        cut, arithmetic = 1 - ms / full_ms, 1 - runs[0]["blocks"] / full[0]["blocks"]
        yield {
            "setting": setting.name, "blocks": depth, "steps": steps, "latent": list(size.latent),
            "dit_ms": ms, "full_dit_ms": full_ms, "cut": cut, "cut_arithmetic": arithmetic,
            "peak_bytes": max(one["peak_bytes"] for one in runs), "full_peak_bytes": max(one["peak_bytes"] for one in full),
        }


def _sample(size: Size, model: Any, setting: Setting, steps: int) -> dict[str, Any]:
    """Time of the model, runs of blocks, and the peak of the GPU's memory, in one run."""
    import comfy.sample

    patched = setting.patch(model).clone()
    draw = torch.Generator().manual_seed(1)
    latent = torch.zeros(1, *size.latent)
    extras = {"pooled_output": torch.randn(1, size.pooled, generator=draw)} if size.pooled else {}
    positive, negative = ([[torch.randn(1, *size.text, generator=draw), extras]] for _ in range(2))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with runner.watched(patched) as calls:
        comfy.sample.sample(
            patched, comfy.sample.prepare_noise(latent, 0), steps, 4.0 if size.batched else 1.0, "euler", "simple",
            positive, negative, latent, disable_pbar=True, seed=0,
        )
    return {
        "ms": sum(call.ms for call in calls), "blocks": sum(sum(call.runs) for call in calls),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As a Markdown table."""
    lines = ["| Model | Form | Setting | Blocks | Full, ms | Accelerated, ms | Cut | Arithmetic | Peak, MiB (full) | Notes |",
             "|" + "---|" * 10]
    for row in rows:
        scaled_down = f"tokens x {row['tokens_scale']:g}, layers x {row['layers_scale']:g}"
        notes = "; ".join(filter(None, [scaled_down if row["tokens_scale"] * row["layers_scale"] != 1 else "", row["note"]]))
        lines.append(
            f"| {row['model']} | {'compiled' if row['compiled'] else 'eager'} | {row['setting']} | {row['blocks']} | "
            f"{row['full_dit_ms']:.0f} | {row['dit_ms']:.0f} | {row['cut']:.1%} | {row['cut_arithmetic']:.1%} | {_peak(row)} | "
            f"{notes} |"
        )
    return "\n".join(lines)


def _peak(row: dict[str, Any]) -> str:
    """The peak of the GPU's memory; a CPU has none."""
    own, full = (row[name] / 2**20 for name in ("peak_bytes", "full_peak_bytes"))
    return f"{own:.0f} ({full:.0f})" if full else "-"
