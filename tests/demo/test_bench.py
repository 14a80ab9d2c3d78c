"""The benchmark: what each method plans, the statistics against hand numbers, the page, and one small run of it all."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from blockdance_core import policy
from blockdance_core.forecast import Forecast
from blockdance_core.host import training
from blockdance_core.host.pictures import Pictures
from blockdance_core.schedule import Reuse, follow
from demo import loader, prompts
from demo.architectures import ARCHITECTURES
from demo.bench import __main__ as program
from demo.bench import ablation, adaptive, figures, latency, methods, page, real_size, rivals, runner, tails


def _letters(plan) -> str:
    """The decisions of a plan, a letter a step: c stores, r reuses, a dot is only computed."""
    return "".join(step.decision[0].replace("c", "c" if step.decision == "cache" else ".") for step in follow(plan).steps)


def _point(method: str, cut: float, ssim: list[float], **more) -> dict:
    mean = sum(ssim) / len(ssim)
    return {
        "model": "sd3-mini", "method": method, "setting": "N=2", "steps": 20, "sampler": "euler", "cut": cut, "ssim": mean,
        "cut_arithmetic": cut, "cut_wall": cut, "ssim_interval": [mean, mean], "ssim_p10": min(ssim), "psnr": 40.0,
        "latent_l2": 0.01, "stored_bytes": 2048, "n": len(ssim), "prompt_ssim": ssim, "prompt_psnr": [40.0] * len(ssim),
        "scheduler": "simple", "cfg": 4.5, "split": "test", "difficulty": "mixed", "seed": 0, "batch": 2, "threads": 1,
        "command": "python dev.py bench", **more,
    }


def _case(name: str, steps: int, sampler: str) -> methods.Case:
    return methods.Case(SimpleNamespace(name=name), argparse.Namespace(steps=steps, sampler=sampler))


@pytest.mark.parametrize(
    ("plan", "letters", "boundary", "anchored", "order"),
    [
        (rivals.fora(9, 16, 3), "crrcrrcrr", 15, True, 0),
        (rivals.deepcache(7, 16, 2), "crcrcr.", 14, False, 0),
        (rivals.delta_dit(9, 16, 2), "...crcrcr", 7, True, 0),
        (rivals.magcache([1, 0.5, 0.9, 0.9, 0.9, 0.9, 1, 1, 1, 1], 16, 0.35, 3), ".crrcrrrcr", 15, True, 0),
        (rivals.taylorseer(9, 16, 2, order=1), ".crcrcrcr", 15, True, 1),
        (rivals.taylorseer(9, 16, 2, order=2), "..crcrcr.", 15, True, 2),
    ],
    ids=["fora", "deepcache", "delta_dit", "magcache", "taylorseer-1", "taylorseer-2"],
)
def test_plan_reuses_at_the_stated_steps_and_depth(plan, letters, boundary, anchored, order) -> None:
    assert _letters(plan) == letters
    assert {(row.boundary, row.forecast.anchored, row.forecast.order) for row in plan if row} == {(boundary, anchored, order)}


def test_magcache_takes_the_ratios_of_the_conditional_half() -> None:
    negative, positive = np.array([[3.0, 4.0], [0.0, 2.0], [5.0, 0.0]]), np.array([[6.0, 8.0], [0.0, 5.0], [1.0, 0.0]])
    parts = np.stack([negative, 4.5 * (positive - negative)])
    gram = np.einsum("akv,blv->akbl", parts, parts)
    assert rivals.magnitude_ratios(gram, 4.5) == pytest.approx([1, 0.5, 0.2])


def test_fewer_steps_leave_out_the_base_sampler_and_begin_other_solvers_at_the_full_number() -> None:
    found = methods.settings(_case("sd3-mini", 30, "uni_pc"), ["fewer-steps*"])
    assert set(found) == {"fewer-steps", "fewer-steps-dpmpp_2m", "fewer-steps-res_multistep"}
    assert [setting.share for setting in found["fewer-steps"]] == list(methods.SHARES)
    first = found["fewer-steps-dpmpp_2m"][0]
    assert (first.share, first.sampler) == (1.0, "dpmpp_2m")


def test_patterns_choose_methods_and_single_settings() -> None:
    case = _case("sd3-mini", 30, "euler")
    found = methods.settings(case, ["ours-auto N=3", "ours-paper"])
    assert {name: [one.name for one in of] for name, of in found.items()} == {
        "ours-paper": ["N=2", "N=3", "N=4"], "ours-auto": ["N=3"],
    }


def test_calibrated_takes_every_level_of_this_sampler_and_step_count(monkeypatch, tmp_path) -> None:

    (tmp_path / "some.safetensors").touch()
    monkeypatch.setattr(methods, "POLICIES", tmp_path)
    entries = [
        SimpleNamespace(sampler="euler", steps=4, cuts=(0.2, 0.4), plans=([None] * 4, [None] * 4)),
        SimpleNamespace(sampler="uni_pc", steps=4, cuts=(0.3,), plans=([None] * 4,)),
        SimpleNamespace(sampler="euler", steps=8, cuts=(0.5,), plans=([None] * 8,)),
    ]
    monkeypatch.setattr(policy, "load", lambda path: SimpleNamespace(entries=entries), raising=False)
    found = list(methods.calibrated(_case("some", 4, "euler")))
    assert [setting.name for setting in found] == ["cut=0.200", "cut=0.400"]
    assert list(methods.calibrated(_case("other", 4, "euler"))) == []


def test_chosen_steps_hold_the_slope_between_the_computed_steps_of_every_level(monkeypatch) -> None:
    fitted = Reuse(3, Forecast(True, 1, fitted=((1, 0.5), (2, 0.5))))
    monkeypatch.setattr(methods, "_levels", lambda case: iter([(0.5, (None, None, fitted, fitted))]))
    monkeypatch.setattr(methods, "planned", lambda plan: plan)
    monkeypatch.setattr(methods.Case, "blocks", (None,) * 4)
    setting, = methods.chosen_steps(_case("some", 4, "euler"))
    assert (setting.name, setting.patch) == ("cut=0.500", (None, None, *[Reuse(4, Forecast(True))] * 2))


def test_teacache_adds_up_changes_and_starts_anew_where_it_computes() -> None:
    decision = rivals.TeaCache(threshold=0.25)
    inputs = [1.0, 1.1, 1.21, 1.331, 1.4641]  # each a tenth more than the one before
    computed = [decision.computes(torch.full((2, 3), value), last=False) for value in inputs]
    assert computed == [True, False, False, True, False]
    assert decision.computes(torch.full((2, 3), 1.4641), last=True)


def test_first_block_compares_with_the_last_computed_residual() -> None:
    decision = rivals.FirstBlock(threshold=0.15)
    residuals = [1.0, 1.1, 1.2, 1.3, 1.4]  # against 1.0: .1, .2 computes; against 1.2: .083, .167 computes
    assert [decision.computes(torch.full((2,), value), last=False) for value in residuals] == [True, False, True, False, True]


def test_worst_tenth_is_the_mean_of_the_lowest() -> None:
    assert figures.worst_tenth([0.9, 0.5, 0.7]) == 0.5
    assert figures.worst_tenth([*[1.0] * 18, 0.2, 0.4]) == pytest.approx(0.3)


def test_bootstrap_brackets_the_mean_and_repeats() -> None:
    assert figures.bootstrap([0.5] * 8) == (0.5, 0.5)
    low, high = figures.bootstrap([0.0, 1.0] * 50)
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.011)  # the mean's standard error is .5 / sqrt(100)
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.011)
    assert (low, high) == figures.bootstrap([0.0, 1.0] * 50)


def test_duel_takes_our_best_point_of_at_least_that_cut() -> None:
    middle = _point("ours-b", 0.397, [0.95, 0.96, 0.95, 0.96])
    ours = [_point("ours-a", 0.2, [0.99] * 4), middle, _point("ours-c", 0.5, [0.9] * 4)]
    won = figures.duel(_point("rival", 0.4, [0.94] * 4), ours)
    assert (won.ours["method"], won.outcome, won.difference) == ("ours-b", "win", pytest.approx(0.015))
    assert figures.duel(_point("rival", 0.4, [0.97] * 4), ours).outcome == "loss"
    assert figures.duel(_point("rival", 0.4, [0.9, 1.0, 0.92, 1.0]), ours).outcome == "tie"
    assert figures.duel(_point("rival", 0.6, [0.5] * 4), ours).outcome == "out of reach"


def test_no_prompt_chooses_the_point_that_it_is_judged_with() -> None:
    lucky, steady = _point("ours-a", 0.5, [1.0, 0.8, 0.8]), _point("ours-b", 0.5, [0.84, 0.86, 0.86])
    found = figures.duel(_point("rival", 0.5, [0.8] * 3), [lucky, steady])
    assert found.ours["method"] == "ours-a"  # by .867 to .853; but without its first prompt it is the worse
    assert found.difference == pytest.approx((0.84 + 0.8 + 0.8) / 3 - 0.8)


def test_goal_is_met_by_the_highest_cut_that_is_faithful_enough() -> None:
    points = [_point("ours-a", 0.5, [0.985]), _point("ours-b", 0.6, [0.985], psnr=35.0), _point("ours-c", 0.7, [0.9])]
    assert figures.GOALS[1].best(points)["cut"] == 0.5
    assert figures.GOALS[0].best(points) is None


def test_mean_ms_gives_each_call_the_median_of_its_kind() -> None:
    def run(*calls: tuple[int, float]) -> runner.Run:
        return runner.Run(torch.zeros(1), [runner.Call(2, [blocks], ms) for blocks, ms in calls], None)

    runs = [run((1, 10.0), (0, 2.0)), run((1, 11.0), (1, 500.0))]  # a hiccup; medians 11 and 2
    assert runner.mean_ms(runs) == (11 + 2 + 11 + 11) / 2
    full = [run((1, 10.0), (1, 10.0)), run((1, 10.0), (1, 10.0))]
    cuts = runner.cuts([run((0, 5.0)), run((1, 10.0))], full, [0.8])
    assert (cuts["cut_wall"], cuts["cut_arithmetic"]) == (1 - 7.5 / 20, 0.75)
    assert cuts["cut"] == pytest.approx(1 - 0.8 / 4 - 0.2 / 2)
    spared = run((0, 0.1), (1, 10.0))  # EasyCache answers for the model: what stands beside the blocks does not run, either
    spared.calls[0].ran = False
    assert runner.cuts([spared], full, [0.8])["cut"] == 0.5


def _data() -> dict:
    ssim = {"ours-auto": [0.991, 0.992], "fora": [0.98, 0.981], "teacache": [0.9, 0.8]}
    points = [_point(name, cut, ssim[name]) for name, cut in (("ours-auto", 0.5), ("fora", 0.48), ("teacache", 0.7))]
    place = {
        "device": "a machine", "threads": 1, "torch": "2", "prompts": 2, "batch": 2, "split": "test", "difficulty": "mixed",
    }
    row = {
        "model": "sd3-mini", "method": "ours-auto", "setting": "N=2", "batch": 1, "steps": 20, "scale": 1.0,
        "full_dit_ms": 10.0, "dit_ms": 5.0, "cut": 0.5, "cut_wall": 0.5, "cut_arithmetic": 0.5,
        "sampler": "euler", "command": "python dev.py bench --latency", "environment": place,
    }
    return {
        "command": "python dev.py bench", "environment": place,
        "models": {"sd3-mini": {"inactive_share": 0.001, "quality_share": 0.03, "guard_share": 0.02}},
        "points": points, "latency": {"rows": [row]},
    }


def test_page_says_which_goals_are_met_and_which_rivals_are_beaten() -> None:
    text = page.render(_data())
    assert "| sd3-mini | 20 | near-lossless | SSIM >= 0.99 | 45% | 50.0% | ours-auto N=2 | met |" in text
    assert "| sd3-mini | 20 | stretch | SSIM >= 0.95 | 62% | 50.0% | ours-auto N=2 | not met |" in text
    assert "| sd3-mini | 20 | fora | 1 | 0 | 0 | 0 | 1 | 0 | 0 |" in text
    assert "teacache N=2 (cut 70.0%, SSIM 0.8500): no point of ours cuts as much" in text
    assert "images/pareto-sd3-mini-20.png" in text
    assert "| sd3-mini | ours-auto N=2 | 1 | 20 | 1x | 10 | 5 | 50.0% | 50.0% |" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_page_begins_with_the_largest_cut_of_each_means_and_what_every_quality_keeps() -> None:
    of = [
        ("ours-calibrated", 0.5, 0.995), ("ours-calibrated", 0.7, 0.98), ("fora", 0.4, 0.99), ("magcache", 0.3, 0.999),
        ("chosen-steps", 0.8, 0.999), ("fewer-steps", 0.2, 0.99), ("fewer-steps-uni_pc", 0.6, 0.999), ("ours-auto", 0.3, 0.9),
    ]
    points = [_point(method, cut, [ssim]) for method, cut, ssim in of]
    text = page.render({**_data(), "points": [*points, _point("ours-guarded", 0.25, [0.985], setting="draft")]})
    assert "| sd3-mini | 20 | 50% | none | none | 40% (fora) | 20% |" in text
    assert "| sd3-mini | 20 | - | - | - | 0.9850 (25%) | - |" in text
    assert text.index("## At a glance") < text.index("## How it was measured")


def test_plot_is_readable_at_800_pixels(tmp_path) -> None:
    from PIL import Image

    page.plot(page.groups(_data())[0], tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width == 800


def test_save_drops_the_levels_of_an_older_calibration(tmp_path) -> None:
    path = tmp_path / "figures.json"
    levels = [_point("ours-calibrated", cut, [0.9], setting=f"cut={cut}") for cut in (0.3, 0.4, 0.5)]
    elsewhere = levels[0] | {"steps": levels[0]["steps"] + 1}
    page.save(path, {"points": [*levels[:2], elsewhere, _point("fora", 0.4, [0.9])]})
    page.save(path, {"points": [_point("fora", 0.4, [0.8])]})
    assert len(json.loads(path.read_text())["points"]) == 4, "another method leaves it alone"
    page.save(path, {"points": levels[2:]}, ["fora"])
    assert len(json.loads(path.read_text())["points"]) == 5, "not all levels were measured"
    page.save(path, {"points": levels[2:]}, ["ours-calibrated"])
    kept = json.loads(path.read_text())["points"]
    assert kept == [elsewhere, _point("fora", 0.4, [0.8]), levels[2]]


def test_methods_are_whole_where_no_setting_is_named() -> None:
    assert methods.whole(["fora", "ours-calibrated cut=0.5*"]) == ["fora"]
    assert set(methods.whole(["ours-*"])) == {name for name in methods.METHODS if name.startswith("ours-")}


def test_save_replaces_points_measured_again_and_keeps_the_rest(tmp_path) -> None:
    path = tmp_path / "figures.json"
    page.save(path, {"points": [_point("fora", 0.4, [0.9]), _point("teacache", 0.5, [0.8])], "latency": {"rows": []}})
    page.save(path, {"points": [_point("fora", 0.45, [0.91])]})
    data = json.loads(path.read_text(encoding="utf-8"))
    assert [(point["method"], point["cut"]) for point in data["points"]] == [("fora", 0.45), ("teacache", 0.5)]
    assert data["latency"] == {"rows": []}


@pytest.mark.parametrize(("name", "value"), [
    ("split", "train"), ("difficulty", "hard"), ("seed", 1), ("batch", 4), ("n", 7), ("cfg", 3.0), ("scheduler", "karras"),
    ("threads", 2), ("sampler", "uni_pc"),
])
def test_points_of_other_conditions_stay_apart(name, value, tmp_path) -> None:
    old, new = _point("fora", 0.4, [0.9]), _point("fora", 0.4, [0.9], **{name: value})
    path = tmp_path / "figures.json"
    page.save(path, {"points": [old]})
    page.save(path, {"points": [new]})
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["points"] == [old, new]
    assert len({group.picture for group in page.groups(data)}) == len({group.cells for group in page.groups(data)}) == 2


def test_points_that_lack_a_condition_are_measured_again_but_shown(tmp_path) -> None:
    whole, old = _point("fora", 0.4, [0.9]), _point("teacache", 0.4, [0.9])
    del old["seed"]
    path = tmp_path / "points.jsonl"
    cut_off = json.dumps(_point("hold", 0.4, [0.9]))[:-9]
    path.write_text("\n".join((json.dumps(whole), json.dumps(old), cut_off)), encoding="utf-8")
    assert list(program._finished(path).values()) == [whole]
    text = page.render({**_data(), "points": [whole, old]})
    assert "## sd3-mini, 20 steps of euler, seed unknown" in text


def test_page_says_conditions_and_commands_of_the_points_themselves() -> None:
    points = [_point("fora", 0.4, [0.9] * 3), _point("fora", 0.4, [0.9], steps=30, split="validation", command="another")]
    text = page.render({**_data(), "points": points})
    assert (
        "- sd3-mini, 20 steps of euler (simple, CFG 4.5): 3 captions of the test split (mixed difficulty), seed 0, in batches "
        "of 2, 1 threads of a machine, PyTorch 2."
    ) in text
    assert "- sd3-mini, 30 steps of euler (simple, CFG 4.5): 1 captions of the validation split" in text
    assert text.index("## sd3-mini, 20 ") < text.index("Made by `python dev.py bench`.") < text.index("## sd3-mini, 30 ")
    assert text.index("## sd3-mini, 30 ") < text.index("Made by `another`.")


def test_what_is_ours_is_no_rival() -> None:
    own = [_point("ours-guarded", 0.3, [0.99], setting="draft"), _point("ours-calibrated", 0.3, [0.9], setting="cut=0.300")]
    points = [*own, _point("fora", 0.5, [0.9])]
    assert page.ours(points) == own
    assert [(one.rival["method"], one.outcome) for one in page.duels(points)] == [("fora", "out of reach")]
    text = page.render({**_data(), "points": points})
    assert text.count("A user reaches every setting of ours: by N, **quality**, or **cut**") == 2
    assert "chosen by these very captions" in text


def test_totals_tell_apart_our_ablation_other_solvers_few_captions_and_what_needs_a_policy() -> None:
    own = [_point("ours-calibrated", 0.5, [0.95] * 32), _point("ours-guarded", 0.4, [0.93] * 32)]
    few = [_point("ours-calibrated", 0.5, [0.95] * 8, steps=30), _point("fora", 0.4, [0.9] * 8, steps=30)]
    text = page.render({**_data(), "points": [*own, *few, *(
        _point(name, 0.4, [0.9] * 32) for name in ("fora", "fewer-steps-uni_pc", "chosen-steps"))]})
    assert "included | 4 | 0 | 0 | 0 |" in text
    assert "| all rivals | 3 | 0 | 0 | 0 |" in text
    assert "`fewer-steps-<sampler>` | 2 | 0 | 0 | 0 |" in text
    assert "on 32 captions or more | 2 | 0 | 0 | 0 |" in text
    assert "without a policy | 2 | 0 | 0 | 1 |" in text


def test_rivals_outside_the_range_of_cuts_do_not_count() -> None:
    rivals_ = [_point("fora", cut, [0.9]) for cut in (0.1, 0.149, 0.15, 0.5, 0.8, 0.801, 0.9)]
    assert [one.rival["cut"] for one in page.duels([_point("ours-auto", 0.5, [0.9]), *rivals_])] == [0.15, 0.5, 0.8]


@pytest.mark.parametrize(("gains", "outcome"), [
    ([0.0] * 4, "tie"), ([0.01, -0.002, 0.0, 0.0], "tie"), ([-0.01, 0.002, 0.0, 0.0], "tie"), ([0.001] * 4, "win"),
    ([-0.001] * 4, "loss"),
])
def test_differences_whose_interval_holds_0_are_ties(gains, outcome) -> None:
    mine = _point("ours-auto", 0.5, [0.9 + gain for gain in gains])
    assert figures.duel(_point("fora", 0.5, [0.9] * 4), [mine]).outcome == outcome


def test_worst_tenth_has_an_interval_and_what_is_surely_worse_is_listed() -> None:
    spread = [0.9 + 0.001 * k for k in range(20)]
    assert figures.tenth_gain(spread, spread) == (0.0, 0.0)
    assert figures.tenth_gain(spread, [value - 0.5 for value in spread])[0] == pytest.approx(0.5)
    mine = _point("ours-auto", 0.5, [0.5, 0.5, *[1.0] * 18])
    text = page.render({**_data(), "points": [mine, _point("fora", 0.5, [0.9] * 20)]})
    assert "| fora | 0 | 1 | 0 | 0 | 0 | 1 | 0 |" in text, "two lost pictures of twenty may be none of twenty others"


def test_page_says_what_was_not_measured() -> None:
    text = page.render({**_data(), "points": [_point("fora", 0.5, [0.9] * 4)]})
    assert "- wan-mini, 50 steps: nothing" in text
    assert "- sd3-mini, 20 steps: ours-paper" in text
    assert "- `python dev.py bench --real-size`" in text
    assert "fora" not in text[text.index("## Not measured") :].splitlines()[2]
    row = {"model": "dit-xl-2", "setting": "inactive", "compiled": False, "blocks": 28, "steps": 10, "tokens_scale": 1,
           "layers_scale": 1, "note": "", "dit_ms": 9.0, "full_dit_ms": 9.0, "cut": 0.0, "cut_arithmetic": 0.0, "peak_bytes": 0,
           "full_peak_bytes": 0, "command": "bench", "environment": {"device": "x86_64", "threads": 1}}
    for compiled in (False, True):
        found = {"rows": [row, row | {"compiled": compiled}]}
        text = page.render({**_data(), "points": [_point("fora", 0.5, [0.9] * 4)], "real_size": found})
        assert "| 0.0% | 0.0% | - |" in text
        assert ("- models of real size on a GPU" in text) is not compiled


def test_page_says_what_is_expected_of_every_boundary() -> None:
    about = {"model": "some", "steps": 7, "sampler": "euler", "depth": 4, "n": 4, "command": "bench --tails"}
    about |= {"environment": {"device": "a machine", "threads": 1}}
    rows = [
        {**about, "boundary": boundary, "cost": cost, "expected_db": [40.0, 30.0, 20.0, 10.0, None, None], "tail": tail}
        for boundary, cost, tail in (
            (1, 0.5, [1.0] * 4 + [None] * 2), (4, 0.0, [0.0] * 4 + [None] * 2), (None, None, [0.25] * 4 + [None] * 2))
    ]
    text = page.render(_data() | {"tails": {"rows": rows}})
    assert "## When the tail of live blocks pays" in text
    assert "| some, 7 steps | 2 of 4 blocks | 50.0% | 40.0 dB | 30.0 dB | 20.0 dB | 10.0 dB | - | - |" in text
    assert "| some, 7 steps | the whole model | 0.0% | 40.0 dB |" in text
    assert "| some, 7 steps | whatever is best |  | 40.0 dB (25% with a tail) |" in text
    assert "In short: on some at 7 steps a tail of live blocks pays at cuts of 20%, 30%, 40%, 50%." in text
    rows[-1]["tail"] = [0.0] * 4 + [None] * 2
    text = page.render(_data() | {"tails": {"rows": rows}})
    assert "on some at 7 steps a tail of live blocks pays at none of these cuts." in text
    assert "- `python dev.py bench --tails`" in page.render({**_data(), "points": [_point("fora", 0.5, [0.9] * 4)]})


def test_expected_of_a_boundary_alone_is_never_better_than_of_all_together() -> None:
    demo = loader.load_demo("sd3-mini")
    options = argparse.Namespace(**{**ARCHITECTURES["sd3-mini"].sampling, "steps": 6, "batch": 1})
    *alone, free = tails.measure(options, demo.name)
    assert [row["boundary"] for row in alone] == [7, 11, 15, 16]
    assert free["boundary"] is None
    for row in alone:
        for one, best in zip(row["expected_db"], free["expected_db"], strict=True):
            assert one is None or best >= one - 1e-6
    assert alone[0]["tail"][0] == 1
    assert alone[-1]["tail"][0] == 0
    assert "16 of 16 blocks" in tails.table([*alone, free])


def test_patterns_that_fit_no_method_are_refused() -> None:
    with pytest.raises(SystemExit, match=r"No method fits 'zzz'\. Known: ours-paper"):
        program.main(["--methods", "fora N=2", "zzz"])


def test_prompts_are_of_the_test_split_half_easy_half_hard() -> None:
    from demo import scenes

    texts = prompts.texts("sd3-mini", "test", 6, 0)
    assert [scenes.difficulty(text) for text in texts] == ["easy", "hard"] * 3
    assert all(scenes.parse(text).splits()[0] == scenes.SPLITS.index("test") for text in texts)


def test_latency_sweep_changes_one_thing_at_a_time() -> None:
    assert list(latency.sweep(4, 30)) == [
        (1, 30, 1.0), (2, 30, 1.0), (4, 30, 1.0), (8, 30, 1.0),
        (4, 20, 1.0), (4, 50, 1.0), (4, 100, 1.0),
        (4, 30, 1.5), (4, 30, 2.0),
    ]


@pytest.mark.parametrize("name", loader.MODELS)
def test_latency_is_measured_at_other_sizes_and_steps(name, monkeypatch, capsys, caplog, tmp_path) -> None:
    caplog.set_level(logging.WARNING)
    for what, values in (("BATCHES", (1,)), ("STEPS", (10,)), ("SCALES", (1.0, 1.5)), ("ROUNDS", 1)):
        monkeypatch.setattr(latency, what, values)
    target = tmp_path / "figures.json"
    page.save(target, {"latency": {"rows": [dict.fromkeys(latency.KEY, "another")]}})
    sampled = ["--latency", "--model", name, "--steps", "10", "--batch", "1", "--threads", "1", "--json", str(target)]
    for _ in range(2 if name == loader.MODELS[0] else 1):  # measured again, it takes the place of what was there
        assert program.main(sampled) == 0
    rows = json.loads(target.read_text(encoding="utf-8"))["latency"]["rows"]
    assert [(row["model"], row["scale"]) for row in rows] == [("another", "another"), (name, 1.0), (name, 1.5)]
    assert rows[-1]["command"].startswith("python dev.py bench --latency")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1:5] for line in printed[2:4]] == [
        ["ours-auto N=2", "1", "10", "1x"], ["ours-auto N=2", "1", "10", "1.5x"],
    ]


def test_a_small_benchmark_from_end_to_end_and_on_from_where_it_ended(tmp_path, capsys, caplog) -> None:
    caplog.set_level(logging.WARNING)  # the program sets the root's level; this puts it back
    target, lines = tmp_path / "figures.json", tmp_path / "points.jsonl"
    arguments = [
        "--steps", "6", "--prompts", "2", "--batch", "2", "--threads", "1", "--json", str(target), "--resume", str(lines),
        "--methods", "fora N=2", "teacache threshold=0.3", "easycache threshold=1.6", "fewer-steps share=0.5",
    ]
    assert program.main(arguments) == 0
    data = json.loads(target.read_text(encoding="utf-8"))
    points = {point["method"]: point for point in data["points"]}
    assert points["fora"]["cut_arithmetic"] == pytest.approx(3 / 6)
    assert points["fewer-steps"]["cut_arithmetic"] == 0.5
    assert 0 < points["teacache"]["cut_arithmetic"] < 1
    assert points["teacache"]["stored_bytes"] > 0
    assert 0 < points["easycache"]["cut_arithmetic"] < 1
    assert points["easycache"]["cut"] == pytest.approx(points["easycache"]["cut_arithmetic"]), "all of the model is skipped"
    assert points["fora"]["cut"] < points["fora"]["cut_arithmetic"], "what stands beside the blocks runs"
    assert all(point["n"] == len(point["prompt_psnr"]) == 2 and point["ssim"] < 1 for point in points.values())
    assert all(set(page.KEY) <= set(point) and point["command"].startswith("python dev.py bench") for point in points.values())
    assert "fora" in page.render(data)
    capsys.readouterr()
    assert program.main(arguments) == 0
    assert "fora" not in capsys.readouterr().out  # nothing is left to measure
    assert json.loads(target.read_text(encoding="utf-8"))["points"] == data["points"]


def test_a_model_of_real_size_is_measured_at_a_small_one(monkeypatch) -> None:
    size = real_size.MODELS["sd3-medium"]
    text = {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 64}}
    small = size.config | {"depth": 1, "adm_in_channels": 16, "context_embedder_config": text}
    monkeypatch.setitem(real_size.MODELS, "small", dataclasses.replace(size, config=small, text=(4, 32), pooled=16))
    monkeypatch.setattr(real_size, "ROUNDS", 1)
    options = SimpleNamespace(tokens_scale=0.1, layers_scale=0.25, steps=[4])
    rows = {row["setting"]: row for row in real_size.measure(options, "small")}
    assert rows["inactive"]["cut_arithmetic"] == 0
    assert rows["all blocks N=2"]["cut_arithmetic"] == 0.5
    assert rows["all blocks N=2"]["blocks"] == 6
    assert real_size.table(list(rows.values())).count("tokens x 0.1, layers x 0.25") == 3


@pytest.mark.parametrize(
    ("name", "billions", "depth"),
    [("sd3-medium", 2.0, 24), ("pixart-alpha", 0.6, 28), ("dit-xl-2", 0.6, 28), ("wan-2.1-1.3b", 1.4, 30), ("flux", 11.9, 57)],
)
def test_models_of_real_size_have_the_size_of_their_releases(name, billions, depth) -> None:
    import comfy.supported_models

    from blockdance_core import families

    size = real_size.MODELS[name]
    base = getattr(comfy.supported_models, size.base)
    config = base({**base.unet_config, **size.config})
    config.set_inference_dtype(torch.bfloat16, None)
    network = config.get_model({}, "", device="meta").diffusion_model
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e9 == pytest.approx(billions, rel=0.06)
    assert len(families.find(network).blocks) == depth


def _adaptive_row(**changes: Any) -> dict[str, Any]:
    return {
        "tradeoff": 4.0, "cut": 0.6, "cut_easy": 0.66, "cut_hard": 0.54, "apart_interval": (0.1, 0.14), "plans": 3,
        "ssim": 0.991, "static": 0.984, "gain": 0.007, "gain_interval": (0.002, 0.012),
        "alike": 0.988, "alike_gain": 0.003, "alike_interval": (-0.001, 0.007), "tenth": 0.97, "static_tenth": 0.94,
        "tenth_interval": (0.01, 0.05), **changes,
    }


def test_page_says_what_looking_at_the_picture_brings() -> None:
    found = {
        "model": "some", "steps": 30, "sampler": "euler", "n": 64, "split": "test", "seed": 0, "start": 6, "options": 15,
        "parameters": 200_000, "decision_ms": 4.0, "full_ms": 2000.0, "command": "python dev.py bench --adaptive",
        "environment": {"device": "a CPU"}, "rows": [_adaptive_row()], "training": {
            "pictures": 75, "held_out": 25, "reward": "ssim", "rollouts": 300.0, "calls": 9000.0, "minutes": 12.5,
            "command": "train"}}
    text = page.render(_data() | {"adaptive": {"some": found}})
    assert "64 test captions, half of them hard, seed 0" in text
    assert "Trained on 75 pictures, 25 more held out, reward ssim: 300 rollouts" in text
    assert "Deciding takes 4.0 ms of a full run's 2000 (0.20%)" in text
    assert ("| 4 | 60.0% | 66.0% / 54.0% | +10.0% to +14.0% | 3 | 0.9910 | 0.9840 | +0.0070 (+0.0020 to +0.0120) | 0.9880 | "
            "+0.0030 (-0.0010 to +0.0070) | 0.9700 | 0.9400 | +0.0300 (+0.0100 to +0.0500) |") in text
    assert "than static better at 1, worse at 0; in the worst tenth better at 1, worse at 0; than one for all" in text
    assert "look at the picture" not in page.render(_data())


def test_page_says_what_the_parts_of_the_training_are_worth() -> None:
    row = {"part": "as shipped", "variant": "all", "reward": 0.95, "cut": 0.6, "ssim": 0.99}
    row |= {"gain": 0.0, "gain_interval": (0, 0)}
    other = row | {"part": "rho", "variant": "0.4", "reward": 0.94, "gain": -0.01, "gain_interval": (-0.02, -0.005)}
    found = {
        "model": "some", "steps": 30, "sampler": "euler", "n": 48, "split": "test", "seed": 0, "pictures": 96, "seeds": 3,
        "command": "python dev.py bench --ablation", "rows": [row, other], "sharing": [{
            "start": 0.4, "rollouts": 21, "shared_calls": 400, "alone_calls": 600, "apart": 2e-7}]}
    text = page.render(_data() | {"ablation": {"some": found}})
    assert "48 test captions, seed 0; 96 pictures to train on, a quarter of them held out, 3 seeds" in text
    assert "| as shipped | all | 0.9500 | 60.0% | 0.9900 | - |" in text
    assert "| rho | 0.4 | 0.9400 | 60.0% | 0.9900 | -0.0100 (-0.0200 to -0.0050) |" in text
    assert "changes outcomes by 2e-07 at most. Of one batch, all options, in calls of the model: rho = 0.4: 400" in text
    assert "parts of their training" not in page.render(_data())


def test_ablation_trains_on_outcomes_that_were_sampled_once(monkeypatch, tmp_path, caplog) -> None:
    """With few schedules, of which the tail's are the same with a smaller boundary."""
    caplog.set_level(logging.WARNING)  # the program sets the root's level; this puts it back

    def few(entry, start):
        options = [plan for plan in dict.fromkeys(plan[start:] for plan in ((None,) * entry.steps, *entry.plans))
                   if sum(map(bool, plan)) in (0, 14, 20)]
        return (training.Segment(start, tuple(options)),)

    def tail(name, shipped, threads):
        return dataclasses.replace(shipped.entry, plans=tuple(
            tuple(row and dataclasses.replace(row, boundary=11) for row in plan) for plan in shipped.entry.plans))

    variants = (ablation.VARIANTS[0], *(one for one in ablation.VARIANTS[1:] if one.settings or one.tail or not one.text))
    for name, value in (("VARIANTS", variants), ("SEEDS", 1), ("_with_tail", tail)):
        monkeypatch.setattr(ablation, name, value)
    monkeypatch.setattr(training, "one_choice", few)
    sampled = []
    real = Pictures._outcomes
    monkeypatch.setattr(Pictures, "_outcomes", lambda self, k, chosen: sampled.append(k) or real(self, k, chosen))
    target = tmp_path / "figures.json"
    sizes = ["--prompts", "2", "--train", "4", "--batch", "2", "--threads", "1"]
    assert program.main(["--ablation", *sizes, "--json", str(target)]) == 0
    found = json.loads(target.read_text(encoding="utf-8"))["ablation"]["sd3-mini"]
    assert [row["part"] for row in found["rows"]] == ["as shipped", "sight", "gradient", "baseline", "boundary", "sight"]
    assert found["rows"][0]["gain"] == 0
    assert all(0 < row["cut"] < row["reward"] < row["ssim"] <= 1 for row in found["rows"])
    (shared,) = found["sharing"]
    assert shared["apart"] < 1e-4
    assert shared["shared_calls"] == shared["alone_calls"], "three recorded steps are needed, there are three before"
    options = shared["rollouts"]  # those of the tail as many again, but for computing everything
    assert len(sampled) == 3 * (2 * options - 1) + 2 * options, "two batches to train on and one to test, then the sharing"


def test_only_schedules_that_none_of_the_others_beats_count_as_one_for_all() -> None:
    similarity = np.array([[1.0], [0.8], [0.9], [0.5]])
    assert adaptive._unbeaten([(0.0, 0), (0.3, 1), (0.4, 2), (0.6, 3)], similarity) == [(0.0, 0), (0.4, 2), (0.6, 3)]


def test_static_of_a_cut_between_two_levels_is_their_mean_by_lot() -> None:
    similarity = np.array([[1.0, 1.0], [0.9, 0.8], [0.5, 0.4]])
    levels = [(0.0, 0), (0.4, 1), (0.6, 2)]
    assert adaptive._static(levels, similarity, 0.2).tolist() == pytest.approx([0.95, 0.9])
    assert adaptive._static(levels, similarity, 0.55).tolist() == pytest.approx([0.6, 0.5])
    assert adaptive._static(levels, similarity, 0.9).tolist() == pytest.approx([0.5, 0.4])
