"""Turn a training run into the files in ``demo/models``: ``python -m demo.train.export --run RUN``.

Writes the weights in bfloat16 with the training record as metadata, and the loss curve. RUN holds what
``demo.train.sd3_mini`` wrote and the autoencoder in ``RUN/ae``.
"""

from __future__ import annotations

import argparse
import csv
import json
import pathlib
import platform
from typing import Any

import safetensors.torch
import torch

from .. import autoencoder, loader, scenes
from . import sd3_mini

SHIFT = 1.0  # of the host's sampling schedule


def rgb_factors(network: autoencoder.Autoencoder, mean: list[float], std: list[float]) -> tuple[Any, Any]:
    """Least-squares map from normalised latents to small RGB pictures in -1..1, for the host's previews."""
    generator = torch.Generator().manual_seed(7)
    picture = scenes.render(scenes.draw(256, generator), generator) * 2 - 1
    with torch.no_grad():
        latent = network.encode(picture)
    latent = (latent - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    small = torch.nn.functional.avg_pool2d(picture, autoencoder.DOWNSCALE)
    x = latent.permute(0, 2, 3, 1).flatten(0, 2)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    solution = torch.linalg.lstsq(x, small.permute(0, 2, 3, 1).flatten(0, 2)).solution
    return solution[:-1].tolist(), solution[-1].tolist()


def export(run: pathlib.Path, path: pathlib.Path) -> None:
    """Write ``path`` and the loss curve beside it."""
    network = autoencoder.Autoencoder()
    network.load_state_dict(torch.load(run / "ae" / "autoencoder.pt", weights_only=True))
    first = json.loads((run / "ae" / "autoencoder.json").read_text(encoding="utf-8"))
    factors, bias = rgb_factors(network, first["mean"], first["std"])
    parameters = torch.load(run / "ema.pt", weights_only=True)
    state = {loader.AUTOENCODER_PREFIX + k: v for k, v in network.state_dict().items()}
    for name, value in parameters.items():
        part, rest = name.split(".", 1)
        state[{"model": loader.MODEL_PREFIX, "text": loader.TEXT_PREFIX}[part] + rest] = value
    state = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in state.items()}
    with open(run / "log.csv", encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    last = log[-1]
    metadata = {
        "schema_version": loader.SCHEMA_VERSION,
        "name": path.stem,
        "class": "comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",
        "unet_config": sd3_mini.UNET_CONFIG,
        "shift": SHIFT,
        "vocabulary": list(scenes.VOCABULARY),
        "latent_format": {"mean": first["mean"], "std": first["std"], "rgb_factors": factors, "rgb_bias": bias},
        "parameters": sum(v.numel() for v in state.values()),
        "training": {
            "steps": int(last["step"]),
            "batch": sd3_mini.BATCH,
            "samples": int(last["samples"]),
            "seconds": float(last["seconds"]),
            "final_validation_loss": float(last["validation"]),
            "seed": 0,
            "hardware": f"{platform.machine()} CPU, {sd3_mini.SHARDS} cores, bfloat16 autocast",
            "torch": torch.__version__,
        },
        "autoencoder_training": {
            **{key: first[key] for key in ("psnr", "batch", "seed")},
            "phases": [{key: phase[key] for key in ("phase", "steps", "seconds")} for phase in first["phases"]],
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(state, path, {k: json.dumps(v) for k, v in metadata.items()})
    _plot(log, path.with_name(f"{path.stem}-loss.png"))


def _plot(log: list[dict[str, str]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    samples = [float(row["samples"]) / 1000 for row in log]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(samples, [float(row["loss"]) for row in log], label="training (mean since the last point)")
    axes.plot(samples, [float(row["validation"]) for row in log], label="validation captions, averaged weights")
    axes.set(
        xlabel="thousand samples",
        ylabel="velocity error, mean square",
        title="training of " + path.stem.removesuffix("-loss"),
        yscale="log",
    )
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=pathlib.Path, required=True)
    parser.add_argument("--to", type=pathlib.Path, default=loader.FOLDER / "sd3-mini.safetensors")
    options = parser.parse_args()
    export(options.run, options.to)


if __name__ == "__main__":
    main()
