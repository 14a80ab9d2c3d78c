"""Measure speed on a demo model: accelerated and full runs paired in one process. ``python dev.py bench`` calls this.

Every round takes another batch of prompts and another seed, and runs each setting right beside a full run of its own, in
turns before and behind it. A DiT time is the sum over the steps of their medians over the rounds, which a hiccup of the
machine does not reach; a cut is 1 - the DiT time of the one / that of the full runs beside it.
Full runs of fewer steps stand in the same table: a cache is worth having only above that line.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import logging
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from demo.architectures import ARCHITECTURES
from demo.hosting import launcher
from demo.loader import MODELS


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to run the model."""

    name: str
    preset: str
    group_size: int
    steps: float = 1.0  # share of the full run's steps


FULL = Setting("full", "custom", 1)
SETTINGS = (
    Setting("paper N=2", "paper", 2), Setting("paper N=3", "paper", 3), Setting("paper N=4", "paper", 4),
    Setting("auto N=2", "auto", 2), Setting("auto N=3", "auto", 3), Setting("auto N=4", "auto", 4),
    Setting("80% of steps", "custom", 1, 0.8), Setting("70% of steps", "custom", 1, 0.7),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 on success."""
    parser = argparse.ArgumentParser(prog="python dev.py bench", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="sd3-mini", help="demo model (default %(default)s)")
    for name, kind in (("steps", int), ("sampler", str), ("scheduler", str), ("cfg", float)):
        parser.add_argument(f"--{name}", type=kind, help="in place of the model's own")
    parser.add_argument("--batch", type=int, default=4, help="pictures per run")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure there")
    options = parser.parse_args(arguments)
    for name, value in ARCHITECTURES[options.model].sampling.items():
        setattr(options, name, getattr(options, name) or value)
    launcher.enter(*(() if torch.cuda.is_available() else ("--cpu",)))
    torch.set_num_threads(options.threads)
    logging.getLogger("blockdance_core").setLevel(logging.WARNING)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    result = measure(options)
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, allow_nan=False), encoding="utf-8")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All runs and their summary, as JSON data."""
    from blockdance_core import metrics
    from blockdance_core.config import Config
    from blockdance_core.host.attach import attach
    from demo.loader import load_demo

    demo = load_demo(options.model)
    runner = _Runner(demo, options)
    models = {
        setting: attach(demo.model, Config(preset=setting.preset, group_size=setting.group_size))
        for setting in (FULL, *SETTINGS)
    }
    runner.latents(demo.model, 0)
    shares = runner.block_shares()
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds):
        row: dict[str, Any] = {}
        for setting in SETTINGS:
            order = (FULL, setting) if number % 2 else (setting, FULL)
            latents = {one: runner.latents(models[one], number, one.steps) for one in order}
            run, full = (_last_run(models[one]) for one in (setting, FULL))
            pictures, reference = (demo.vae.decode(latents[one]).flatten(0, -4) for one in (setting, FULL))
            row[setting.name] = {
                "steps": run["steps"], "reused_steps": run["reused_steps"],
                "dit_ms": run["dit_ms"], "full_dit_ms": full["dit_ms"],
                "cut_arithmetic": 1 - run["steps"] / full["steps"] * (1 - run["cut_arithmetic"]),
                "cut_by_block_time": 1 - run["steps"] / full["steps"] * (1 - _cut_by_block_time(run, shares)),
                "cached_bytes": run["cached_bytes"], "predicted_bytes": run["predicted_bytes"],
                "ssim": metrics.ssim(pictures, reference).tolist(), "psnr": _finite(metrics.psnr(pictures, reference)),
            }
        row["inactive_share"] = runner.own_share(models[FULL], number)
        rounds.append(row)
    return _summary(options, rounds, shares)


def _finite(values: torch.Tensor) -> list[float | None]:
    """Plain numbers; None for the infinite PSNR of equal pictures, which JSON cannot hold."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _last_run(model: Any) -> dict[str, Any]:
    from blockdance_core.host.attach import handle_of

    handle = handle_of(model)
    assert handle is not None
    return handle.runs()[-1]


class _Runner:
    """Runs prompts of the validation split through the host's sampler."""

    def __init__(self, demo: Any, options: argparse.Namespace) -> None:
        self.demo, self.options = demo, options

    def latents(self, model: Any, number: int, share: float = 1.0) -> torch.Tensor:
        import comfy.sample

        from demo.loader import captions, empty_latent

        latent = empty_latent(self.demo.model, self.options.batch)
        noise = comfy.sample.prepare_noise(latent, 1000 + number)
        positive = self.demo.encode(captions(self.options.model, "validation", self.options.batch, number, "hard"))
        options = self.options
        return comfy.sample.sample(
            model, noise, round(share * options.steps), options.cfg, options.sampler, options.scheduler,
            positive, self.demo.encode([""]), latent, disable_pbar=True, seed=number,
        )

    def own_share(self, model: Any, number: int) -> float:
        """Time spent in this pack's own code during a run, as a share of the DiT time; inner calls are taken out."""
        from blockdance_core.host.attach import KEY

        own: list[float] = []
        clone = model.clone()
        for by_key in clone.wrappers.values():
            by_key[KEY] = [functools.partial(_clocked, wrapper, own) for wrapper in by_key.get(KEY, ())]
        self.latents(clone, number)
        return 1e3 * sum(own) / sum(_last_run(clone)["dit_ms"])

    def block_shares(self) -> list[float]:
        """Share of the DiT's time that each block takes, from one full run."""
        from blockdance_core import families

        diffusion_model = self.demo.model.model.diffusion_model
        blocks = [block.module for block in families.find(diffusion_model).blocks]
        spent = dict.fromkeys([diffusion_model, *blocks], 0.0)
        with contextlib.ExitStack() as stack:
            for module in spent:
                stack.enter_context(_timed(module, spent))
            self.latents(self.demo.model, 0)
        return [spent[block] / spent[diffusion_model] for block in blocks]


class _Inner:
    """An executor that adds up the time spent beneath a wrapper."""

    def __init__(self, executor: Any) -> None:
        self.executor, self.class_obj, self.seconds = executor, executor.class_obj, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return self.executor(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - begun


def _clocked(wrapper: Callable[..., Any], own: list[float], executor: Any, *args: Any, **kwargs: Any) -> Any:
    inner = _Inner(executor)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # else reading sigma would wait here for the work of the step before
    begun = time.perf_counter()
    try:
        return wrapper(inner, *args, **kwargs)
    finally:
        own.append(time.perf_counter() - begun - inner.seconds)


@contextlib.contextmanager
def _timed(module: nn.Module, spent: dict[nn.Module, float]) -> Iterator[None]:
    def begin(*_: object) -> None:
        spent[module] -= time.perf_counter()

    def end(*_: object) -> None:
        spent[module] += time.perf_counter()

    hooks = [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _cut_by_block_time(run: dict[str, Any], shares: Sequence[float]) -> float:
    skipped = [sum(shares[: boundary + 1]) for decision, boundary in zip(run["decisions"], run["boundary"], strict=True)
               if decision == "reuse" and boundary is not None]
    return sum(skipped) / max(run["steps"], 1)


def _sum_of_medians(figures: Sequence[dict[str, Any]], name: str) -> float:
    return sum(statistics.median(values) for values in zip(*(one[name] for one in figures), strict=True))


def _summary(options: argparse.Namespace, rounds: list[dict[str, Any]], shares: list[float]) -> dict[str, Any]:
    runs = []
    for setting in SETTINGS:
        of = [row[setting.name] for row in rounds]
        dit_ms, full_ms = _sum_of_medians(of, "dit_ms"), _sum_of_medians(of, "full_dit_ms")
        cut = 1 - dit_ms / full_ms
        similarity = [value for figures in of for value in figures["ssim"]]
        decibel = [value for figures in of for value in figures["psnr"] if value is not None]
        runs.append({
            "setting": setting.name, "preset": setting.preset, "group_size": setting.group_size, "steps": of[0]["steps"],
            "reused_steps": of[0]["reused_steps"], "dit_ms": dit_ms, "full_dit_ms": full_ms,
            "cut": cut, "cut_arithmetic": of[0]["cut_arithmetic"],
            "cut_by_block_time": of[0]["cut_by_block_time"],
            "of_arithmetic": cut / of[0]["cut_arithmetic"] if of[0]["cut_arithmetic"] else None,
            "cached_bytes": of[0]["cached_bytes"], "predicted_bytes": of[0]["predicted_bytes"],
            "ssim": statistics.fmean(similarity), "psnr": statistics.fmean(decibel) if decibel else None,
            "pictures": len(similarity),
        })
    return {
        "command": "python dev.py bench", "model": options.model, "sampler": options.sampler, "scheduler": options.scheduler,
        "cfg": options.cfg, "batch": options.batch, "rounds": len(rounds), "threads": options.threads,
        "device": platform.processor() or platform.machine(), "torch": torch.__version__,
        "baseline": {"steps": options.steps, "dit_ms": statistics.median(run["full_dit_ms"] for run in runs)},
        "runs": runs, "inactive_share": statistics.median(row["inactive_share"] for row in rounds),
        "block_shares": shares, "every_round": rounds,
    }


def table(result: dict[str, Any]) -> str:
    """The summary as text."""
    lines = [
        f"{result['model']}, {result['baseline']['steps']} steps of {result['sampler']}, batch {result['batch']}, medians of "
        f"{result['rounds']} rounds; full run {result['baseline']['dit_ms']:.0f} ms of DiT time",
        f"{'setting':<14}{'reused':>8}{'DiT ms':>9}{'cut':>8}{'arithmetic':>12}{'by block time':>15}{'SSIM':>8}{'PSNR':>7}"
        f"{'stored':>12}{'predicted':>12}",
    ]
    for run in result["runs"]:
        psnr = "equal" if run["psnr"] is None else f"{run['psnr']:.1f}"
        lines.append(
            f"{run['setting']:<14}{run['reused_steps']:>5}/{run['steps']:<2}{run['dit_ms']:>9.0f}{run['cut']:>8.1%}"
            f"{run['cut_arithmetic']:>12.1%}{run['cut_by_block_time']:>15.1%}{run['ssim']:>8.4f}{psnr:>7}"
            f"{run['cached_bytes']:>12}{run['predicted_bytes']:>12}"
        )
    lines.append(f"inactive (N = 1): this pack's own code takes {result['inactive_share']:.2%} of the DiT time")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
