"""What the parts of the training of an adaptive policy are worth: the same training without each of them.

Every option is sampled once on every picture. On these outcomes networks are taught in several ways, each with several seeds,
and judged on other captions by what they were taught: the reward (C + lambda Q) / (1 + lambda), mean over the levels and seeds.
Differences to the training as shipped are paired by picture.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from demo import calibrate
from demo.bench.figures import bootstrap
from demo.loader import POLICIES
from demo.prompts import batches

TAIL = "0.75"
"""A boundary with a tail of live blocks behind it, as a share of the depth."""
SEEDS = 3
_NOISE = 4_000_000
"""Captions and noise to train on, of neither the calibration nor the shipped policies."""


class Variant(NamedTuple):
    """One way to train.

    Attributes:
        part: What is changed.
        title: To what.
        start: rho, share of the steps.
        tail: Whether schedules with a tail of live blocks are offered, too.
        settings: Of the training, in place of the default.
        latent: Whether the network sees the latent.
        text: Whether it sees the text.
    """

    part: str
    title: str
    start: float = 0.1
    tail: bool = False
    settings: tuple[tuple[str, Any], ...] = ()
    latent: bool = True
    text: bool = True


VARIANTS = (
    Variant("as shipped", "exact gradient, rho = 0.1, the schedules as calibrated, sees latent and text"),
    Variant("gradient", "drawn, with the group's mean as baseline", settings=(("exact", False),)),
    Variant("baseline", "drawn, without a baseline, as published", settings=(("exact", False), ("baseline", False))),
    Variant("boundary", f"schedules with every boundary at {TAIL} of the depth offered, too", tail=True),
    Variant("rho", "0.2", start=0.2),
    Variant("rho", "0.4, as published", start=0.4),
    Variant("sight", "the latent alone", text=False),
    Variant("sight", "the text alone", latent=False),
)
ALIKE = Variant("sight", "nothing: for each level the schedule that is best for all training pictures")


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """A row for each variant, and what sharing the first steps saves."""
    from demo.loader import load_demo

    work = _Work(load_demo(name), options, name)
    first = work.judged(VARIANTS[0])
    rows = [_row(VARIANTS[0], first, first), _row(ALIKE, work.alike(VARIANTS[0]), first)]
    rows += [_row(variant, work.judged(variant), first) for variant in VARIANTS[1:]]
    return {
        "model": name, "steps": options.steps, "sampler": options.sampler, "n": options.prompts, "split": options.split,
        "seed": options.seed, "pictures": options.train, "seeds": SEEDS, "rows": rows,
        "sharing": [work.sharing(start) for start in dict.fromkeys(variant.start for variant in VARIANTS)],
    }


def _row(variant: Variant, own: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Reward, cut and SSIM of a variant, [pictures, 3], and its reward beside that of another."""
    gain = own[:, 0] - other[:, 0]
    reward, cut, ssim = own.mean(0).tolist()
    return {
        "part": variant.part, "variant": variant.title, "reward": reward, "cut": cut, "ssim": ssim, "gain": float(gain.mean()),
        "gain_interval": bootstrap(gain),
    }


class _Work:
    """A model, the schedules to choose from, and what was sampled so far."""

    def __init__(self, demo: Any, options: argparse.Namespace, name: str) -> None:
        from blockdance_core.host.rewards import Similarity
        from blockdance_core.host.training import measured_costs
        from blockdance_core.policy import load

        shipped: Any = load(options.policy or POLICIES / f"{name}-ada.safetensors")
        self.demo, self.reward = demo, Similarity(demo.vae)
        self.options = argparse.Namespace(**{**vars(options), "steps": shipped.entry.steps})
        self.prompts = {train: self._prompts(train) for train in (True, False)}
        self.tradeoffs = tuple(shipped.record["settings"]["tradeoffs"])
        self.base = shipped.base
        self.both = self.base.extended(_joined(shipped.entry, _with_tail(name, shipped, options.threads)))
        boundaries = {row.boundary for entry in self.both.entries for plan in entry.plans for row in plan if row}
        self.costs = measured_costs(demo.model, self.prompts[True][0][0], sorted(boundaries))
        self._sampled: dict[tuple[float, bool], tuple[list[Any], list[int], dict[tuple[int, Any], Any]]] = {}

    def _prompts(self, train: bool) -> tuple[list[Any], list[list[str]]]:
        options = self.options
        split, count, seed, noise = (
            ("train", options.train, _NOISE, _NOISE) if train else
            (options.split, options.prompts, options.seed, 1000 * options.seed))
        return batches(self.demo, options, split, count, options.batch, seed, noise)

    def _policy(self, variant: Variant, seed: int = 0) -> Any:
        """Untrained."""
        from blockdance_core.host.training import Design, designed

        return designed(self.demo.model, self.prompts[True][0][0], self.both if variant.tail else self.base,
                        Design(start=variant.start), len(self.tradeoffs), seed)

    def sampled(self, start: float, train: bool) -> tuple[list[Any], list[int], dict[tuple[int, Any], Any]]:
        """What the network reads of each picture, the prompt it belongs to, and what every plan does to it."""
        if (start, train) not in self._sampled:
            tail = any(variant.tail for variant in VARIANTS if variant.start == start)
            policy = self._policy(Variant("", "", start=start, tail=tail))
            pictures = self._pictures(policy, train)
            readings = pictures.with_texts(pictures.readings(policy.network, lambda: None))
            pairs = [(picture, chosen) for picture in range(len(readings)) for chosen in _choices(policy)]
            with tqdm(desc=f"{'training' if train else 'test'} pictures, rho = {start:g}", total=len(pairs)) as bar:
                outcomes = pictures.ask(pairs, lambda found: bar.update(len(found)))
            known = {(picture, policy.plan(chosen)): one for (picture, chosen), one in zip(pairs, outcomes, strict=True)}
            self._sampled[start, train] = readings, [prompt for prompt, _ in pictures.of], known
        return self._sampled[start, train]

    def _pictures(self, policy: Any, train: bool, share: bool = True, count: int | None = None) -> Any:
        from blockdance_core.host.pictures import Pictures

        prompts, texts = self.prompts[train]
        return Pictures(self.demo.model, prompts[:count], texts[:count], policy, self.reward, self.costs, share)

    def _trainer(self, variant: Variant, seed: int) -> Any:
        """Taught by what was sampled."""
        from blockdance_core.policy.training import Settings, Trainer

        readings, prompts, known = self.sampled(variant.start, True)
        policy = self._policy(variant, seed)
        return Trainer(
            policy, [_seen(one, variant) for one in readings], prompts,
            lambda pairs: [known[picture, policy.plan(chosen)] for picture, chosen in pairs],
            Settings(tradeoffs=self.tradeoffs, seed=seed, **dict(variant.settings)))

    def judged(self, variant: Variant) -> np.ndarray:
        """Reward, cut and SSIM of every test picture, mean over levels and seeds: [pictures, 3]."""
        tests, _, outcomes = self.sampled(variant.start, False)
        found = []
        for seed in range(SEEDS):
            trainer = self._trainer(variant, seed)
            trainer.begin(_choices(trainer.policy))
            while not trainer.over:
                trainer.step()
            policy, order = trainer.finished()
            with torch.no_grad():
                logits = torch.cat([policy.network(one.cells[None], one.places, one.text[None])
                                    for one in (_seen(one, variant) for one in tests)])
            chosen = [[policy.plan(policy.likeliest(row)) for row in of] for of in logits.unflatten(1, (len(order), -1))]
            found.append(self._scores([[outcomes[k, plan] for plan in of] for k, of in enumerate(chosen)], order))
        return np.mean(found, 0)

    def alike(self, variant: Variant) -> np.ndarray:
        """The same of the one schedule for each level that is best for all pictures that a network is taught with."""
        tests, _, outcomes = self.sampled(variant.start, False)
        found = []
        for seed in range(SEEDS):
            trainer = self._trainer(variant, seed)
            quality, cut = torch.tensor([
                trainer.outcomes([(picture, chosen) for picture in trainer.training]) for chosen in trainer.all]).mean(1).T
            best = [trainer.policy.plan(trainer.all[int((cut + weight * quality).argmax())]) for weight in self.tradeoffs]
            found.append(self._scores(
                [[outcomes[k, plan] for plan in best] for k in range(len(tests))], range(len(self.tradeoffs))))
        return np.mean(found, 0)

    def _scores(self, outcomes: Sequence[Sequence[Any]], order: Sequence[int]) -> np.ndarray:
        quality, cut = np.moveaxis(np.array(outcomes), 2, 0)  # [pictures, levels]
        weights = np.array([self.tradeoffs[level] for level in order])
        return np.stack([((cut + weights * quality) / (1 + weights)).mean(1), cut.mean(1), quality.mean(1)], 1)

    def sharing(self, start: float) -> dict[str, Any]:
        """Calls of the model that all options of one batch take, with the first steps shared and without."""
        found: dict[str, Any] = {"start": start}
        policy = self._policy(Variant("", "", start=start))
        pairs, outcomes = [(0, chosen) for chosen in _choices(policy)], []
        for share, name in ((True, "shared"), (False, "alone")):
            pictures = self._pictures(policy, True, share, 1)
            pictures.rollouts_of(0)
            full = pictures.calls
            outcomes.append(np.array(pictures.ask(pairs, lambda known: None)))
            found[f"{name}_calls"] = pictures.calls - full
        return found | {"apart": float(np.abs(outcomes[0] - outcomes[1]).max()), "rollouts": len(pairs)}


def _with_tail(name: str, shipped: Any, threads: int) -> Any:
    """A calibration like that of a shipped policy, but with a boundary that leaves a tail of live blocks."""
    from blockdance_core.policy import load

    entry, made = shipped.entry, load(POLICIES / f"{name}.safetensors").record["calibrations"][shipped.entry.key]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tail.safetensors"
        with contextlib.redirect_stdout(io.StringIO()):
            calibrate.main([
                "--model", name, "--steps", str(entry.steps), "--boundaries", TAIL, "--prompts", str(made["prompts"]),
                "--checks", str(made["checks"]), "--threads", str(threads), "--out", str(path)])
        return next(one for one in load(path).entries if one.key == entry.key)


def _joined(one: Any, other: Any) -> Any:
    """The plans of two calibrations of the same sampler and steps, by their cuts."""
    rows = sorted(zip((*one.cuts, *other.cuts), (*one.losses, *other.losses), (*one.plans, *other.plans), strict=True),
                  key=lambda row: row[0])
    cuts, losses, plans = zip(*rows, strict=True)
    return dataclasses.replace(one, cuts=cuts, losses=losses, plans=plans)


def _choices(policy: Any) -> list[tuple[int, ...]]:
    """All that a policy of one segment may choose."""
    return [(k,) for k in range(policy.choices)]


def _seen(reading: Any, variant: Variant) -> Any:
    """What is left of a reading."""
    return reading._replace(cells=reading.cells * variant.latent, text=reading.text * variant.text)


def table(found: dict[str, Any]) -> str:
    """As Markdown."""
    lines = ["| Part | Training | Reward | Cut | SSIM | Difference of the reward, 95 % |", "|---|---|---|---|---|---|"]
    for row in found["rows"]:
        low, high = row["gain_interval"]
        gain = "-" if row is found["rows"][0] else f"{row['gain']:+.4f} ({low:+.4f} to {high:+.4f})"
        figures = f"{row['reward']:.4f} | {row['cut']:.1%} | {row['ssim']:.4f}"
        lines.append(f"| {row['part']} | {row['variant']} | {figures} | {gain} |")
    return "\n".join(lines)
