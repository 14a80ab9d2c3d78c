"""An adaptive policy against the best static schedules, picture by picture, at equal time.

Every test caption is sampled once with each schedule; as a picture does not depend on what is sampled beside it, that tells
what any choice among them would have given. *Static* at the same time is the calibrated level of the same cut, or, between two
levels, drawing one of them by lot. *One for all* is the same with what the network chooses from, where only those count that
none of the others beats on these very captions. Time is reuse steps times what a reuse step takes, measured in the same runs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from demo.bench.figures import RESAMPLES, bootstrap, tenth_gain, worst_tenth
from demo.loader import POLICIES
from demo.prompts import batches


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Rows of the policy's levels, and what it costs to decide."""
    from blockdance_core.config import Config
    from blockdance_core.host.attach import attach
    from blockdance_core.policy import AdaptivePolicy, load
    from demo.loader import load_demo

    policy = load(options.policy or POLICIES / f"{name}-ada.safetensors")
    assert isinstance(policy, AdaptivePolicy)
    options = argparse.Namespace(**{**vars(options), "steps": policy.entry.steps})
    demo = load_demo(name)
    hard = np.array([k % 2 == 1 for k in range(options.prompts)])
    bench = _Sampled(demo, policy, options)
    plans = list(dict.fromkeys((*(policy.plan(one) for one in bench.chosen), *policy.entry.plans)))
    similarity, cuts = bench.sampled(plans)  # [plans, pictures], [plans]
    index = {plan: k for k, plan in enumerate(plans)}
    levels = dict.fromkeys(((None,) * policy.entry.steps, *policy.entry.plans))
    static = sorted((cuts[index[plan]], index[plan]) for plan in levels)
    single = _unbeaten(sorted({(cuts[index[plan]], index[plan]) for plan in map(policy.plan, bench.chosen)}), similarity)
    rows = []
    for level, weight in enumerate(policy.record["tradeoffs"]):
        picked = np.array([index[policy.plan(policy.likeliest(row[level]))] for row in bench.logits])
        cut, own = cuts[picked], similarity[picked, np.arange(options.prompts)]
        other = _static(static, similarity, float(cut.mean()))
        same = _static(single, similarity, float(cut.mean()))
        rows.append({
            "tradeoff": weight, "cut": float(cut.mean()),
            "cut_easy": float(cut[~hard].mean()), "cut_hard": float(cut[hard].mean()), "apart_interval": _apart(cut, hard),
            "plans": len(set(picked.tolist())), "ssim": float(own.mean()), "static": float(other.mean()),
            "gain": float((own - other).mean()), "gain_interval": bootstrap(own - other),
            "alike": float(same.mean()), "alike_gain": float((own - same).mean()), "alike_interval": bootstrap(own - same),
            "tenth": worst_tenth(own.tolist()), "static_tenth": worst_tenth(other.tolist()),
            "tenth_interval": tenth_gain(own, other),
        })
    alone = attach(demo.model, Config(policy=policy))
    decided, full = bench.overhead(alone)
    cost = policy.record["cost"]
    return {
        "model": name, "steps": policy.entry.steps, "sampler": options.sampler, "n": options.prompts, "split": options.split,
        "seed": options.seed, "start": policy.start, "options": policy.choices, "parameters": policy.network.shape.parameters,
        "decision_ms": decided, "full_ms": full, "training": {
            "pictures": policy.record["training_pictures"], "held_out": policy.record["held_out_pictures"],
            "reward": policy.record["reward"], "rollouts": cost["rollouts"],
            "calls": cost["calls"], "minutes": round(cost["seconds"] / 60, 1), "command": policy.record.get("command"),
        }, "rows": rows,
    }


class _Sampled:
    """Test captions, the full runs and what the network says of them."""

    def __init__(self, demo: Any, policy: Any, options: argparse.Namespace) -> None:
        from blockdance_core.host.pictures import Pictures
        from blockdance_core.host.rewards import Similarity
        from blockdance_core.host.training import candidates

        prompts, texts = batches(
            demo, options, options.split, options.prompts, options.batch, options.seed, 1000 * options.seed)
        pictures = Pictures(demo.model, prompts, texts, policy, Similarity(demo.vae), {}, False)
        readings = pictures.with_texts(pictures.readings(policy.network, lambda: None))
        with torch.no_grad():
            rows = [policy.network(one.cells[None], one.places, one.text[None]) for one in readings]
        self.logits = torch.cat(rows).reshape(len(rows), len(policy.cuts), -1)
        self.demo, self.prompts, self.texts, self.reward = demo, prompts, texts, pictures.reward
        self.chosen = candidates(policy)
        self.chosen += [one for row in self.logits for level in row if (one := policy.likeliest(level)) not in self.chosen]
        self.rollouts = [pictures.rollouts_of(k) for k in range(len(prompts))]

    def sampled(self, plans: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """SSIM of every picture with every plan, and the cuts of the plans."""
        decode = self.demo.model.model.process_latent_out
        found, took = np.zeros((len(plans), sum(map(len, self.texts)))), {}
        at = 0
        for rollouts, texts in zip(self.rollouts, self.texts, strict=True):
            full = decode(rollouts.full.result)
            for k, plan in enumerate(plans):
                run = rollouts.run(plan)
                found[k, at : at + len(texts)] = self.reward(decode(run.result), full, texts).numpy()
                for row, ms in zip(plan, run.record["dit_ms"], strict=True):
                    took.setdefault(row and row.boundary, []).append(ms)
            at += len(texts)
        share = {boundary: statistics.median(ms) / statistics.median(took[None]) for boundary, ms in took.items()}
        return found, np.array([1 - sum(share[row and row.boundary] for row in plan) / len(plan) for plan in plans])

    def overhead(self, model: Any) -> tuple[float, float]:
        """Median milliseconds of a decision, and of the model in a full run, of a picture alone."""
        import comfy.sample

        from blockdance_core.config import Config
        from blockdance_core.host.attach import attach, handle_of
        from demo.loader import empty_latent

        first, spent = self.prompts[0], {True: [], False: []}
        full = attach(self.demo.model, Config(enabled=False))
        for number in range(6):
            for adaptive, patched in ((True, model), (False, full)):
                latent = empty_latent(self.demo.model, 1)
                comfy.sample.sample(
                    patched, comfy.sample.prepare_noise(latent, number), first.steps, first.cfg, first.sampler, first.scheduler,
                    self.demo.encode([self.texts[0][0]]), self.demo.encode([""]), latent, disable_pbar=True, seed=number)
                handle = handle_of(patched)
                assert handle is not None
                record = handle.runs()[-1]
                spent[adaptive].append(record["adaptive"]["milliseconds"] if adaptive else sum(record["dit_ms"]))
        return statistics.median(spent[True]), statistics.median(spent[False])


def _static(levels: Sequence[tuple[float, int]], similarity: np.ndarray, cut: float) -> np.ndarray:
    """Expected SSIM of every picture at a cut between two levels, one of which is drawn."""
    cuts = [level for level, _ in levels]
    high = min(max(int(np.searchsorted(cuts, cut)), 1), len(levels) - 1)
    share = np.clip((cut - cuts[high - 1]) / max(cuts[high] - cuts[high - 1], 1e-9), 0, 1)
    below, above = similarity[levels[high - 1][1]], similarity[levels[high][1]]
    mixed: np.ndarray = (1 - share) * below + share * above
    return mixed


def _unbeaten(levels: Sequence[tuple[float, int]], similarity: np.ndarray) -> list[tuple[float, int]]:
    """Those that are more faithful than every one that cuts as much or more."""
    from blockdance_core.calibration import unbeaten

    return unbeaten(levels, lambda level: (level[0], -similarity[level[1]].mean()))


def _apart(cut: np.ndarray, hard: np.ndarray) -> tuple[float, float]:
    """95 % interval of how much more is cut of easy pictures than of hard ones."""
    generator = np.random.default_rng(0)
    easy, other = ([part[generator.integers(len(part), size=len(part))].mean() for _ in range(RESAMPLES // 5)]
                   for part in (cut[~hard], cut[hard]))
    low, high = np.percentile(np.subtract(easy, other), [2.5, 97.5])
    return float(low), float(high)


def table(found: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        "| lambda | cut | easy / hard captions | easy less hard, 95 % | schedules used | SSIM | static | difference, 95 % "
        "| one for all | difference, 95 % | worst tenth | static | difference, 95 % |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        low, high = row["gain_interval"]
        worst_low, worst_high = row["tenth_interval"]
        easy_low, easy_high = row["apart_interval"]
        alike_low, alike_high = row["alike_interval"]
        lines.append(
            f"| {row['tradeoff']:g} | {row['cut']:.1%} | {row['cut_easy']:.1%} / {row['cut_hard']:.1%} | "
            f"{easy_low:+.1%} to {easy_high:+.1%} | {row['plans']} | {row['ssim']:.4f} | "
            f"{row['static']:.4f} | {row['gain']:+.4f} ({low:+.4f} to {high:+.4f}) | "
            f"{row['alike']:.4f} | {row['alike_gain']:+.4f} ({alike_low:+.4f} to {alike_high:+.4f}) | "
            f"{row['tenth']:.4f} | {row['static_tenth']:.4f} | "
            f"{row['tenth'] - row['static_tenth']:+.4f} ({worst_low:+.4f} to {worst_high:+.4f}) |"
        )
    return "\n".join(lines)
