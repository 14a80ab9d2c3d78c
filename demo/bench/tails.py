"""When a tail of live blocks pays: what reuse is expected to lose at a cut, by where it stops.

One batch of captions of the train split is profiled at several boundaries, and the program finds the best schedules for each
of them alone, and for all together. No schedule is run: these are expectations, good for comparing boundaries.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

SHARES = (0.5, 0.75, 1.0)
"""Boundaries as shares of the depth; the whole model comes behind them."""
CUTS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
KEY = ("model", "steps", "sampler", "boundary")
"""What tells a row from all others."""
_SEED = 8_000_000
_NEAR = 0.01


def measure(options: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """One row for each boundary, and one for a free choice among them."""
    from blockdance_core.host.attach import depth_of
    from blockdance_core.host.search import profiled
    from demo.loader import load_demo
    from demo.prompts import batches

    demo = load_demo(name)
    depth = depth_of(demo.model)
    prompt, = batches(demo, options, "train", options.batch, options.batch, _SEED, _SEED)[0]
    boundaries = (*(round(share * depth) - 1 for share in SHARES), depth)
    profile, rollouts = profiled(demo.model, prompt, boundaries)
    variance = float(rollouts.full.result.double().flatten(1).var(1).mean())
    alone = [
        dataclasses.replace(
            profile, boundaries=(boundary,), costs=(profile.costs[v],), grams=profile.grams[[v]], errors=profile.errors[:, [v]])
        for v, boundary in enumerate(boundaries)
    ]
    about = {"model": name, "steps": options.steps, "sampler": options.sampler, "depth": depth, "n": options.batch}
    return [
        {**about, "boundary": boundary, "cost": cost, **_expected(one, variance, depth)}
        for boundary, cost, one in (
            *zip(boundaries, profile.costs, alone, strict=True), (None, None, profile))
    ]


def _expected(profile: Any, variance: float, depth: int) -> dict[str, list[float | None]]:
    """For each cut the error that is expected of the best schedule, in dB, and the share of its reuse steps with a tail."""
    from blockdance_core.calibration import front
    from blockdance_core.host.search import decibel

    loss: list[float | None] = []
    tail: list[float | None] = []
    found = front(profile)
    for cut in CUTS:
        best = next((one for one in found if one.cut >= cut - _NEAR), None)
        rows = [row for row in best.plan if row] if best else []
        loss.append(round(decibel(best.loss / variance), 2) if best else None)
        tail.append(sum(row.boundary < depth - 1 for row in rows) / len(rows) if rows else None)
    return {"expected_db": loss, "tail": tail}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As a Markdown table, and the answer in words."""
    lines = [f"| Model | Reuse steps skip | Their time | {' | '.join(f'{cut:.0%}' for cut in CUTS)} |",
             "|" + "---|" * (3 + len(CUTS))]
    for row in rows:
        boundary, depth = row["boundary"], row["depth"]
        what = {None: "whatever is best", depth: "the whole model"}.get(boundary) or f"{boundary + 1} of {depth} blocks"
        values = (
            "-" if value is None else f"{value:.1f} dB" + (f" ({tail:.0%} with a tail)" if boundary is None else "")
            for value, tail in zip(row["expected_db"], row["tail"], strict=True)
        )
        time = "" if row["cost"] is None else f"{row['cost']:.1%}"
        lines.append(f"| {row['model']}, {row['steps']} steps | {what} | {time} | {' | '.join(values)} |")
    answers = []
    for row in rows:
        if row["boundary"] is None:
            paying = [f"{cut:.0%}" for cut, share in zip(CUTS, row["tail"], strict=True) if share]
            at = f"at cuts of {', '.join(paying)}" if paying else "at none of these cuts"
            answers.append(f"on {row['model']} at {row['steps']} steps a tail of live blocks pays {at}")
    return "\n".join([*lines, "", f"In short: {'; '.join(answers)}."])
