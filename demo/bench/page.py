"""docs/benchmarks.md and its plots, made from docs/benchmarks.json alone."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from blockdance_core.config import QUALITIES
from demo.architectures import ARCHITECTURES
from demo.bench import ablation, adaptive, latency, methods, real_size, tails
from demo.bench.figures import GOALS, PSNR_CAP, Duel, duel

DOCS = Path(__file__).parents[2] / "docs"
JSON, PAGE = DOCS / "benchmarks.json", DOCS / "benchmarks.md"
UPDATE = "python dev.py bench --report"
OURS = "ours-"
REACHABLE = (
    "A user reaches every setting of ours: by N, **quality**, or **cut** of *Load BlockDance Policy*, which picks any "
    "calibrated level."
)
CONDITIONS = ("model", "steps", "sampler", "scheduler", "cfg", "split", "difficulty", "seed", "batch", "n", "threads")
"""What points must have in common to be compared."""
KEY = (*CONDITIONS, "method", "setting")
_OTHERS = "best other cache"
_MEANS: dict[str, Callable[[str], bool]] = {
    "a calibrated policy": lambda method: method == "ours-calibrated",
    "a **quality**": lambda method: method == "ours-guarded",
    "N": lambda method: method == "ours-auto",
    _OTHERS: lambda method: not method.startswith((OURS, "fewer-steps", "chosen-steps")),
    "fewer steps": lambda method: method == "fewer-steps",
}
DUELS = (0.15, 0.80)
"""Rival points of a cut between these are compared with ours."""
_OUTCOMES = ("win", "tie", "loss", "out of reach")
_MANY = 32
SWEEPS = {"tails": tails, "latency": latency, "real_size": real_size}
_COLOURS = {"ours-calibrated": "#d55e00", "ours-auto": "#0072b2", "ours-paper": "#009e73", "ours-guarded": "#cc79a7"}

Point = dict[str, Any]


def key(point: Point) -> tuple[Any, ...]:
    """What tells a point from all others; None for a condition that an old file does not say."""
    return tuple(point.get(name) for name in KEY)


def save(path: Path, found: dict[str, Any], whole: Iterable[str] = ()) -> None:
    """Add to a file of figures: what it holds of other models, methods and places of a sweep stays; one point a line.

    Args:
        path: The file, made if it is missing.
        found: What to add.
        whole: Methods of which every setting was measured: older settings, such as levels of another calibration, go.
    """
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    fresh = found.get("points", ())
    renewed = {key(point)[:-1] for point in fresh if point["method"] in whole}
    kept = (point for point in data.get("points", ()) if key(point)[:-1] not in renewed)
    points = {key(point): point for point in (*kept, *fresh)}
    of_models = {name: data.get(name, {}) | found.get(name, {}) for name in ("models", "adaptive", "ablation")}
    for name, sweep in SWEEPS.items():
        rows = [*data.get(name, {}).get("rows", ()), *found.get(name, {}).get("rows", ())]
        if rows:
            found = found | {name: {"rows": list({tuple(row[part] for part in sweep.KEY): row for row in rows}.values())}}
    data |= {**found, **of_models, "points": list(points.values())}
    head = json.dumps({name: value for name, value in data.items() if name != "points"}, indent=1, allow_nan=False)
    lines = ",\n".join(json.dumps(point, allow_nan=False) for point in data["points"])
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".part")
    written.write_text(f'{head[:-2]},\n "points": [\n{lines}\n]}}\n', encoding="utf-8")
    os.replace(written, path)


def write() -> None:
    """Write the page and its plots."""
    data = json.loads(JSON.read_text(encoding="utf-8"))
    for group in groups(data):
        plot(group, DOCS / group.picture)
    PAGE.write_text(render(data), encoding="utf-8")


class Group(NamedTuple):
    """Points that were measured under the same conditions, sorted by cut.

    Attributes:
        points: At least one.
        apart: The conditions that tell them from other points of the same model and number of steps.
    """

    points: list[Point]
    apart: tuple[str, ...] = ()

    def says(self, name: str) -> str:
        """A condition in words."""
        value = self.points[0].get(name)
        return "unknown" if value is None else str(value)

    @property
    def cells(self) -> str:
        """Model and steps as cells of a table, with what tells the group apart."""
        return ", ".join([f"{self.says('model')} | {self.says('steps')}", *self._apart("sampler")])

    @property
    def title(self) -> str:
        """The group in words."""
        first = f"{self.says('model')}, {self.says('steps')} steps of {self.says('sampler')}"
        return ", ".join([first, *self._apart()])

    @property
    def picture(self) -> str:
        """Its plot, relative to docs/."""
        own = ARCHITECTURES[self.says("model")].sampling["sampler"] == self.says("sampler")
        names = ["pareto", self.says("model"), self.says("steps"), *(() if own else (self.says("sampler"),)), *self._apart()]
        return f"images/{'-'.join(names).replace(' ', '-')}.png"

    def _apart(self, *more: str) -> list[str]:
        plain = ("sampler", "scheduler", "split", "difficulty")
        return [self.says(name) if name in plain else f"{name} {self.says(name)}"
                for name in self.apart if name != "sampler" or name in more]


def groups(data: dict[str, Any]) -> list[Group]:
    """The points by their conditions."""
    found: dict[tuple[Any, ...], list[Point]] = {}
    for point in sorted(data.get("points", ()), key=lambda point: point["cut"]):
        found.setdefault(key(point)[: len(CONDITIONS)], []).append(point)
    places = sorted(found, key=lambda place: [(value is not None, value) for value in place])

    def apart(place: tuple[Any, ...]) -> tuple[str, ...]:
        """Of those of the same model and steps the sampler tells apart, and of those of the same sampler everything else."""
        alike = [one for one in places if one[:2] == place[:2]]
        same = [one for one in alike if one[2] == place[2]]
        return tuple(
            name for k, name in enumerate(CONDITIONS) if len({one[k] for one in (alike if name == "sampler" else same)}) > 1)

    return [Group(found[place], apart(place)) for place in places]


def ours(points: Sequence[Point]) -> list[Point]:
    """Those of this pack."""
    return [point for point in points if point["method"].startswith(OURS)]


def duels(points: Sequence[Point]) -> list[Duel]:
    """Every rival point inside `DUELS` against ours."""
    mine = ours(points)
    low, high = DUELS
    return [duel(point, mine) for point in points if not point["method"].startswith(OURS) and low <= point["cut"] <= high]


def render(data: dict[str, Any]) -> str:
    """The whole page, from the figures."""
    return "\n".join([
        "# Benchmarks", "", f"Made by `{UPDATE}` from [benchmarks.json](benchmarks.json).", "",
        *_glance(data), *_method(data), *_goals(data), *_summary(data),
        *(line for group in groups(data) for line in _section(group)),
        *_adaptive(data), *_ablation(data), *_sweeps(data), *_missing(data),
    ])


def _glance(data: dict[str, Any]) -> Iterator[str]:
    if groups(data):
        yield from ("## At a glance", "", f"The largest cut that keeps a mean SSIM of {GOALS[0].ssim:g} to the full run:", "")
        yield from (*largest_cuts(data), "", "Mean SSIM, and cut, of every quality:", "", *qualities(data), "")


def largest_cuts(data: dict[str, Any]) -> Iterator[str]:
    """A table, also of the README: the most that each means saves at the first goal's SSIM."""
    yield from _header("Model", "Steps", *_MEANS)
    for group in groups(data):
        points = [[point for point in group.points if of(point["method"])] for of in _MEANS.values()]
        best = [GOALS[0].best(one) for one in points]
        cells = (
            f"{most['cut']:.0%}" + (f" ({most['method']})" if name == _OTHERS else "") if most else "none"
            for name, most in zip(_MEANS, best, strict=True)
        )
        yield f"| {group.cells} | {' | '.join(cells)} |"


def qualities(data: dict[str, Any]) -> Iterator[str]:
    """A table, also of the README: what the guard keeps and saves at each quality."""
    names = [name for name in QUALITIES if name != "off"]
    yield from _header("Model", "Steps", *(f"`{name}`" for name in names))
    for group in groups(data):
        found = {point["setting"]: point for point in group.points if point["method"] == "ours-guarded"}
        cells = (f"{found[name]['ssim']:.4f} ({found[name]['cut']:.0%})" if name in found else "-" for name in names)
        yield f"| {group.cells} | {' | '.join(cells)} |"


def _method(data: dict[str, Any]) -> Iterator[str]:
    if not data.get("points"):
        return
    yield "## How it was measured"
    yield ""
    for group in groups(data):
        yield _conditions(group, data["environment"])
    yield ""
    yield (
        "Every method ran on the same captions, seeds and noise, with full runs in the same process beside it. *Cut* is the "
        "saved share of the model's time: block runs, counted in the blocks themselves, times the measured time of a block, "
        "and runs of the model times what one takes beside them. *By the clock* is 1 - time / time of the full runs beside it, "
        "inside the model's call, with the method's own code, where each call counts with the median of all calls that do "
        "the same work; on a machine that is shared it scatters by ten points and more, so nothing is compared by it. "
        "*Arithmetic* counts the blocks alone. SSIM and "
        f"PSNR compare with the full run of the same seed (data range 1, equal pictures count as {PSNR_CAP:g} dB, a clip "
        "counts with the mean of its frames); the interval "
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
        yield (
            f"This pack's own code takes {about['inactive_share']:.2%} of the time of a full run of {name} with N = 1, and "
            f"{about['quality_share']:.2%} with `near-lossless`, {about['guard_share']:.2%} of that time in the guard; no cut "
            "counts it."
        )
        yield ""


def _conditions(group: Group, environment: Mapping[str, Any]) -> str:
    """What a group was measured with: each point says it, an older one's device is that of the whole file."""
    says = group.says
    device, torch = (
        " and ".join(dict.fromkeys(str(point.get(name, environment.get(name, "unknown"))) for point in group.points))
        for name in ("device", "torch")
    )
    return (
        f"- {says('model')}, {says('steps')} steps of {says('sampler')} ({says('scheduler')}, CFG {says('cfg')}): {says('n')} "
        f"captions of the {says('split')} split ({says('difficulty')} difficulty), seed {says('seed')}, in batches of "
        f"{says('batch')}, {says('threads')} threads of {device}, PyTorch {torch}."
    )


def _goals(data: dict[str, Any]) -> Iterator[str]:
    if not groups(data):
        return
    yield from ("## Goals", "", *_header("Model", "Steps", "Goal", "Fidelity", "Wanted cut", "Best cut of ours", "With", "Met"))
    for group in groups(data):
        for goal in GOALS:
            wanted = goal.cuts.get(group.points[0]["steps"])
            if wanted is None:
                continue
            best = goal.best(ours(group.points))
            fidelity = f"SSIM >= {goal.ssim:g}" + (f", PSNR >= {goal.psnr:g} dB" if goal.psnr else "")
            reached = f"{best['cut']:.1%} | {_name(best)}" if best else "none | -"
            met = "met" if best and best["cut"] >= wanted else "not met"
            yield f"| {group.cells} | {goal.name} | {fidelity} | {wanted:.0%} | {reached} | {met} |"
    yield from ("", f"{REACHABLE} The point that counts is chosen by these very captions, among all of ours.", "")


def _summary(data: dict[str, Any]) -> Iterator[str]:
    if not groups(data):
        return
    yield from ("## Ours against every rival", "")
    yield (
        f"At every rival point of a cut between {DUELS[0]:.0%} and {DUELS[1]:.0%}: our most faithful point of at least that "
        "cut (within 0.5 points), for each prompt the one that is best for all the others, and the paired difference of the "
        "mean SSIM. A win or a loss is one whose 95 % interval, by "
        "10,000 bootstrap resamples over prompts, leaves out 0; everything else is a tie. The mean of the worst tenth is "
        "judged in the same way; of eight captions it is one caption. A rival's point of a cut below or above these does not "
        "count."
    )
    yield ""
    yield from _header(
        "Model", "Steps", "Rival", "Wins", "Ties", "Losses", "Out of reach", "Worst tenth: better", "open", "worse")
    lost = []
    for group in groups(data):
        found = duels(group.points)
        for rival in sorted({one.rival["method"] for one in found}):
            of = [one for one in found if one.rival["method"] == rival]
            count = Counter(one.outcome for one in of)
            tenths = [one.tenth for one in of if one.ours]
            better, worse = sum(low > 0 for low, _ in tenths), sum(high < 0 for _, high in tenths)
            outcomes = " | ".join(str(count[name]) for name in _OUTCOMES)
            yield f"| {group.cells} | {rival} | {outcomes} | {better} | {len(tenths) - better - worse} | {worse} |"
        lost += [(group.title, one) for one in found if one.outcome in ("loss", "out of reach") or one.tenth[1] < 0]
    yield from ("", *_totals(data), "", REACHABLE, "", "Losses, and what is out of reach:", "")
    for title, one in lost:
        where = f"{title}: {_name(one.rival)}"
        figures = f"cut {one.rival['cut']:.1%}, SSIM {one.rival['ssim']:.4f}"
        against = (
            f"{_name(one.ours)} (cut {one.ours['cut']:.1%}, SSIM {one.ours['ssim']:.4f}), "
            f"difference {one.difference:+.4f} ({one.low:+.4f} to {one.high:+.4f}), in the worst tenth "
            f"{one.tenth[0]:+.4f} to {one.tenth[1]:+.4f}"
        ) if one.ours else "no point of ours cuts as much"
        yield f"- {where} ({figures}): {against}"
    yield from (() if lost else ("None.",))
    yield ""


def _totals(data: dict[str, Any]) -> Iterator[str]:
    """All comparisons together, and what becomes of them where one asks for more."""

    def all_duels(wanted: Callable[[Point], bool] = lambda point: True) -> list[Duel]:
        return [one for group in groups(data) for one in duels([point for point in group.points if wanted(point)])]

    def of_rivals(found: Iterable[Duel]) -> list[Duel]:
        return [one for one in found if one.rival["method"] != "chosen-steps"]

    everything = all_duels()
    rivals = of_rivals(everything)
    yield from _header("Comparisons", "Wins", "Ties", "Losses", "Out of reach")
    for about, found in (
        ("all, our own schedules without their weights (`chosen-steps`) included", everything),
        ("all rivals", rivals),
        ("rivals without other solvers, `fewer-steps-<sampler>`",
         [one for one in rivals if not one.rival["method"].startswith("fewer-steps-")]),
        ("rivals, on 32 captions or more", [one for one in rivals if one.rival["n"] >= _MANY]),
        ("rivals, by N and the qualities alone, without a policy",
         of_rivals(all_duels(lambda point: point["method"] != "ours-calibrated"))),
    ):
        count = Counter(one.outcome for one in found)
        yield f"| {about} | {' | '.join(str(count[name]) for name in _OUTCOMES)} |"
    yield ""
    yield "Of eight captions, intervals are rough, and rather too narrow."


def _section(group: Group) -> Iterator[str]:
    title = group.title
    yield from (f"## {title}", "", f"![Cut and SSIM of every method: {title}]({group.picture})", "")
    yield from _header(
        "Method", "Setting", "Cut", "Arithmetic", "By the clock", "SSIM", "95 %", "Worst tenth", "PSNR, dB", "Latent L2",
        "Stored, KiB", "Computed instead",
    )
    for point in group.points:
        low, high = point["ssim_interval"]
        stored = "-" if point.get("stored_bytes") is None else f"{point['stored_bytes'] / 1024:.0f}"
        name = f"**{point['method']}**" if point["method"].startswith(OURS) else point["method"]
        yield (
            f"| {name} | {point['setting']} | {point['cut']:.1%} | {point['cut_arithmetic']:.1%} | "
            f"{point['cut_wall']:.1%} | {point['ssim']:.4f} | {low:.4f} to {high:.4f} | {point['ssim_p10']:.4f} | "
            f"{point['psnr']:.1f} | {point['latent_l2']:.4f} | {stored} | {sum(point.get('fallbacks', {}).values())} |"
        )
    commands = ", ".join(f"`{command}`" for command in sorted({point.get("command", "unknown") for point in group.points}))
    yield from ("", f"Made by {commands}.", "")


def _adaptive(data: dict[str, Any]) -> Iterator[str]:
    if not data.get("adaptive"):
        return
    yield from ("## Policies that look at the picture", "")
    yield (
        "After a few steps a network decides for each picture which of the calibrated schedules in its file it follows. "
        "*Static* is that of the same cut for all pictures, or, between two of them, one drawn by lot. *One for all* is the "
        "same with the schedules that the network chooses from, which compute all steps before it looks; which of them are "
        "best was seen on these captions, to its favour. SSIM to the full run (data range 1); differences are paired, with "
        "95 % intervals of a bootstrap over prompts."
    )
    yield ""
    for name, found in sorted(data["adaptive"].items()):
        training = found["training"]
        yield (
            f"**{name}**, {found['steps']} steps of {found['sampler']}: {found['n']} {found['split']} captions, half of them "
            f"hard, seed {found['seed']}. It looks at step {found['start']} and chooses among {found['options']} schedules; "
            f"{found['parameters']:,} parameters. Deciding takes {found['decision_ms']:.1f} ms of a full run's "
            f"{found['full_ms']:.0f} ({found['decision_ms'] / found['full_ms']:.2%}). Trained on {training['pictures']} "
            f"pictures, {training['held_out']} more held out, reward {training['reward']}: {training['rollouts']:.0f} "
            f"rollouts, {training['calls']:.0f} calls of the model, {training['minutes']:g} minutes on "
            f"{found['environment']['device']} (`{training['command']}`). Measured by `{found['command']}`."
        )
        rows = found["rows"]
        counts = "; ".join(
            f"{about} better at {sum(row[name][0] > 0 for row in rows)}, worse at {sum(row[name][1] < 0 for row in rows)}"
            for about, name in (("than static", "gain_interval"), ("in the worst tenth", "tenth_interval"),
                                ("than one for all", "alike_interval"))
        )
        yield from ("", adaptive.table(found), "", f"Of {len(rows)} levels, by intervals that leave out 0: {counts}.", "")


def _ablation(data: dict[str, Any]) -> Iterator[str]:
    if not data.get("ablation"):
        return
    yield from ("### What the parts of their training are worth", "")
    yield (
        "The same training with one part changed: the reward (cut + lambda SSIM) / (1 + lambda) earned on test captions, "
        "mean over the levels and seeds, and the difference to the training as shipped, paired by picture, with 95 % intervals "
        "of a bootstrap over prompts. All networks learn from the same outcomes, sampled once."
    )
    yield ""
    for name, found in sorted(data["ablation"].items()):
        yield (
            f"**{name}**, {found['steps']} steps of {found['sampler']}: {found['n']} {found['split']} captions, seed "
            f"{found['seed']}; {found['pictures']} pictures to train on, a quarter of them held out, {found['seeds']} seeds. "
            f"Measured by `{found['command']}`."
        )
        yield from ("", ablation.table(found), "")
        yield (
            f"Sharing the steps before the decision changes outcomes by {max(row['apart'] for row in found['sharing']):.1g} at "
            "most. Of one batch, all options, in calls of the model: "
            + "; ".join(f"rho = {row['start']:g}: {row['shared_calls']} in place of {row['alone_calls']}"
                        for row in found["sharing"]) + "."
        )
        yield ""


def _sweeps(data: dict[str, Any]) -> Iterator[str]:
    for name, title in (
        ("tails", "When the tail of live blocks pays"), ("latency", "DiT time against batch, steps and tokens"),
        ("real_size", "Models of real size, random weights"),
    ):
        if name in data:
            rows = data[name]["rows"]
            made = [(row["command"], row["environment"]["device"], row["environment"]["threads"]) for row in rows]
            sources = ", ".join(dict.fromkeys(f"`{what}` on {device}, {threads} threads" for what, device, threads in made))
            yield from (f"## {title}", "", f"Made by {sources}.", "", SWEEPS[name].table(rows), "")


def _missing(data: dict[str, Any]) -> Iterator[str]:
    """What the benchmark could say, and does not yet."""
    if not data.get("points"):
        return
    yield from ("## Not measured", "")
    for model in ARCHITECTURES:
        own = ARCHITECTURES[model].sampling["sampler"]
        for steps in sorted({steps for goal in GOALS for steps in goal.cuts}):
            here = {point["method"] for point in data["points"] if (point["model"], point["steps"]) == (model, steps)}
            left = [name for name in methods.METHODS if name not in here and name != f"fewer-steps-{own}"]
            if left:
                yield f"- {model}, {steps} steps: {', '.join(left) if here else 'nothing'}"
    solvers = {point["sampler"] for point in data["points"]}
    yield f"- full runs of other solvers than {', '.join(sorted(solvers))}"
    yield from (f"- `python dev.py bench --{name.replace('_', '-')}`" for name in SWEEPS if name not in data)
    if "real_size" in data and not any(row["compiled"] for row in data["real_size"]["rows"]):
        yield "- models of real size on a GPU, eager and compiled: `python dev.py bench --real-size`"
    yield ""


def _header(*names: str) -> tuple[str, str]:
    return f"| {' | '.join(names)} |", "|" + "---|" * len(names)


def _name(point: Point) -> str:
    return f"{point['method']} {point['setting']}"


def plot(group: Group, path: Path) -> None:
    """Measured cut against 1 - SSIM, better is higher: ours strong, rivals thin, fewer steps dashed; goals are stars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = group.points
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
        yscale="log", xlim=(0, 85), xlabel="cut of DiT time, %", ylabel="1 - SSIM to the full run (log, better is up)",
        title=f"{group.title} (stars: goals)",
    )
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
