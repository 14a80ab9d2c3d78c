"""Turn a training run into the files in ``demo/models``: weights in bfloat16 with the training record as metadata, and the
loss curve.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import safetensors
import safetensors.torch
import torch

from .. import architectures, autoencoder, loader, renderer, scenes


def rgb_factors(architecture: architectures.Architecture, network: autoencoder.Autoencoder) -> tuple[Any, Any]:
    """Least-squares map from latents to small RGB pictures in -1..1, for the host's previews."""
    generator = torch.Generator().manual_seed(7)
    picture = renderer.render(scenes.draw(256, generator).scenes, generator, architecture.size) * 2 - 1
    with torch.no_grad():
        latent = network.encode(picture)[:, None]
    packed = architecture.pack(latent)
    packed = packed[:, :, 0] if architecture.moving else packed
    small = torch.nn.functional.avg_pool2d(picture, architecture.downscale)
    x = packed.permute(0, 2, 3, 1).flatten(0, 2)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    solution = torch.linalg.lstsq(x, small.permute(0, 2, 3, 1).flatten(0, 2)).solution
    return solution[:-1].tolist(), solution[-1].tolist()


def export(name: str, run: pathlib.Path, first: pathlib.Path, folder: pathlib.Path = loader.FOLDER) -> None:
    """Write a model, the autoencoder and the loss curve.

    Args:
        name: One of ``ARCHITECTURES``.
        run: What ``demo.train.diffusion`` wrote.
        first: What ``demo.train.autoencoder`` wrote.
        folder: Where the files go.
    """
    architecture = architectures.ARCHITECTURES[name]
    checkpoint = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    network = autoencoder.Autoencoder()
    network.load_state_dict(torch.load(first / "autoencoder.pt", map_location="cpu", weights_only=True))
    record, log = checkpoint["record"], checkpoint["log"]
    if record["encoder"] != network.fingerprint():
        raise SystemExit(f"{run} was trained on another autoencoder than the one in {first}.")
    folder.mkdir(parents=True, exist_ok=True)
    others = [path for path in folder.glob("*.safetensors") if path.stem not in (name, loader.AUTOENCODER)]
    _check_encoder(others, network.fingerprint())
    _write_autoencoder(network, json.loads((first / "autoencoder.json").read_text(encoding="utf-8")), folder)
    factors, bias = rgb_factors(architecture, network)
    parameters = dict(zip(checkpoint["names"], checkpoint["ema"], strict=True)) | checkpoint["buffers"]
    state, prefixes = {}, {"model": loader.MODEL_PREFIX, "text": loader.TEXT_PREFIX}
    for key, value in parameters.items():
        part, rest = key.split(".", 1)
        state[prefixes[part] + rest] = value
    metadata = {
        "name": name,
        "class": f"{architecture.module}.{architecture.cls}",
        "unet_config": architecture.unet_config,
        "sampling_settings": architecture.sampling_settings,
        "objective": architecture.objective,
        "vocabulary": list(scenes.VOCABULARY),
        "encoder": record["encoder"],
        "rgb_factors": factors,
        "rgb_bias": bias,
        "parameters": sum(v.numel() for v in state.values()),
        "training": {
            **{key: value for key, value in record.items() if key not in ("name", "encoder")},
            "steps": record["steps"] + record.get("before", {}).get("steps", 0),
            "samples": log[-1]["samples"],
            "seconds": log[-1]["seconds"],
            "final_validation_loss": log[-1]["validation"],
            "hardware": checkpoint["hardware"],
            "torch": checkpoint["torch"],
            "precision": checkpoint.get("precision", "bfloat16"),
        },
    }
    _write(folder / f"{name}.safetensors", state, metadata)
    _plot(log, folder / f"{name}-loss.png")


def _check_encoder(models: Sequence[pathlib.Path], fingerprint: str) -> None:
    """Refuse to replace the autoencoder that other models were trained on."""
    for path in models:
        with safetensors.safe_open(path, framework="pt") as file:
            if json.loads(file.metadata()["encoder"]) != fingerprint:
                raise SystemExit(f"{path} needs another autoencoder. Move it away, or export to another folder.")


def _write_autoencoder(network: autoencoder.Autoencoder, record: dict[str, Any], folder: pathlib.Path) -> None:
    training = {key: value for key, value in record.items() if key != "phases"}
    training["phases"] = [{key: phase[key] for key in ("phase", "steps", "seconds")} for phase in record["phases"]]
    metadata = {"encoder": network.fingerprint(), "training": training}
    _write(folder / f"{loader.AUTOENCODER}.safetensors", network.state_dict(), metadata)


def _write(path: pathlib.Path, state: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    state = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in state.items()}
    metadata = {"schema_version": loader.SCHEMA_VERSION, **metadata}
    safetensors.torch.save_file(state, path, {key: json.dumps(value) for key, value in metadata.items()})


def _plot(log: list[dict[str, float]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    samples = [row["samples"] / 1000 for row in log]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(samples, [row["loss"] for row in log], label="training (mean since the last point)")
    axes.plot(samples, [row["validation"] for row in log], label="validation captions, averaged weights")
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=architectures.ARCHITECTURES)
    parser.add_argument("--run", type=pathlib.Path, required=True)
    parser.add_argument("--autoencoder", type=pathlib.Path, required=True)
    parser.add_argument("--to", type=pathlib.Path, default=loader.FOLDER)
    options = parser.parse_args(arguments)
    export(options.name, options.run, options.autoencoder, options.to)


if __name__ == "__main__":
    main()
