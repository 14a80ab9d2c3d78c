"""Numbers of a finished run: what the report node, the events and the console line say."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from blockdance_core.config import Config
from blockdance_core.model_state import Choice, ModelState
from blockdance_core.schedule import CACHE, REUSE, Schedule
from blockdance_core.session import Session

SCHEMA_VERSION = 1


def run_record(session: Session, *, completed: bool = True) -> dict[str, Any]:
    """The figures of one run as plain JSON data.

    Args:
        session: The run, after its last step. Waits for the GPU to read the timing events.
        completed: False for a run that was interrupted or failed.

    Returns:
        `schema_version`, `completed`, `steps`, `sigmas`, `evaluations`, `window`, `decisions`, `boundary`, `blocks_total`,
        `blocks_run` (per run of the model, mean over a step), `block_runs` and `block_runs_full` (of the whole run, and of one
        that skips none), `calls`, `reused_steps`, `reused_calls`, `fallbacks`,
        `dit_ms`, `cached_bytes` (peak), `predicted_bytes`, `cut_arithmetic`, `model_family`, `warnings`, `config`, and
        `adaptive`: null, or what an adaptive policy decided: `step`, `milliseconds`, the `decisions` that it wants for every
        sample (a letter a step: C computes, R reuses), and for every part of the batch that went on by itself its `samples`
        and `decisions`. Runs of blocks and of the model count with the share of the batch that was in them.
    """
    steps = len(session.figures)
    state: ModelState | None = next(iter(session.models.values()), None)
    decisions = [session.decision(step) for step in range(steps)]
    shown = max(state.parts, key=lambda part: part.schedule.cut(len(part.blocks))) if state and state.parts else state
    depth = len(state.blocks) if state else 0
    blocks_run = [_plain(figures.blocks / figures.passes) if figures.passes else 0 for figures in session.figures]
    block_runs, full = (_plain(sum(getattr(figures, name) for figures in session.figures)) for name in ("blocks", "depth"))
    return {
        "schema_version": SCHEMA_VERSION,
        "completed": completed,
        "steps": steps,
        "sigmas": [sigma if math.isfinite(sigma) else None for sigma in session.sigmas],
        "evaluations": session.evaluations,
        "window": _window(shown.schedule.window if shown else (), steps),
        "decisions": decisions,
        "boundary": [
            shown.schedule.steps[step].boundary if shown and decision != "compute" and shown.active else None
            for step, decision in enumerate(decisions)
        ],
        "blocks_total": depth,
        "blocks_run": blocks_run,
        "calls": [figures.calls for figures in session.figures],
        "reused_steps": decisions.count(REUSE),
        "reused_calls": sum(figures.reused for figures in session.figures),
        "fallbacks": dict(session.fallbacks),
        "dit_ms": [round(value, 3) for value in session.stopwatch.milliseconds(steps)],
        "cached_bytes": sum(model.peak_bytes for model in session.models.values()),
        "predicted_bytes": sum(model.predicted_bytes for model in session.models.values()),
        "block_runs": block_runs,
        "block_runs_full": full,
        "cut_arithmetic": _cut(block_runs, full),
        "model_family": state.family.name if state else None,
        "adaptive": _adaptive(session.choice),
        "warnings": list(session.warnings),
        "config": (state.effective.as_dict() if state else {}) | {"enabled": session.config.enabled},
    }


def empty_record(reason: str) -> dict[str, Any]:
    """The record of a model that was not run, or not accelerated, with the reason as its warning."""
    return run_record(Session(Config(), (), ()), completed=False) | {"warnings": [reason], "config": {}}


def report(runs: Sequence[dict[str, Any]], reason: str) -> dict[str, Any]:
    """The whole report: the last run's keys at the top level, every run under `runs`, their sums under `totals`.

    Args:
        runs: Records of finished runs, oldest first.
        reason: Why there is none, if there is none.
    """
    last = runs[-1] if runs else empty_record(reason)
    return last | {"runs": list(runs), "totals": totals(runs)}


def totals(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums over several runs, such as the tiles of an upscale.

    Returns:
        `runs`, `steps`, `reused_steps`, `calls`, `reused_calls`, `dit_ms`, `cut_arithmetic`, `fallbacks`.
    """
    fallbacks: Counter[str] = Counter()
    for run in runs:
        fallbacks.update(run["fallbacks"])
    block_runs, full = (sum(run[name] for run in runs) for name in ("block_runs", "block_runs_full"))
    return {
        "runs": len(runs),
        "steps": sum(run["steps"] for run in runs),
        "reused_steps": sum(run["reused_steps"] for run in runs),
        "calls": sum(sum(run["calls"]) for run in runs),
        "reused_calls": sum(run["reused_calls"] for run in runs),
        "dit_ms": round(sum(sum(run["dit_ms"]) for run in runs), 3),
        "cut_arithmetic": _cut(block_runs, full),
        "fallbacks": dict(fallbacks),
    }


def summary(run: dict[str, Any]) -> str:
    """One line for the console and the sampler's progress text."""
    if not run["steps"]:
        return f"BlockDance: {'; '.join(run['warnings']) or 'no steps'}"
    parts = [f"{run['model_family'] or 'model not accelerated'}", run["window"]["text"],
             f"{run['reused_steps']} reused"]
    mixed = run["decisions"].count("mixed")
    parts += [f"{mixed} in part"] if mixed else []
    medians = step_medians(run)
    if medians["reuse"] is not None and medians["compute"] is not None:
        parts.append(f"compute {medians['compute']:.4g} ms, reuse {medians['reuse']:.4g} ms per step")
    if run["fallbacks"]:
        parts.append("computed instead: " + "; ".join(f"{reason} ({count})" for reason, count in run["fallbacks"].items()))
    return "BlockDance: " + ", ".join(parts + run["warnings"])


def step_medians(run: dict[str, Any]) -> dict[str, float | None]:
    """Median measured milliseconds of the computed and of the reused steps of a run; None where there is none."""
    timed = list(zip(run["decisions"], run["dit_ms"], strict=True))
    groups = {"compute": [ms for decision, ms in timed if decision in ("compute", CACHE) and ms > 0],
              "reuse": [ms for decision, ms in timed if decision == REUSE]}
    return {name: statistics.median(values) if values else None for name, values in groups.items()}


def _window(inside: Sequence[int], steps: int) -> dict[str, Any]:
    return {
        "first": inside[0] if inside else None, "last": inside[-1] if inside else None,
        "covered": len(inside), "steps": steps, "text": f"window covers {len(inside)} of {steps} steps",
    }


def _cut(block_runs: float, full: float) -> float:
    """Share of the runs of blocks that were saved. Where none ran at all, they were not seen: nothing is known."""
    return round(1 - block_runs / full, 4) if block_runs and full else 0.0


def _adaptive(choice: Choice | None) -> dict[str, Any] | None:
    if choice is None:
        return None
    return {
        "step": choice.step, "milliseconds": round(choice.milliseconds, 3),
        "decisions": [_letters(schedule) for schedule in choice.wanted],
        "parts": [{"samples": list(samples), "decisions": _letters(schedule)} for samples, schedule in choice.parts],
    }


def _letters(schedule: Schedule) -> str:
    return "".join("R" if step.decision == REUSE else "C" for step in schedule.steps)


def _plain(value: float) -> float:
    value = round(value, 2)
    return int(value) if value == int(value) else value
