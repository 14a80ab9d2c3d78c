"""What is compared: for each method its settings, and for each setting how to patch a MODEL."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import inspect
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from blockdance_core.schedule import Plan, Reuse
from demo.bench import rivals
from demo.loader import POLICIES
from demo.prompts import batches

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2)
MULTISTEP = ("dpmpp_2m", "uni_pc", "res_multistep")
GROUP_SIZES = (2, 3, 4)
INTERVALS = (2, 3, 4, 5, 6)
HOST_THRESHOLDS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
TEACACHE_THRESHOLDS = (0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 1.4)
FIRST_BLOCK_THRESHOLDS = (0.015, 0.03, 0.045, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5)
MAGCACHE_THRESHOLDS = (0.06, 0.12, 0.24, 0.5, 1.0)
MAGCACHE_SKIPS = (1, 2, 3, 5)
_MAGCACHE_SEED = 9_000_000

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a method is asked to speed up.

    Attributes:
        demo: Demo model.
        options: ``steps`` of the full run, ``sampler``, ``scheduler`` and ``cfg``.
    """

    demo: Any
    options: argparse.Namespace

    @property
    def steps(self) -> int:
        """Steps of the full run."""
        return int(self.options.steps)

    @property
    def blocks(self) -> tuple[Any, ...]:
        """The model's blocks, as our engine sees them."""
        from blockdance_core.host.attach import match_of

        return match_of(self.demo.model).blocks


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to sample: a point of the benchmark.

    Attributes:
        name: What is set, for example `N=2`.
        patch: MODEL to patched MODEL.
        share: Steps taken, as a share of the full run's.
        sampler: In place of the full run's.
        stored: Bytes that the last run stored, where the method says so.
    """

    name: str
    patch: Callable[[Any], Any] = lambda model: model
    share: float = 1.0
    sampler: str | None = None
    stored: Callable[[], int] | None = None


Method = Callable[[Case], Iterator[Setting]]


def _preset(name: str) -> Method:
    def method(case: Case) -> Iterator[Setting]:
        for size in GROUP_SIZES:
            yield Setting(f"N={size}", attached(preset=name, group_size=size))

    return method


def calibrated(case: Case) -> Iterator[Setting]:
    """Every level of the model's policy file that was found for this sampler and number of steps."""
    for cut, plan in _levels(case):
        yield Setting(f"cut={cut:.3f}", planned(plan))


def chosen_steps(case: Case) -> Iterator[Setting]:
    """The steps that those levels compute, the last slope held in between: with Euler, fewer steps at chosen levels."""
    for cut, plan in _levels(case):
        held = Reuse(len(case.blocks), rivals.RESIDUAL)
        yield Setting(f"cut={cut:.3f}", planned(tuple(row and held for row in plan)))


def _levels(case: Case) -> Iterator[tuple[float, Plan]]:
    from blockdance_core import policy
    from blockdance_core.host.rollout import function_of

    sampler = function_of(case.options.sampler)
    path = POLICIES / f"{case.demo.name}.safetensors"
    if not path.is_file():
        log.warning("calibrated levels are left out: there is no %s", path)
        return
    for entry in policy.load(path).entries:
        if (entry.sampler, entry.steps) == (sampler, case.steps):
            yield from ((cut, tuple(plan)) for cut, plan in zip(entry.cuts, entry.plans, strict=True))


def guarded(case: Case) -> Iterator[Setting]:
    """The online guard at each quality; but for its tolerances, nothing of it is calibrated."""
    from blockdance_core.config import QUALITIES

    for quality in list(QUALITIES)[1:]:
        yield Setting(quality, attached(quality=quality))


def _fewer(sampler: str | None) -> Method:
    def method(case: Case) -> Iterator[Setting]:
        if sampler != case.options.sampler:
            for share in (*((1.0,) if sampler else ()), *SHARES):
                yield Setting(f"share={share:g}", share=share, sampler=sampler)

    return method


def _host(node: str, dense: bool = False) -> Method:
    """A node of the host's, with its own start and end.

    Its indicator looks at every eighth place of the latent, which on the small latents of the demo is next to nothing;
    `dense` lets it look at all. Two things are done for EasyCache that the host (v0.30.0) does not do: its wrapper around
    the network is run on SD3 and PixArt, too, whose classes ask for none, so that the node has no effect there; and the
    network gets a copy of its input, as the node adds to it in place, and in float32 that is the sampler's own latent.
    """

    def method(case: Case) -> Iterator[Setting]:
        from comfy_extras import nodes_easycache

        def patch(model: Any, threshold: float) -> Any:
            patched = getattr(nodes_easycache, node).execute(model, threshold, 0.15, 0.95, False).args[0]
            if dense:
                patched.model_options["transformer_options"]["easycache"].subsample_factor = 1
            return _network_wrapped(patched)

        for threshold in HOST_THRESHOLDS:
            yield Setting(f"threshold={threshold:g}", lambda model, threshold=threshold: patch(model, threshold))

    return method


def _network_wrapped(model: Any) -> Any:
    """The same MODEL; its network gets a copy of its input, and the wrappers around it where its class asks for none."""
    from comfy import patcher_extension

    network, kind = model.get_model_object("diffusion_model"), patcher_extension.WrappersMP.DIFFUSION_MODEL
    asks = "WrappersMP.DIFFUSION_MODEL" in inspect.getsource(sys.modules[type(network).__module__])
    forward = network.forward

    def wrapped(x: Any, *args: Any, transformer_options: dict[str, Any], **kwargs: Any) -> Any:
        wrappers = [] if asks else patcher_extension.get_all_wrappers(kind, transformer_options)
        executor = patcher_extension.WrapperExecutor.new_class_executor(forward, network, wrappers)
        return executor.execute(x.clone(), *args, transformer_options=transformer_options, **kwargs)

    def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
        network.forward = wrapped
        try:
            return executor(*args, **kwargs)
        finally:
            del network.forward

    model.add_wrapper_with_key(patcher_extension.WrappersMP.APPLY_MODEL, rivals.KEY, call)
    return model


def _plan(make: Callable[..., Any], **more: int) -> Method:
    def method(case: Case) -> Iterator[Setting]:
        for interval in INTERVALS:
            yield Setting(f"N={interval}", planned(make(case.steps, len(case.blocks), interval, **more)))

    return method


def magcache(case: Case) -> Iterator[Setting]:
    """MagCache, its ratios measured in a full run of one caption of the train split; of equal plans the first setting."""
    from blockdance_core.host.profiling import gram
    from blockdance_core.host.rollout import Rollouts

    (prompt,), _ = batches(case.demo, case.options, "train", 1, 1, 0, _MAGCACHE_SEED)
    last = len(case.blocks) - 1
    ratios = rivals.magnitude_ratios(gram(Rollouts(case.demo.model, prompt), [last])[0], case.options.cfg)
    seen = set()
    for threshold, skips in itertools.product(MAGCACHE_THRESHOLDS, MAGCACHE_SKIPS):
        plan = rivals.magcache(ratios, last + 1, threshold, skips)
        if plan not in seen:
            seen.add(plan)
            yield Setting(f"E={threshold:g} K={skips}", planned(plan))


def _indicated(thresholds: Sequence[float], first: bool) -> Method:
    def method(case: Case) -> Iterator[Setting]:
        for threshold in thresholds:
            one = rivals.Indicated(case.blocks, threshold, first)
            yield Setting(f"threshold={threshold:g}", one.patch, stored=lambda one=one: one.stored_bytes)

    return method


def attached(**settings: Any) -> Callable[[Any], Any]:
    """A patch that accelerates with these settings of `Config`."""

    def patch(model: Any) -> Any:
        from blockdance_core.config import Config
        from blockdance_core.host.attach import attach

        return attach(model, Config(**settings))

    return patch


def planned(plan: Any) -> Callable[[Any], Any]:
    """A patch that follows a plan."""
    from blockdance_core.policy import Fixed

    return attached(policy=Fixed(plan))


METHODS: dict[str, Method] = {
    "ours-paper": _preset("paper"),
    "ours-auto": _preset("auto"),
    "ours-calibrated": calibrated,
    "ours-guarded": guarded,
    "fewer-steps": _fewer(None),
    **{f"fewer-steps-{sampler}": _fewer(sampler) for sampler in MULTISTEP},
    "chosen-steps": chosen_steps,
    "easycache": _host("EasyCacheNode"),
    "easycache-dense": _host("EasyCacheNode", dense=True),
    "lazycache": _host("LazyCacheNode"),
    "lazycache-dense": _host("LazyCacheNode", dense=True),
    "fora": _plan(rivals.fora),
    "deepcache": _plan(rivals.deepcache),
    "delta-dit": _plan(rivals.delta_dit),
    "taylorseer-1": _plan(rivals.taylorseer, order=1),
    "taylorseer-2": _plan(rivals.taylorseer, order=2),
    "magcache": magcache,
    "firstblockcache": _indicated(FIRST_BLOCK_THRESHOLDS, first=True),
    "teacache": _indicated(TEACACHE_THRESHOLDS, first=False),
}


def settings(case: Case, patterns: Sequence[str] = ("*",)) -> dict[str, list[Setting]]:
    """The settings of every method, those whose `method` or `method setting` fits one of the name patterns."""

    def wanted(*names: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)

    chosen = {
        name: [setting for setting in method(case) if wanted(name, f"{name} {setting.name}")]
        for name, method in METHODS.items()
        if any(fnmatch.fnmatchcase(name, pattern.split(" ")[0]) for pattern in patterns)
    }
    return {name: found for name, found in chosen.items() if found}


def known(patterns: Sequence[str]) -> None:
    """Refuse name patterns of which one fits no method."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern.split(" ")[0]) for name in METHODS):
            raise SystemExit(f"No method fits {pattern!r}. Known: {', '.join(METHODS)}.")


def whole(patterns: Sequence[str]) -> list[str]:
    """The methods that name patterns want every setting of."""
    return [name for name in METHODS if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
