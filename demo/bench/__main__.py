"""Measure every method on the demo models, paired in one process, and write what docs/benchmarks.md is made from.

Without further options: all methods on sd3-mini at 30 steps. ``--latency``, ``--tails``, ``--real-size``,
``--adaptive`` and ``--ablation`` measure something else; ``--report`` only writes the page and its plots anew from
docs/benchmarks.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from demo import options as common
from demo.bench import ablation, adaptive, latency, methods, page, real_size, runner, tails
from demo.loader import MODELS


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python dev.py bench", description=__doc__)
    top.add_argument("--model", choices=(*MODELS, "all"), nargs="+", default=["sd3-mini"], help="default: sd3-mini")
    top.add_argument("--steps", type=common.count, nargs="+",
                     help="of the full run, several in turn (default: 30, or the model's)")
    common.add(top)
    top.add_argument("--methods", nargs="+", default=["*"], metavar="PATTERN",
                     help="such as 'ours-*' or 'fora N=2'; known: " + ", ".join(methods.METHODS))
    top.add_argument("--split", choices=("train", "validation", "test"), default="test")
    top.add_argument("--difficulty", choices=("mixed", "easy", "hard"), default="mixed")
    top.add_argument("--prompts", type=common.count, default=32)
    top.add_argument("--batch", type=common.count, default=4, help="pictures a run")
    top.add_argument("--pair", type=int, default=1, metavar="K",
                     help="settings between two full runs; more is faster, and less exact on a machine that is not idle")
    top.add_argument("--seed", type=int, default=0, help="of captions and noise")
    top.add_argument("--json", type=Path, metavar="PATH", help="add the figures to this file")
    top.add_argument("--resume", type=Path, metavar="PATH", help="keep finished points as JSON lines there, and go on there")
    top.add_argument("--tails", action="store_true", help="what is expected of reuse by where it stops, from one profile")
    top.add_argument("--latency", action="store_true", help="time against batch, steps and tokens (the first of --methods)")
    top.add_argument("--real-size", nargs="*", metavar="NAME",
                     help="full-size models with random weights: " + ", ".join(real_size.MODELS))
    top.add_argument("--tokens-scale", type=float, default=1.0, help="of the picture's side, for --real-size")
    top.add_argument("--layers-scale", type=float, default=1.0, help="of the depth, for --real-size")
    top.add_argument("--adaptive", action="store_true", help="the models' adaptive policies against their static schedules")
    top.add_argument("--ablation", action="store_true", help="what the parts of the training of such policies are worth")
    top.add_argument("--train", type=int, default=96, help="captions to train on, for --ablation (default %(default)s)")
    top.add_argument("--policy", type=Path, metavar="PATH", help="for --adaptive and --ablation, in place of the model's own")
    top.add_argument("--report", action="store_true", help="write docs/benchmarks.md from docs/benchmarks.json")
    top.set_defaults(scale=1.0)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 on success."""
    options = parser().parse_args(arguments)
    if options.report:
        page.write()
        return 0
    methods.known(options.methods)
    common.begin(options)
    command = common.command("bench", sys.argv[1:] if arguments is None else arguments)
    place = environment(options)
    about = {"command": command, "environment": place}
    found: dict[str, Any]

    def of_steps(options: argparse.Namespace, name: str) -> argparse.Namespace:
        return common.fitted(options, name, (options.steps or [None])[0])

    if options.real_size is not None:
        return _swept("real_size", real_size, about, options, options.real_size or real_size.MODELS, real_size.measure)
    if options.tails:
        return _swept("tails", tails, about, options, _models(options), lambda options, name: tails.measure(
            of_steps(options, name), name))
    if options.latency:
        return _swept("latency", latency, about, options, _models(options), lambda options, name: latency.measure(
            of_steps(options, name), name))
    if options.adaptive or options.ablation:
        kind, part = ("adaptive", adaptive) if options.adaptive else ("ablation", ablation)
        if options.steps:
            raise SystemExit(f"--{kind} runs as many steps as the policy was trained for: leave out --steps.")
        found = {kind: {}}
        for name in _models(options):
            found[kind][name] = about | part.measure(common.fitted(options, name), name)
            print(part.table(found[kind][name]))
    else:
        found = {**about, "models": {}, "points": []}
        for name in _models(options):
            for steps in options.steps or [30]:
                one = common.fitted(options, name, steps)
                found["models"][name], points = measure(
                    one, name, {"command": command, "device": place["device"], "torch": place["torch"]})
                found["points"] += points
    if options.json:
        page.save(options.json, found, methods.whole(options.methods))
    return 0


def _swept(
    kind: str, sweep: Any, about: dict[str, Any], options: argparse.Namespace, names: Iterable[str],
    measure_one: Callable[[argparse.Namespace, str], list[dict[str, Any]]],
) -> int:
    """A sweep over models; the figures of each are kept when it is finished."""
    for name in names:
        rows = [row | about for row in measure_one(options, name)]
        print(sweep.table(rows), flush=True)
        if options.json:
            page.save(options.json, {kind: {"rows": rows}})
    return 0


def measure(options: argparse.Namespace, name: str, made: dict[str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All points of one model at one number of steps, each printed when it is finished; and figures of the model.

    What `made` the points, as a command on a device, stands in each of them.
    """
    from demo.loader import load_demo

    bench = runner.Runner(load_demo(name), options)
    about = {
        "inactive_share": bench.own_share(group_size=1), "quality_share": bench.own_share(quality="near-lossless"),
        "guard_share": bench.guard_share(), "block_shares": bench.shares,
    }
    case = methods.Case(bench.demo, options)
    finished = _finished(options.resume)
    here = {**vars(options), "model": name, "n": sum(map(len, bench.batches)), "threads": torch.get_num_threads()}
    points = []
    print(f"{name}, {options.steps} steps of {options.sampler}, {options.prompts} prompts in batches of {options.batch}")
    print(HEADING)
    for method, settings in methods.settings(case, options.methods).items():
        keys = {setting.name: page.key({**here, "method": method, "setting": setting.name}) for setting in settings}
        points += [finished[one] for one in keys.values() if one in finished]
        remaining = [setting for setting in settings if keys[setting.name] not in finished]
        for point in bench.points(remaining) if remaining else ():
            points.append({"model": name, "method": method, **point, **made})
            print(row(points[-1]), flush=True)
            if options.resume:
                with options.resume.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(points[-1], allow_nan=False) + "\n")
    print(f"this pack's own code takes {about['inactive_share']:.2%} of the DiT time with N = 1, {about['quality_share']:.2%} "
          f"with near-lossless, {about['guard_share']:.2%} of it in the guard")
    return about, points


HEADING = (
    f"{'method':<27}{'setting':<16}{'DiT ms':>8}{'cut':>8}{'arithmetic':>12}{'by the clock':>15}{'SSIM':>8}{'worst':>8}"
    f"{'PSNR':>7}{'stored':>10}{'predicted':>10}"
)


def row(point: dict[str, Any]) -> str:
    """One point as text."""
    stored, predicted = ("-" if point.get(name) is None else point[name] for name in ("stored_bytes", "predicted_bytes"))
    return (
        f"{point['method']:<27}{point['setting']:<16}{point['dit_ms']:>8.0f}{point['cut']:>8.1%}{point['cut_arithmetic']:>12.1%}"
        f"{point['cut_wall']:>15.1%}{point['ssim']:>8.4f}{point['ssim_p10']:>8.4f}{point['psnr']:>7.1f}"
        f"{stored:>10}{predicted:>10}"
    )


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "device": device, "threads": options.threads, "torch": torch.__version__, "python": platform.python_version(),
        "split": options.split, "difficulty": options.difficulty, "prompts": options.prompts, "batch": options.batch,
        "seed": options.seed,
    }


def _models(options: argparse.Namespace) -> Iterator[str]:
    yield from MODELS if "all" in options.model else options.model


def _finished(path: Path | None) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The points of a file by their keys; one that is not whole is measured again."""
    if path is None or not path.is_file():
        return {}
    points = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last one may be cut off
            points.append(json.loads(line))
    return {page.key(point): point for point in points if all(name in point for name in page.KEY)}


if __name__ == "__main__":
    raise SystemExit(main())
