"""Time of a full run and of an accelerated one, against batch size, steps and tokens."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from demo.bench import methods, runner

BATCHES, STEPS, SCALES = (1, 2, 4, 8), (20, 30, 50, 100), (1.0, 1.5, 2.0)
ROUNDS = 3
KEY = ("model", "method", "setting", "sampler", "batch", "steps", "scale")
"""What tells a row from all others."""


def sweep(batch: int, steps: int) -> Iterator[tuple[int, int, float]]:
    """(batch, steps, scale of the side): one of them at a time, the others as given."""
    yield from ((one, steps, 1.0) for one in BATCHES)
    yield from ((batch, one, 1.0) for one in STEPS if one != steps)
    yield from ((batch, steps, one) for one in SCALES if one != 1)


def measure(options: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """One row for each place of the sweep; the setting is the first that ``--methods`` names, by default ours-auto N=2."""
    from demo.loader import load_demo

    demo = load_demo(name)
    patterns = ["ours-auto"] if options.methods == ["*"] else options.methods
    rows = []
    for batch, steps, scale in sweep(options.batch, options.steps):
        own = {**vars(options), "batch": batch, "steps": steps, "scale": scale, "prompts": ROUNDS * batch}
        bench = runner.Runner(demo, argparse.Namespace(**own))
        found = methods.settings(methods.Case(demo, bench.options), patterns)
        method, setting = next((method, settings[0]) for method, settings in found.items())
        bench.run(0)
        pairs = [(bench.run(number, setting), bench.run(number)) for number in range(ROUNDS)]
        runs, full = (list(part) for part in zip(*pairs, strict=True))
        rows.append({
            "model": name, "method": method, "setting": setting.name, "sampler": options.sampler,
            "batch": batch, "steps": steps, "scale": scale, **runner.cuts(runs, full, bench.shares),
        })
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As a Markdown table."""
    lines = ["| Model | Setting | Batch | Steps | Side | Full, ms | Accelerated, ms | By the clock | Cut | Arithmetic |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['method']} {row['setting']} | {row['batch']} | {row['steps']} | {row['scale']:g}x | "
            f"{row['full_dit_ms']:.0f} | {row['dit_ms']:.0f} | {row['cut_wall']:.1%} | {row['cut']:.1%} | "
            f"{row['cut_arithmetic']:.1%} |"
        )
    return "\n".join(lines)
