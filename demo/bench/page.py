"""docs/benchmarks.md and its plots, made from docs/benchmarks.json alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from demo.architectures import ARCHITECTURES
from demo.bench import latency, real_size
from demo.bench.figures import GOALS, PSNR_CAP, Duel, duel

DOCS = Path(__file__).parents[2] / "docs"
JSON, PAGE = DOCS / "benchmarks.json", DOCS / "benchmarks.md"
UPDATE = "python dev.py bench --report"
OURS = "ours-"
DUELS = (0.15, 0.80)
"""Rival points of a measured cut between these are compared with ours."""
_COLOURS = {"ours-calibrated": "#d55e00", "ours-auto": "#0072b2", "ours-paper": "#009e73", "ours-guarded": "#cc79a7"}

Point = dict[str, Any]


def key(point: Point) -> tuple[Any, ...]:
    """What tells a point from all others."""
    return tuple(point[name] for name in ("model", "steps", "sampler", "method", "setting"))


def save(path: Path, found: dict[str, Any]) -> None:
    """Add to a file of figures: what it holds of other models, methods and sweeps stays; one point a line."""
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    points = {key(point): point for point in (*data.get("points", ()), *found.get("points", ()))}
    models = data.get("models", {}) | found.get("models", {})
    data |= {**found, "models": models, "points": list(points.values())}
    head = json.dumps({name: value for name, value in data.items() if name != "points"}, indent=1, allow_nan=False)
    lines = ",\n".join(json.dumps(point, allow_nan=False) for point in data["points"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-2]},\n "points": [\n{lines}\n]}}\n', encoding="utf-8")


def write() -> None:
    """Write the page and its plots."""
    data = json.loads(JSON.read_text(encoding="utf-8"))
    for points in groups(data):
        plot(points, DOCS / picture(points[0]))
    PAGE.write_text(render(data), encoding="utf-8")


def groups(data: dict[str, Any]) -> list[list[Point]]:
    """The points of each model, number of steps and sampler, sorted by cut."""
    found: dict[tuple[Any, ...], list[Point]] = {}
    for point in sorted(data.get("points", ()), key=lambda point: point["cut"]):
        found.setdefault(key(point)[:3], []).append(point)
    return [found[name] for name in sorted(found)]


def picture(point: Point) -> str:
    """The plot that a point is in, relative to docs/."""
    own = ARCHITECTURES[point["model"]].sampling["sampler"] == point["sampler"]
    return f"images/pareto-{point['model']}-{point['steps']}{'' if own else '-' + point['sampler']}.png"


def ours(points: Sequence[Point]) -> list[Point]:
    """Those of this pack."""
    return [point for point in points if point["method"].startswith(OURS)]


def duels(points: Sequence[Point]) -> list[Duel]:
    """Every rival point inside `DUELS` against ours."""
    mine = ours(points)
    low, high = DUELS
    return [duel(point, mine) for point in points if point not in mine and low <= point["cut"] <= high]


def render(data: dict[str, Any]) -> str:
    """The whole page."""
    return "\n".join([
        "# Benchmarks", "", f"Made by `{UPDATE}` from [benchmarks.json](benchmarks.json).", "",
        *_method(data), *_goals(data), *_summary(data),
        *(line for points in groups(data) for line in _section(points)),
        *_sweeps(data),
    ])


def _method(data: dict[str, Any]) -> Iterator[str]:
    if not data.get("points"):
        return
    place = data["environment"]
    yield "## How it was measured"
    yield ""
    yield f"`{data['command']}`"
    yield ""
    yield (
        f"On {place['device']} with {place['threads']} threads, PyTorch {place['torch']}. Every method ran in one process, "
        f"on the same {place['prompts']} captions of the {place['split']} split ({place['difficulty']} difficulty), in batches "
        f"of {place['batch']}, with the same seeds and noise. *Cut* is 1 - DiT time / DiT time of the full runs beside it: the "
        "time inside the model's call with the method's own code, where each call counts with the median of all calls that do "
        "the same work. *Arithmetic* counts the blocks that ran. SSIM and PSNR compare with the full run of the same seed "
        f"(data range 1, equal pictures count as {PSNR_CAP:g} dB, a clip counts with the mean of its frames); the interval "
        "of the mean SSIM is a bootstrap over prompts (95 %); *worst tenth* is the mean SSIM of the worst 10 % of prompts. "
        "The demo models are small: read this as a comparison of methods, not as a promise for larger models."
    )
    yield ""
    yield (
        "What each rival is, and how it differs from its publication, stands in [rivals.py](../demo/bench/rivals.py) and "
        "[methods.py](../demo/bench/methods.py). `fewer-steps-<sampler>` is another solver of the same equation, compared with "
        "the full run of the model's own sampler; its share 1 shows how far apart the two solvers are."
    )
    yield ""
    for name, about in sorted(data.get("models", {}).items()):
        yield f"With N = 1, this pack's own code takes {about['inactive_share']:.2%} of the DiT time of {name}."
        yield ""


def _goals(data: dict[str, Any]) -> Iterator[str]:
    if not groups(data):
        return
    yield from ("## Goals", "", *_header("Model", "Steps", "Goal", "Fidelity", "Wanted cut", "Best cut of ours", "With", "Met"))
    for points in groups(data):
        for goal in GOALS:
            wanted = goal.cuts.get(points[0]["steps"])
            if wanted is None:
                continue
            best = goal.best(ours(points))
            fidelity = f"SSIM >= {goal.ssim:g}" + (f", PSNR >= {goal.psnr:g} dB" if goal.psnr else "")
            reached = f"{best['cut']:.1%} | {_name(best)}" if best else "none | -"
            met = "met" if best and best["cut"] >= wanted else "not met"
            yield f"| {_of(points)} | {goal.name} | {fidelity} | {wanted:.0%} | {reached} | {met} |"
    yield ""


def _summary(data: dict[str, Any]) -> Iterator[str]:
    if not groups(data):
        return
    yield from ("## Ours against every rival", "")
    yield (
        f"At every rival point of a cut between {DUELS[0]:.0%} and {DUELS[1]:.0%}: our most faithful point of at least that "
        "cut (within 0.5 points), and the paired difference of the mean SSIM. A win or a loss is one whose 95 % interval, by "
        "10,000 bootstrap resamples over prompts, leaves out 0. Our point is chosen on the same prompts."
    )
    yield ""
    yield from _header("Model", "Steps", "Rival", "Wins", "Ties", "Losses", "Out of reach", "Worst tenth no lower")
    lost = []
    for points in groups(data):
        found = duels(points)
        for rival in sorted({one.rival["method"] for one in found}):
            of = [one for one in found if one.rival["method"] == rival]
            count = Counter(one.outcome for one in of)
            reached = [(one.ours, one.rival) for one in of if one.ours]
            better = sum(mine["ssim_p10"] >= other["ssim_p10"] for mine, other in reached)
            outcomes = " | ".join(str(count[name]) for name in ("win", "tie", "loss", "out of reach"))
            yield f"| {_of(points)} | {rival} | {outcomes} | {better} of {len(reached)} |"
        lost += [one for one in found if one.outcome in ("loss", "out of reach")]
    yield from ("", "Losses, and what is out of reach:", "")
    for one in lost:
        where = f"{_of([one.rival]).replace(' | ', ', ')} steps: {_name(one.rival)}"
        figures = f"cut {one.rival['cut']:.1%}, SSIM {one.rival['ssim']:.4f}"
        against = (
            f"{_name(one.ours)} (cut {one.ours['cut']:.1%}, SSIM {one.ours['ssim']:.4f}), "
            f"difference {one.difference:+.4f} ({one.low:+.4f} to {one.high:+.4f})"
        ) if one.ours else "no point of ours cuts as much"
        yield f"- {where} ({figures}): {against}"
    yield from (() if lost else ("None.",))
    yield ""


def _section(points: Sequence[Point]) -> Iterator[str]:
    first = points[0]
    title = f"{first['model']}, {first['steps']} steps of {first['sampler']}"
    yield from (f"## {title}", "", f"![Cut and SSIM of every method: {title}]({picture(first)})", "")
    yield from _header(
        "Method", "Setting", "Cut", "Arithmetic", "By block time", "SSIM", "95 %", "Worst tenth", "PSNR, dB", "Latent L2",
        "Stored, KiB", "Computed instead",
    )
    for point in points:
        low, high = point["ssim_interval"]
        stored = "-" if point.get("stored_bytes") is None else f"{point['stored_bytes'] / 1024:.0f}"
        name = f"**{point['method']}**" if point["method"].startswith(OURS) else point["method"]
        yield (
            f"| {name} | {point['setting']} | {point['cut']:.1%} | {point['cut_arithmetic']:.1%} | "
            f"{point['cut_by_block_time']:.1%} | {point['ssim']:.4f} | {low:.4f} to {high:.4f} | {point['ssim_p10']:.4f} | "
            f"{point['psnr']:.1f} | {point['latent_l2']:.4f} | {stored} | {sum(point.get('fallbacks', {}).values())} |"
        )
    yield ""


def _sweeps(data: dict[str, Any]) -> Iterator[str]:
    for name, title, table in (
        ("latency", "DiT time against batch, steps and tokens", latency.table),
        ("real_size", "Models of real size, random weights", real_size.table),
    ):
        if name in data:
            sweep = data[name]
            source = f"`{sweep['command']}` on {sweep['environment']['device']}, {sweep['environment']['threads']} threads."
            yield from (f"## {title}", "", source, "", table(sweep["rows"]), "")


def _header(*names: str) -> tuple[str, str]:
    return f"| {' | '.join(names)} |", "|" + "---|" * len(names)


def _of(points: Sequence[Point]) -> str:
    return f"{points[0]['model']} | {points[0]['steps']}"


def _name(point: Point) -> str:
    return f"{point['method']} {point['setting']}"


def plot(points: Sequence[Point], path: Path) -> None:
    """Measured cut against 1 - SSIM, better is higher: ours strong, rivals thin, fewer steps dashed; goals are stars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 7), dpi=100, layout="constrained")
    thin = iter(pyplot.get_cmap("tab20").colors)
    for method in dict.fromkeys(point["method"] for point in sorted(points, key=lambda point: point["method"])):
        of = [point for point in points if point["method"] == method]
        strong = method in _COLOURS
        style = {"color": _COLOURS[method], "linewidth": 2.6, "marker": "o", "zorder": 3} if strong else {
            "color": "black" if method == "fewer-steps" else next(thin), "linewidth": 1.0, "marker": ".",
            "linestyle": "--" if method.startswith("fewer-steps") else "-",
        }
        axes.plot([100 * point["cut"] for point in of], [max(1 - point["ssim"], 1e-5) for point in of], label=method, **style)
    for goal in GOALS:
        if points[0]["steps"] in goal.cuts:
            axes.plot(100 * goal.cuts[points[0]["steps"]], 1 - goal.ssim, "*", color="#e6b800", markersize=14, zorder=4)
    axes.set(
        yscale="log", xlim=(0, 85), xlabel="measured cut of DiT time, %", ylabel="1 - SSIM to the full run (log, better is up)",
        title=f"{points[0]['model']}, {points[0]['steps']} steps of {points[0]['sampler']} (stars: goals)",
    )
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
