"""Sample prompts with one method after the other, and measure: time, block runs, fidelity to the full run.

Time is what passes inside the host's call of the model, with the wrappers of a method at or below that level; a call that
never comes takes none. A hiccup of the machine must not decide: each call counts with the median time of all calls of its
kind, that is of as many samples and as many block runs. Every run has full runs before and behind it, and only those
count for its cut: a machine that gets slower or faster in the meantime does not matter.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from demo import prompts
from demo.architectures import ARCHITECTURES
from demo.bench.figures import PSNR_CAP, bootstrap, worst_tenth
from demo.bench.methods import Setting

KEY = "blockdance_bench"
CONDITIONS = ("scheduler", "cfg", "split", "difficulty", "seed", "batch")
"""Options that every point says, besides its steps, sampler, threads and number of prompts."""
FULL = Setting("full")


@dataclasses.dataclass
class Call:
    """One call of the model: its rows, how often each block ran, the milliseconds it took, and whether the model ran at all."""

    rows: int
    runs: list[int]
    ms: float
    ran: bool = True

    @property
    def kind(self) -> tuple[int, int]:
        """Calls of one kind do the same work."""
        return self.rows, sum(self.runs)


@dataclasses.dataclass
class Run:
    """One sampling run.

    Attributes:
        latents: Its result [B, C, ...].
        calls: Calls of the model.
        record: Our own record, where our engine ran.
        stored: Bytes that another method stored, where it says so.
    """

    latents: Tensor
    calls: list[Call]
    record: dict[str, Any] | None
    stored: int | None = None


@dataclasses.dataclass
class Full:
    """What the runs of one batch of prompts are compared with: the full run's latents and pictures."""

    latents: Tensor
    pictures: Tensor


class Runner:
    """Runs the same batches of prompts again and again.

    Args:
        demo: The demo model.
        options: ``steps`` (of the full run), ``sampler``, ``scheduler``, ``cfg``, ``prompts``, ``batch``, ``split``,
            ``difficulty``, ``seed``, ``pair`` and ``scale`` (side of the latents, times the model's own).
    """

    def __init__(self, demo: Any, options: argparse.Namespace) -> None:
        from blockdance_core import families

        self.demo, self.options = demo, options
        lines = prompts.texts(demo.name, options.split, options.prompts, options.seed, options.difficulty)
        self.batches = [lines[start : start + options.batch] for start in range(0, len(lines), options.batch)]
        self.diffusion_model: nn.Module = demo.model.model.diffusion_model
        self.blocks = [block.module for block in families.find(self.diffusion_model).blocks]
        self.references: dict[int, Full] = {}

    def run(self, number: int, setting: Setting = FULL) -> Run:
        """Sample batch `number`."""
        import comfy.sample

        from blockdance_core.host.attach import handle_of
        from demo.loader import empty_latent

        options, batch = self.options, self.batches[number]
        latent = empty_latent(self.demo.model, len(batch))
        if options.scale != 1:
            patch = ARCHITECTURES[self.demo.name].unet_config["patch_size"]
            unit = patch if isinstance(patch, int) else patch[-1]
            side = [unit * round(options.scale * length / unit) for length in latent.shape[-2:]]
            latent = latent.new_zeros(*latent.shape[:-2], *side)
        noise = comfy.sample.prepare_noise(latent, 1000 * options.seed + number)
        model = setting.patch(self.demo.model).clone()
        with watched(model) as calls:
            latents = comfy.sample.sample(
                model, noise, round(setting.share * options.steps), options.cfg, setting.sampler or options.sampler,
                options.scheduler, self.demo.encode(batch), self.demo.encode([""]), latent, disable_pbar=True, seed=number,
            )
        handle = handle_of(model)
        return Run(latents, calls, handle.runs()[-1] if handle else None, setting.stored() if setting.stored else None)

    def points(self, settings: Sequence[Setting]) -> Iterator[dict[str, Any]]:
        """Measure the settings of one method side by side with the full run; one point each, in order."""
        found: dict[str, list[Run]] = defaultdict(list)
        beside: dict[str, list[Run]] = defaultdict(list)
        figures: dict[str, list[tuple[Tensor, ...]]] = defaultdict(list)
        for number in range(len(self.batches)):
            full = self.run(number)
            for start in range(0, len(settings), self.options.pair):
                between = settings[start : start + self.options.pair]
                before = full
                for setting in between:
                    run = self.run(number, setting)
                    found[setting.name].append(run)
                    figures[setting.name].append(self._fidelity(number, run.latents))
                full = self.run(number)
                for setting in between:
                    beside[setting.name] += before, full
        for setting in settings:
            similarity, decibel, distance = (
                [round(value, 5) for value in torch.cat(part).tolist()]
                for part in zip(*figures[setting.name], strict=True)
            )
            yield {
                "setting": setting.name, "steps": self.options.steps, "sampler": self.options.sampler,
                **{name: getattr(self.options, name) for name in CONDITIONS}, "threads": torch.get_num_threads(),
                **cuts(found[setting.name], beside[setting.name], self.shares), **_stored(found[setting.name]),
                "ssim": statistics.fmean(similarity), "ssim_interval": bootstrap(similarity),
                "ssim_p10": worst_tenth(similarity), "psnr": statistics.fmean(decibel),
                "latent_l2": statistics.fmean(distance), "n": len(similarity),
                "prompt_ssim": similarity, "prompt_psnr": decibel,
            }

    def _fidelity(self, number: int, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from blockdance_core import metrics

        if number not in self.references:
            reference = self.run(number).latents
            self.references[number] = Full(reference, self._pictures(reference))
        full, pictures = self.references[number], self._pictures(latents)
        similarity, decibel = (
            measure(pictures.flatten(0, 1), full.pictures.flatten(0, 1)).clamp(max=PSNR_CAP).unflatten(0, pictures.shape[:2])
            for measure in (metrics.ssim, metrics.psnr)
        )
        off = (latents - full.latents).double().flatten(1).norm(dim=1) / full.latents.double().flatten(1).norm(dim=1)
        return similarity.mean(1), decibel.mean(1), off

    def _pictures(self, latents: Tensor) -> Tensor:
        """Decoded, [B, F, H, W, C]; F = 1 for pictures."""
        pictures: Tensor = self.demo.vae.decode(latents)
        return pictures if pictures.ndim == 5 else pictures[:, None]

    @functools.cached_property
    def shares(self) -> list[float]:
        """Share of the model's time that each block takes, from one full run behind another that warms up."""
        self.run(0)
        spent = [0.0] * len(self.blocks)
        with contextlib.ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.enter_context(_spent(block, spent, index))
            calls = self.run(0).calls
        return [1e3 * seconds / sum(call.ms for call in calls) for seconds in spent]

    def own_share(self, **settings: Any) -> float:
        """Time spent in this pack's own wrappers in a run with these settings, as a share of the model's in a full run.

        What hooks inside the model do is not in it: nothing where the whole model is reused, or nothing at all.
        """
        from blockdance_core.config import Config
        from blockdance_core.host import attach

        own: list[float] = []

        def patch(model: Any) -> Any:
            clone = attach.attach(model, Config(**settings))
            for by_key in clone.wrappers.values():
                by_key[attach.KEY] = [functools.partial(_own_time, one, own) for one in by_key.get(attach.KEY, ())]
            return clone

        shares = []
        for number in range(len(self.batches)):
            full = sum(call.ms for call in self.run(number).calls)
            own.clear()
            self.run(number, Setting("own", patch))
            shares.append(1e3 * sum(own) / full)
        return statistics.median(shares)

    def guard_share(self) -> float:
        """Time spent in the guard in a run with `near-lossless`, as a share of the time of the model in a full run."""
        from blockdance_core.config import Config
        from blockdance_core.guard import Guard
        from blockdance_core.host import attach

        shares = []
        for number in range(len(self.batches)):
            full = sum(call.ms for call in self.run(number).calls)
            with _spent_in(Guard, "observe") as own:
                self.run(number, Setting("guard", lambda model: attach.attach(model, Config(quality="near-lossless"))))
            shares.append(1e3 * sum(own) / full)
        return statistics.median(shares)


def cuts(runs: Sequence[Run], full: Sequence[Run], shares: Sequence[float]) -> dict[str, float]:
    """Cuts of the model's time, with the mean milliseconds of a run and of a full one.

    Returns:
        `cut`: block runs, counted in the blocks, times the measured time of a block, and runs of the model times what one
        takes beside them; `cut_wall`: by the clock, with the method's own code, and with all that went on beside it on the
        machine; `cut_arithmetic`: by the block runs alone.
    """
    ms, full_ms = mean_ms(runs), mean_ms(full)
    depth = len(shares)
    ran, all_ran = (
        [sum(call.runs[i] for run in part for call in run.calls) / len(part) for i in range(depth)] for part in (runs, full)
    )
    calls, all_calls = (sum(call.ran for run in part for call in run.calls) / len(part) for part in (runs, full))
    beside = (1 - sum(shares)) * calls / all_calls  # what the model spends outside the blocks
    weighted = sum(share * one / whole for share, one, whole in zip(shares, ran, all_ran, strict=True))
    return {
        "cut": 1 - weighted - beside, "cut_wall": 1 - ms / full_ms, "cut_arithmetic": 1 - sum(ran) / sum(all_ran),
        "dit_ms": ms, "full_dit_ms": full_ms,
    }


def mean_ms(runs: Sequence[Run]) -> float:
    """Milliseconds of a run in the mean, each call with the median of its kind."""
    kinds: dict[tuple[int, int], list[float]] = defaultdict(list)
    for run in runs:
        for call in run.calls:
            kinds[call.kind].append(call.ms)
    return sum(len(times) * statistics.median(times) for times in kinds.values()) / len(runs)


def _stored(runs: Sequence[Run]) -> dict[str, Any]:
    records = [run.record for run in runs if run.record]
    if not records:
        return {"stored_bytes": max((run.stored for run in runs if run.stored is not None), default=None)}
    fallbacks: defaultdict[str, int] = defaultdict(int)
    for record in records:
        for reason, count in record["fallbacks"].items():
            fallbacks[reason] += count
    return {
        "stored_bytes": max(record["cached_bytes"] for record in records),
        "predicted_bytes": max(record["predicted_bytes"] for record in records), "fallbacks": dict(fallbacks),
    }


@contextlib.contextmanager
def watched(model: Any) -> Iterator[list[Call]]:
    """Note every call of a MODEL that is sampled inside."""
    from comfy.patcher_extension import WrappersMP

    from blockdance_core import families

    calls: list[Call] = []
    network = model.get_model_object("diffusion_model")
    blocks = [block.module for block in families.find(network).blocks]
    beside = [child for child in network.children() if not isinstance(child, nn.ModuleList)]
    with counted([*blocks, *beside]) as runs:
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, functools.partial(_timed_call, calls, runs, len(blocks)))
        yield calls


@contextlib.contextmanager
def counted(blocks: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Count how often each module runs, in the modules themselves: what is skipped above them is not counted."""
    runs = [0] * len(blocks)

    def counting(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted_forward(*args: Any, **kwargs: Any) -> Any:
            runs[index] += 1
            return forward(*args, **kwargs)

        return counted_forward

    for index, block in enumerate(blocks):
        block.forward = counting(index, block.forward)
    try:
        yield runs
    finally:
        for block in blocks:
            del block.forward


def _timed_call(
    calls: list[Call], runs: list[int], blocks: int, executor: Any, x: Tensor, *args: Any, **kwargs: Any
) -> Any:
    before = list(runs)
    begun = _now()
    result = executor(x, *args, **kwargs)
    ms = 1e3 * (_now() - begun)
    now = [after - earlier for after, earlier in zip(runs, before, strict=True)]
    calls.append(Call(x.shape[0], now[:blocks], ms, any(now)))
    return result


def _now() -> float:
    """Seconds, when everything that was begun is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def _spent(module: nn.Module, spent: list[float], index: int) -> Iterator[None]:
    def begin(*_: object) -> None:
        spent[index] -= _now()

    def end(*_: object) -> None:
        spent[index] += _now()

    hooks = [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _spent_in(of: type, method: str) -> Iterator[list[float]]:
    """The seconds of every call of a method."""
    real, spent = getattr(of, method), []

    def timed(*args: Any, **kwargs: Any) -> Any:
        begun = _now()
        try:
            return real(*args, **kwargs)
        finally:
            spent.append(_now() - begun)

    setattr(of, method, timed)
    try:
        yield spent
    finally:
        setattr(of, method, real)


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


def _own_time(wrapper: Callable[..., Any], own: list[float], executor: Any, *args: Any, **kwargs: Any) -> Any:
    inner = _Inner(executor)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # else reading sigma would wait here for the work of the step before
    begun = time.perf_counter()
    try:
        return wrapper(inner, *args, **kwargs)
    finally:
        own.append(time.perf_counter() - begun - inner.seconds)
