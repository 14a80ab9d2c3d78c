"""Train an adaptive policy on a model: what choices do to pictures is found out by sampling them, see `pictures`.

The network, small as it is, is taught in every process alike. So the result does not depend on the number of processes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blockdance_core import plots
from blockdance_core.config import FEW_STEPS, ConfigError, Policy
from blockdance_core.forecast import FORECASTS
from blockdance_core.host.attach import match_of
from blockdance_core.host.checkpoint import digest, resumed
from blockdance_core.host.pictures import Pictures
from blockdance_core.host.processes import gathered, of_the_first, rank, world
from blockdance_core.host.rewards import Fidelity, Reward
from blockdance_core.host.rollout import Prompt, Rollouts, function_of, levels_of, sigmas_of
from blockdance_core.host.versions import versions
from blockdance_core.policy import AdaptivePolicy, Calibrated, SchedulePolicy, load, save
from blockdance_core.policy.adaptive import Segment, every_step, one_choice, step_at
from blockdance_core.policy.file import require_room
from blockdance_core.policy.network import DecisionNetwork, NetworkShape
from blockdance_core.policy.training import Chosen, Outcome, Reading, Settings, Trainer
from blockdance_core.report import step_medians
from blockdance_core.schedule import Plan, Reuse

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

_SAVED_EVERY = 60.0
"""Seconds between checkpoints while pictures are sampled."""
CHOICES = ("schedules", "steps")
"""What a policy decides: one of the schedules of a calibration; or every step by itself, as published."""
Progress = Callable[[str, int, int, Sequence[dict[str, Any]]], None]
"""Told what is going on, how much of it is done and of how much, and the rows of the curve so far."""


@dataclasses.dataclass(frozen=True)
class Design:
    """What a policy decides, and with what network.

    Attributes:
        choices: See `CHOICES`.
        start: rho, share of the steps that are computed before the decision.
        boundaries: Boundaries of a step decided by itself; none for the base policy's own.
        forecast: What such a step injects, see `FORECASTS`.
        maps: See `NetworkShape`.
        width: Width of the network.
        depth: Its number of blocks.
        heads: Its number of heads.
        share: Whether rollouts share the steps before the decision.
    """

    choices: str = "schedules"
    start: float = 0.1
    boundaries: tuple[int, ...] = ()
    forecast: str = "taylor"
    maps: int = 3
    width: int = 32
    depth: int = 1
    heads: int = 4
    share: bool = True


PUBLISHED = (
    Design(choices="steps", start=0.4, forecast="hold", maps=1, width=1472, depth=3, heads=23),
    Settings(tradeoffs=(2.0,), epochs=100, patience=100, rate=1e-5, baseline=False, exact=False),
)
"""The method as published: cache or reuse for every step, three blocks and an MLP of 0.08 B parameters."""


def designed(
    model: ModelPatcher, prompt: Prompt, base: Policy | None, design: Design, levels: int, seed: int = 0
) -> AdaptivePolicy:
    """An untrained policy for a model and a way of sampling.

    Args:
        model: MODEL.
        prompt: One of those to train on.
        base: Calibrated schedules, for choosing from and for runs in which the network cannot look; None for uniform groups.
        design: What is decided.
        levels: Number of trade-offs.
        seed: Of the network's first weights.

    Raises:
        ConfigError: The base policy is adaptive, for another model, or not calibrated for this sampler and number of steps.
    """
    match = match_of(model)
    family, depth = match.family.name, len(match.blocks)
    levels_passed, sampler = levels_of(model, prompt), function_of(prompt.sampler)
    steps = len(levels_passed) - 1
    if steps <= FEW_STEPS:
        raise ConfigError(f"{steps} steps are too few to decide anything: train with {FEW_STEPS + 1} or more.")
    if base is None:
        boundary = match.family.defaults.boundary(depth)
        ascending = list(itertools.accumulate(levels_passed, max))
        base = _uniform(family, depth, boundary, sampler, prompt.scheduler, ascending)
    if not isinstance(base, SchedulePolicy):
        raise ConfigError(f"The policy {base.name} is an adaptive one itself: give calibrated schedules, or none.")
    base.check(family, depth)
    fitting = [k for k, entry in enumerate(base.entries) if entry.sampler == sampler and entry.same(levels_passed)]
    if not fitting:
        listed = ", ".join(entry.key for entry in base.entries)
        raise ConfigError(f"The policy {base.name} holds no schedule for {steps} steps of {sampler} with "
                          f"{prompt.scheduler}, only for: {listed}. Calibrate it for these first, or train without it.")
    entry = base.entries[fitting[0]]
    start = step_at(entry.steps, design.start)
    if not start < entry.steps - 1:
        raise ConfigError(f"start = {design.start:g} leaves no step to decide: expected a share well below 1.")
    segments = _segments(entry, start, design, base)
    channels = 1 if prompt.latent.is_nested else prompt.latent.shape[1]
    embedding = next((one for one, _ in prompt.positive if one is not None and one.ndim == 3), None)
    shape = NetworkShape(
        channels, 0 if embedding is None else embedding.shape[2],
        levels * sum(len(segment.options) for segment in segments), design.maps, design.width, design.depth, design.heads)
    require_room(shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DecisionNetwork(shape)
    return AdaptivePolicy(base, fitting[0], segments, (0.0,) * levels, network, base.name)


def _segments(entry: Calibrated, start: int, design: Design, base: SchedulePolicy) -> tuple[Segment, ...]:
    if design.choices == "schedules":
        return one_choice(entry, start)
    if design.forecast not in FORECASTS:
        raise ConfigError(f"forecast = {design.forecast!r} is not valid: expected one of {', '.join(FORECASTS)}.")
    if design.choices != "steps":
        raise ConfigError(f"choices = {design.choices!r} is not valid: expected one of {', '.join(CHOICES)}.")
    boundaries = design.boundaries or (() if base.boundary is None else (base.boundary,))
    if any(not 0 <= boundary <= base.depth for boundary in boundaries):
        raise ConfigError(f"boundaries {list(boundaries)} must be 0 to {base.depth - 1}, or {base.depth} for the "
                          f"whole model: it has {base.depth} blocks.")
    return every_step(entry.steps, start, (None, *(Reuse(boundary, FORECASTS[design.forecast]) for boundary in boundaries)))


def _uniform(
    family: str, depth: int, boundary: int, sampler: str, scheduler: str, levels: Sequence[float]
) -> SchedulePolicy:
    """Groups of 2 to 5 steps from two fifths on, for lack of a calibration."""
    steps = len(levels) - 1
    start = step_at(steps, 0.4)
    reuse = Reuse(boundary, FORECASTS["taylor"])
    plans: list[Plan] = [
        tuple(reuse if start <= k < steps - 1 and (k - start) % size else None for k in range(steps)) for size in (2, 3, 4, 5)]
    cuts = [sum(row is not None for row in plan) * (boundary + 1) / depth / steps for plan in plans]
    order = sorted(range(len(plans)), key=cuts.__getitem__)
    entry = Calibrated(sampler, scheduler, tuple(levels), tuple(plans[k] for k in order), tuple(cuts[k] for k in order),
                       (0.0,) * len(plans))
    return SchedulePolicy("uniform groups", family, depth, (entry,))


@torch.inference_mode()
def measured_costs(model: ModelPatcher, prompt: Prompt, boundaries: Sequence[int]) -> dict[int, float]:
    """What a reuse step costs as a share of a computed one; for each boundary a run that reuses every other step is timed."""
    costs = {}
    rollouts = Rollouts(model, prompt)
    for boundary in boundaries:
        plan = [Reuse(boundary, FORECASTS["taylor"]) if 1 < k < rollouts.steps - 1 and k % 2 else None
                for k in range(rollouts.steps)]
        medians = step_medians(rollouts.run(plan).record)
        reuse, compute = medians["reuse"], medians["compute"]
        costs[boundary] = min(reuse / compute, 1.0) if reuse is not None and compute else 1.0
    costs_of_all: dict[int, float] = of_the_first(costs)
    return costs_of_all


def further(like: Prompt, lines: str, clip: Any) -> tuple[list[Prompt], list[str]]:
    """Prompts of one sample, one for each line that is not empty, with seeds of their own.

    Args:
        like: How they are sampled; its negative conditioning and its empty latent serve them, and the numbers that stand in
            its positive one, such as the guidance of Flux.
        lines: The prompts.
        clip: The host's CLIP.

    Returns:
        The prompts, and what they say.

    Raises:
        ValueError: There are lines, and no CLIP.
    """
    texts = [line.strip() for line in lines.splitlines() if line.strip()]
    if texts and clip is None:
        raise ValueError("prompts need a text encoder: connect clip, or leave them empty.")
    single = dataclasses.replace(like, latent=like.latent[:1], batch_index=None,
                                 noise_mask=None if like.noise_mask is None else like.noise_mask[:1])
    numbers = {name: value for name, value in like.positive[0][1].items() if isinstance(value, int | float)}

    def encoded(text: str) -> list[Any]:
        return [[tokens, {**numbers, **more}] for tokens, more in clip.encode_from_tokens_scheduled(clip.tokenize(text))]

    return [
        dataclasses.replace(single, positive=encoded(text), seed=(like.seed + 1 + k) % 2**64)
        for k, text in enumerate(texts)
    ], texts


def parse_tradeoffs(text: str) -> tuple[float, ...]:
    """Numbers with commas between them.

    Raises:
        ValueError: Something in the list is none, or below 0.
    """
    try:
        return Settings(tradeoffs=tuple(float(part) for part in text.replace(",", " ").split())).tradeoffs
    except ValueError:
        raise ValueError(f"tradeoffs {text!r} are no list of numbers from 0 on: expected such as 1, 2, 4.") from None


def candidates(policy: AdaptivePolicy) -> list[Chosen]:
    """The choices that come nearest to the calibrated schedules, and computing everything, without doubles."""
    found = []
    for plan in ((None,) * policy.entry.steps, *policy.entry.plans):
        chosen = []
        for segment in policy.segments:
            wanted = plan[segment.start : segment.stop]
            chosen.append(min(range(len(segment.options)), key=lambda k: _unlike(segment.options[k], wanted)))
        found.append(tuple(chosen))
    return list(dict.fromkeys(found))


def _unlike(one: Plan, other: Plan) -> int:
    """How many rows differ, most of all in whether they reuse, then in their boundaries and forecasts."""
    rows = list(zip(one, other, strict=True))
    both = [(a, b) for a, b in rows if a and b]
    return (10_000 * (len(rows) - len(both) - sum(a is None and b is None for a, b in rows))
            + sum(abs(a.boundary - b.boundary) + (a.forecast != b.forecast) for a, b in both))


@torch.inference_mode(False)  # the host runs its nodes in it, and nothing can be learnt there
def train(
    model: ModelPatcher, prompts: Sequence[Prompt], path: str | os.PathLike[str], base: Policy | None = None,
    design: Design | None = None, settings: Settings | None = None, reward: Reward | None = None,
    texts: Sequence[Sequence[str]] = (), costs: dict[int, float] | None = None, record: dict[str, Any] | None = None,
    progress: Progress = lambda what, done, of, curve: None,
) -> tuple[AdaptivePolicy, dict[str, Any]]:
    """Train a policy and write it. Begun anew after an interruption, it goes on from the checkpoint beside the file.

    Args:
        model: MODEL, as the sampler would get it.
        prompts: What is sampled; all with the same sampler, scheduler and steps, and best with different seeds.
        path: The policy file. Beside it stand a checkpoint while it is trained, and the curve as a picture.
        base: See `designed`.
        design: What is decided.
        settings: How the network is taught.
        reward: Says how good a result is; fidelity to the full run by default.
        texts: See `Pictures`; none where no reward reads them.
        costs: What a reuse step costs at each boundary; measured where not given.
        record: Goes into the file's record, besides what was measured.
        progress: See `Progress`; may raise to interrupt.

    Returns:
        The policy as it is in the file, and its record.

    Raises:
        ConfigError: The parts do not fit together, or the checkpoint is of another training.
    """
    design, settings, reward = design or Design(), settings or Settings(), reward or Fidelity()
    path = Path(path)
    if len(prompts) < 2:
        raise ConfigError(f"{len(prompts)} prompt is too few: one is held out to see when to stop. Give two or more, best "
                          "dozens.")
    if len({(one.sampler, *sigmas_of(model, one)) for one in prompts}) > 1:
        raise ConfigError("The prompts are not sampled alike: all must have the same sampler, scheduler and steps.")
    policy = designed(model, prompts[0], base, design, len(settings.tradeoffs), settings.seed)
    rows = [row for segment in policy.segments for plan in segment.options for row in plan if row]
    boundaries = sorted({row.boundary for row in rows})
    _require_replaceable(path)
    texts = [list(some) for some in texts] or [[""] * prompt.latent.shape[0] for prompt in prompts]
    about = {
        "design": dataclasses.asdict(design), "settings": dataclasses.asdict(settings), "reward": reward.name,
        "prompts": [[prompt.seed, prompt.latent.shape[0], prompt.cfg] for prompt in prompts],
        "options": [len(segment.options) for segment in policy.segments], "trained": policy.entry.key,
        "inputs": digest(model, prompts, texts, policy),
    }
    checkpoint = path.with_name(f"{path.name}.training")
    before = of_the_first(resumed(checkpoint, about) if not rank() else None)
    if isinstance(before, ConfigError):
        raise before
    if before is not None:
        costs = {int(key): value for key, value in before["costs"].items()}
    elif costs is None or not set(boundaries) <= set(costs):
        costs = measured_costs(model, prompts[0], boundaries)
    pictures = Pictures(
        model, prompts, texts, policy, reward, {boundary: costs[boundary] for boundary in boundaries}, design.share)
    if before is not None:
        readings = [Reading(cells, places, None) for cells, places in before["readings"]]
    else:
        looked = itertools.count(1)
        readings = pictures.readings(policy.network, lambda: progress("full runs", next(looked), len(prompts), []))
    work = _Work(pictures, readings, settings, checkpoint, about, progress, before)
    trainer, finished = work.trainer, False
    try:
        if not trainer.curve:
            trainer.begin(candidates(policy))
        while not trainer.over:
            trainer.step()
            progress("passes", trainer.epoch, settings.epochs, trainer.curve)
            work.keep_at_times()
        finished = True
    finally:
        # Of several processes the others know nothing of it: the last checkpoint counts.
        if not finished and trainer.whole and world() == 1:
            work.keep()
    return _written(work, path, about | (record or {}))


class _Work:
    """A training under way, with its checkpoint.

    Attributes:
        pictures: What is sampled.
        trainer: What learns from it.
    """

    def __init__(
        self, pictures: Pictures, readings: Sequence[Reading], settings: Settings, checkpoint: Path, about: dict[str, Any],
        progress: Progress, before: dict[str, Any] | None,
    ) -> None:
        self.pictures, self.checkpoint = pictures, checkpoint
        self._readings, self._about, self._progress = readings, about, progress
        self._spent: dict[str, float] = dict(before["spent"]) if before else {}
        self._begun = self._saved = time.perf_counter()
        self.trainer = Trainer(
            pictures.policy, pictures.with_texts(readings), [prompt for prompt, _ in pictures.of], self._ask, settings)
        if before is None:
            self.keep()
        elif before["trainer"]["curve"]:
            self.trainer.resume(before["trainer"])
        else:
            self.trainer.recall(before["trainer"]["known"])

    def cost(self) -> dict[str, float]:
        """Rollouts, calls of the model and seconds so far, of all processes and all beginnings."""
        own = {"rollouts": self.pictures.rollouts, "calls": self.pictures.calls}
        total = {name: sum(one[name] for one in gathered({rank(): own}).values()) for name in own}
        total["seconds"] = time.perf_counter() - self._begun
        return {name: round(value + self._spent.get(name, 0), 1) for name, value in total.items()}

    def keep(self) -> None:
        """Replace the checkpoint in one move."""
        spent = self.cost()
        if rank():
            return
        written = self.checkpoint.with_name(f"{self.checkpoint.name}.tmp")
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save({
                "about": json.dumps(self._about), "spent": spent, "trainer": self.trainer.state(),
                "costs": {str(key): value for key, value in self.pictures.costs.items()},
                "readings": [[reading.cells, reading.places] for reading in self._readings],
            }, written)
            os.replace(written, self.checkpoint)
        finally:
            written.unlink(missing_ok=True)  # of a disk that was full

    def keep_at_times(self) -> None:
        """The same, but not too often."""
        if of_the_first(time.perf_counter() - self._saved > _SAVED_EVERY):
            self.keep()
            self._saved = time.perf_counter()

    def _ask(self, pairs: Sequence[tuple[int, Chosen]]) -> Sequence[Outcome]:
        def done(found: dict[tuple[int, Chosen], Outcome]) -> None:
            known = self.trainer.known
            known.update(found)
            self._progress("pictures", sum(pair in known for pair in pairs), len(pairs), self.trainer.curve)
            self.keep_at_times()

        return self.pictures.ask(pairs, done)


def _written(work: _Work, path: Path, about: dict[str, Any]) -> tuple[AdaptivePolicy, dict[str, Any]]:
    trainer, pictures, cost = work.trainer, work.pictures, work.cost()
    alike, best = trainer.alike(), trainer.best_row
    policy, order = trainer.finished()
    record = about | {
        "pictures": len(pictures.of), "training_pictures": len(trainer.training), "held_out_pictures": len(trainer.held),
        "costs": {str(key): round(value, 4) for key, value in pictures.costs.items()}, "cost": cost, "processes": world(),
        "threads": torch.get_num_threads(), "device_hours": round(cost["seconds"] * world() / 3600, 4),
        "device": str(pictures.model.load_device), "passes": trainer.epoch, "best_pass": best["epoch"],
        "tradeoffs": [trainer.settings.tradeoffs[level] for level in order],
        "held_out": [best["held_out"][level] for level in order],
        "held_out_alike": [alike[level] for level in order] if alike else [],
        "parameters": policy.network.shape.parameters, "versions": versions(), "curve": _thinned(trainer.curve),
    }
    policy = dataclasses.replace(policy, name=path.stem, record=record)
    if rank() == 0:
        save(policy, path)
        plots.curve(trainer.curve).save(path.with_suffix(".png"))
        work.checkpoint.unlink(missing_ok=True)
    of_the_first(None)  # nobody goes on before the file is there
    return policy, record


def _require_replaceable(path: Path) -> None:
    """A training replaces what a training made, nothing else."""
    if os.path.lexists(path) and not isinstance(load(path), AdaptivePolicy):
        raise ConfigError(f"The file {path} holds calibrated schedules, which would be lost: choose another name.")


def _thinned(curve: Sequence[dict[str, Any]], most: int = 100) -> list[dict[str, Any]]:
    every = -(-len(curve) // most)
    return [
        {key: value if key == "epoch" else [round(one, 5) for one in value] for key, value in row.items()}
        for row in curve[:: max(every, 1)]]
