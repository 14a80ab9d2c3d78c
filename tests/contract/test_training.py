"""A training on a model: what it costs, what the network is shown in it, and that it goes on exactly where it was stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import pytest
import safetensors.torch
import torch
from comfy.nested_tensor import NestedTensor
from harness import last_run, model_of
from PIL import Image
from tiny import CASES, Case
from tiny.sampling import _unpacked
from torch import Tensor

from blockdance_core.config import Config, ConfigError
from blockdance_core.forecast import FORECASTS
from blockdance_core.host import checkpoint as checkpoints
from blockdance_core.host import processes as several
from blockdance_core.host import training
from blockdance_core.host.attach import attach
from blockdance_core.host.pictures import Pictures
from blockdance_core.host.rewards import Fidelity
from blockdance_core.host.rollout import Prompt, sigmas_of
from blockdance_core.host.training import Design, candidates, designed, measured_costs, train
from blockdance_core.policy import AdaptivePolicy, Calibrated, SchedulePolicy, load
from blockdance_core.policy.training import Settings
from blockdance_core.schedule import Plan, Reuse

CASE = CASES["sd3"]
STEPS = 10
START = 4
COSTS = dict.fromkeys(range(CASE.depth), 0.25)
EXACT = Design(start=0.4)
SAMPLED = Design(choices="steps", start=0.2, boundaries=(3,))  # 128 choices: too many to try all
BRIEF = Settings(tradeoffs=(0.02, 8.0), epochs=3, pictures=4, rate=3e-3)
GROUPS = Settings(tradeoffs=(0.02, 8.0), epochs=3, pictures=2, group=2, rate=1e-2)


def prompts(count: int = 4, case: Case = CASE, **changes: Any) -> list[Prompt]:
    """Batches of two pictures, each with a text and a seed of its own."""
    batch = case.rows(2)
    made = []
    for k in range(count):
        positive, negative = case.conds(model_of(case), 1, k)
        latent = _unpacked(case, case.latent(batch, k))
        made.append(Prompt(positive, negative, latent, k, STEPS, 3.0, "euler", "simple"))
    return [dataclasses.replace(one, **changes) for one in made]


def calibrated(prompt: Prompt) -> SchedulePolicy:
    """Two schedules, for the steps of this prompt."""
    uniform = designed(model_of(CASE), prompt, None, EXACT, 1).base
    deep, shallow = Reuse(6, FORECASTS["delta"]), Reuse(2, FORECASTS["taylor2"])
    plans: tuple[Plan, ...] = tuple((*[None] * START, *[row, None] * 3) for row in (shallow, deep))
    entry = dataclasses.replace(uniform.entries[0], plans=plans, cuts=(0.1, 0.25), losses=(0.0, 0.0))
    return SchedulePolicy("calibrated", uniform.family, uniform.depth, (entry,))


def trained(path: Path, design: Design = EXACT, **changes: Any) -> tuple[AdaptivePolicy, dict[str, Any]]:
    settings, count = (BRIEF, 4) if design == EXACT else (GROUPS, 3)
    return train(model_of(CASE), **{
        "prompts": prompts(count), "path": path, "design": design, "settings": settings, "costs": COSTS, **changes})


def real_run(policy: AdaptivePolicy, prompt: Prompt, case: Case = CASE) -> tuple[Tensor, dict[str, Any]]:
    """What a KSampler node makes of a prompt with a policy, and the run's record."""
    model = attach(model_of(case), Config(policy=policy, group_size=8))
    noise = comfy.sample.prepare_noise(prompt.latent, prompt.seed)
    result = comfy.sample.sample(
        model, noise, prompt.steps, prompt.cfg, prompt.sampler, prompt.scheduler, prompt.positive, prompt.negative,
        prompt.latent, disable_pbar=True, seed=prompt.seed)
    return result, last_run(model)


def tensors(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path)


def assert_same_file(one: Path, other: Path) -> None:
    """Bit for bit, whatever the time says that it took."""
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    with safetensors.safe_open(one, "pt") as first, safetensors.safe_open(other, "pt") as second:
        metadata = [dict(file.metadata()) for file in (first, second)]
    assert metadata[0]["level_cuts"] == metadata[1]["level_cuts"]


# From end to end


@pytest.mark.parametrize("with_base", [False, True], ids=["uniform", "calibrated"])
@pytest.mark.parametrize("design", [EXACT, SAMPLED], ids=["schedules", "steps"])
def test_training_writes_a_policy_that_decides_and_its_curve(design: Design, with_base: bool, tmp_path: Path) -> None:
    base = calibrated(prompts(1)[0]) if with_base else None
    path = tmp_path / "new" / "looks.safetensors"
    policy, record = trained(path, design, base=base)
    assert sorted(os.listdir(path.parent)) == ["looks.png", "looks.safetensors"]
    assert Image.open(path.with_suffix(".png")).size == (960, 300)
    loaded = load(path)
    assert isinstance(loaded, AdaptivePolicy)
    assert (loaded.name, loaded.base.family, loaded.base.depth) == ("looks", "SD3", 8)
    assert loaded.record == json.loads(json.dumps(record)) == json.loads(json.dumps(policy.record))
    assert (loaded.cuts, loaded.segments, loaded.start) == (policy.cuts, policy.segments, START if design == EXACT else 2)
    assert loaded.cuts[0] < loaded.cuts[-1], "the two trade-offs are two levels"
    assert loaded.base.entries[0].plans == (base.entries[0].plans if base else policy.entry.plans)
    result, run = real_run(loaded, prompts(9)[8])
    assert torch.isfinite(result).all()
    assert (run["adaptive"]["step"], run["warnings"], run["fallbacks"]) == (loaded.start, [], {})
    allowed = {"".join("R" if row else "C" for row in loaded.plan(one)) for one in candidates(loaded)}
    assert len(run["adaptive"]["decisions"]) == 2
    assert design == SAMPLED or set(run["adaptive"]["decisions"]) <= allowed
    assert all(plan[: loaded.start] == "C" * loaded.start for plan in run["adaptive"]["decisions"])


@pytest.mark.parametrize("name", ["cosmos_t2v", "ltxav", "undeclared"])
def test_pictures_clips_nested_latents_and_models_without_text_are_trained_on(name: str, tmp_path: Path) -> None:
    if name not in CASES:
        pytest.skip(f"this host has no {name}")
    case = CASES[name]
    policy, record = train(
        model_of(case), prompts(2, case), tmp_path / "a.safetensors", design=EXACT, settings=BRIEF,
        costs=dict.fromkeys(range(case.depth), 0.25))
    assert record["pictures"] == 2 * case.rows(2)
    _, run = real_run(policy, prompts(3, case)[2], case)
    assert run["adaptive"]["step"] == START


def test_training_in_inference_mode_as_in_the_hosts_server_gives_the_same(whole: dict[Design, Path], tmp_path: Path) -> None:
    with torch.inference_mode():
        policy, _ = trained(tmp_path / "a.safetensors", prompts=prompts())
    assert_same_file(tmp_path / "a.safetensors", whole[EXACT])
    assert not any(parameter.is_inference() for parameter in policy.network.parameters())


def test_record_tells_what_was_done_and_is_plain_data(tmp_path: Path) -> None:
    base = calibrated(prompts(1)[0])
    policy, record = trained(tmp_path / "looks.safetensors", base=base, record={"files": ["sd3"]})
    json.dumps(record, allow_nan=False)
    assert record["files"] == ["sd3"]
    assert record["prompts"] == [[k, 2, 3.0] for k in range(4)]
    assert (record["pictures"], record["training_pictures"], record["held_out_pictures"]) == (8, 6, 2)
    assert (record["reward"], record["trained"], record["options"]) == ("fidelity", "euler simple 10", [3])
    assert record["design"] == dataclasses.asdict(EXACT)
    assert record["settings"] == dataclasses.asdict(BRIEF)
    assert record["costs"] == {"2": 0.25, "6": 0.25}
    assert (record["processes"], record["device"], record["passes"]) == (1, "cpu", 3)
    assert 0 <= record["best_pass"] <= 3
    assert [row["epoch"] for row in record["curve"]] == [0, 1, 2, 3]
    best = dict(zip(BRIEF.tradeoffs, record["curve"][record["best_pass"]]["held_out"], strict=True))
    assert sorted(record["tradeoffs"]) == sorted(best)
    assert record["held_out"] == pytest.approx([best[weight] for weight in record["tradeoffs"]], abs=1e-4)
    assert len(record["held_out_alike"]) == len(policy.cuts) == 2
    assert record["parameters"] == sum(parameter.numel() for parameter in policy.network.parameters())
    full, runs = 4, 4 * 3  # every choice of every batch once
    shared = START - 3  # taylor2 looks back on three steps
    assert record["cost"]["rollouts"] == full + runs
    assert record["cost"]["calls"] == (full * STEPS + runs * (STEPS - shared)) * CASE.calls()
    assert record["cost"]["seconds"] > 0


def test_curve_in_the_record_is_thinned() -> None:
    curve = [{"epoch": k + 1, "reward": [0.123456789], "held_out": [1.0], "cut": [0.5]} for k in range(1000)]
    thin = training._thinned(curve)
    assert len(thin) == 100
    assert thin[1] == {"epoch": 11, "reward": [0.12346], "held_out": [1.0], "cut": [0.5]}


# Rollouts


@pytest.mark.parametrize(("sampler", "forecast"), [
    ("euler", "hold"), ("euler", "taylor2"), ("heun", "taylor2"), ("dpmpp_2m", "taylor"), ("dpmpp_2s_ancestral", "delta"),
])
def test_sharing_the_first_steps_gives_the_same_outcomes_with_fewer_calls(sampler: str, forecast: str) -> None:
    like = prompts(2, sampler=sampler)
    design = Design(choices="steps", start=0.5, boundaries=(3, 6), forecast=forecast)
    policy = designed(model_of(CASE), like[0], None, design, 1)
    chosen = [(0,) * 5, (1, 0, 2, 0, 0), (2, 2, 0, 1, 0)]
    pairs = [(picture, one) for picture in (0, 3) for one in chosen]
    found, calls = {}, {}
    for share in (True, False):
        pictures = Pictures(model_of(CASE), like, [["", ""]] * 2, policy, Fidelity(), COSTS, share)
        told: list[Any] = []
        found[share] = pictures.ask(pairs, told.append)
        calls[share] = pictures.calls
        assert pictures.rollouts == 2 * (1 + len(chosen))
        assert [len(one) for one in told] == [2 * len(chosen)] * 2, "of the other samples, too"
    assert found[True] == found[False]
    assert found[True][0] == (1.0, 0.0)
    assert all(quality < 1 for quality, cut in found[True] if cut)
    assert [cut for _, cut in found[True][:3]] == pytest.approx([0.0, 0.15, 0.225])
    history = FORECASTS[forecast].order + 1
    per_step = 2 if sampler in ("heun", "dpmpp_2s_ancestral") else 1
    saved = 2 * len(chosen) * (5 - history) * per_step * CASE.calls()
    assert calls[True] == pytest.approx(calls[False] - saved, abs=2 * len(chosen) * (per_step - 1))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "uni_pc"])
def test_network_reads_in_training_what_it_is_shown_in_a_run(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_readings(CASE, prompts(2, sampler=sampler), monkeypatch)


def test_sampler_that_shows_too_little_before_the_network_looks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dpm_fast evaluates .* choose a larger start"):
        trained(tmp_path / "a.safetensors", prompts=prompts(2, sampler="dpm_fast"), design=Design(start=0.2))


def test_training_does_not_go_on_with_other_extras_of_a_prompt() -> None:
    policy = designed(model_of(CASE), prompts(1)[0], None, EXACT, 1)
    digests = set()
    for value in (0.0, 1.0):
        like = prompts(1)
        positive = [[text, {**more, "pooled_output": torch.full((1, 4), value)}] for text, more in like[0].positive]
        digests.add(checkpoints.digest(model_of(CASE), [dataclasses.replace(like[0], positive=positive)], [["", ""]], policy))
    assert len(digests) == 2
    nested = [NestedTensor((torch.zeros(1, 2), torch.full((1, 3), value))) for value in (0.0, 1.0)]
    assert [[len(one.flatten()) for one in checkpoints._tensors({"latent": [latent]})] for latent in nested] == [[2, 3]] * 2


@pytest.mark.parametrize("name", ["cosmos_t2v", "ltxav", "undeclared"])
def test_network_reads_other_latents_and_texts_as_in_a_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in CASES:
        pytest.skip(f"this host has no {name}")
    check_readings(CASES[name], prompts(2, CASES[name]), monkeypatch)


def test_network_reads_several_texts_of_different_length_as_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    like = prompts(2)
    positive, negative = CASE.conds(model_of(CASE), 1, 7, True)
    like[1] = dataclasses.replace(like[1], positive=positive + negative, negative=negative)
    check_readings(CASE, like, monkeypatch)


def check_readings(case: Case, like: Sequence[Prompt], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = designed(model_of(case), like[0], None, EXACT, 2)
    pictures = Pictures(model_of(case), like, [["", ""]] * len(like), policy, Fidelity(), COSTS, True)
    readings = pictures.with_texts(pictures.readings(policy.network, lambda: None))
    shown: list[Any] = []

    def decide(sight: Any) -> Tensor:
        shown.append(policy.network.read(sight))
        return torch.zeros(len(shown[-1][0]), policy.network.shape.outputs)

    monkeypatch.setattr(policy.network, "decide", decide)
    for prompt in like:
        _, run = real_run(policy, prompt, case)
        assert run["adaptive"]["step"] == START
    assert len(shown) == len(like), "it looks once"
    rows = [(cells[row], places, None if words is None else words[row])
            for cells, places, words in shown for row in range(len(cells))]
    assert len(readings) == len(rows) == len(like) * case.rows(2)
    for ours, theirs in zip(readings, rows, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


def test_costs_are_measured_where_they_are_not_given_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = measured_costs(model_of(CASE), prompts(1)[0], [0, 7])
    assert costs.keys() == {0, 7}
    assert all(0 < cost <= 1 for cost in costs.values())
    monkeypatch.setattr(training, "measured_costs", lambda model, prompt, boundaries: dict.fromkeys(boundaries, 0.5))
    with pytest.raises(Stopped):
        trained(tmp_path / "a.safetensors", costs=None, progress=Stop("pictures", 1))
    monkeypatch.setattr(training, "measured_costs", None)  # they are in the checkpoint
    _, record = trained(tmp_path / "a.safetensors", costs=None)
    assert set(record["costs"].values()) == {0.5}


def test_candidates_are_the_schedules_and_computing_everything() -> None:
    like = prompts(1)[0]
    base = calibrated(like)
    policy = designed(model_of(CASE), like, base, EXACT, 1)
    assert candidates(policy) == [(0,), (1,), (2,)]
    every = designed(model_of(CASE), like, base, dataclasses.replace(SAMPLED, boundaries=(2, 6)), 1)
    assert candidates(every) == [(0,) * 8, (0, 0, 1, 0, 1, 0, 1, 0), (0, 0, 2, 0, 2, 0, 2, 0)]


# Interruptions


class Stopped(Exception):
    """What a progress bar raises when the user wants no more."""


class Stop:
    """A progress bar that raises at the `at`-th report of a part of the work."""

    def __init__(self, what: str, at: int) -> None:
        self.what, self.at = what, at

    def __call__(self, what: str, done: int, of: int, curve: Sequence[dict[str, Any]]) -> None:
        assert 0 < done <= of
        self.at -= what == self.what
        if not self.at:
            raise Stopped


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The rollouts that are finished, as (prompt, choice)."""
    done: list[Any] = []
    original = Pictures._outcomes

    def outcomes(self: Pictures, k: int, chosen: Any) -> Any:
        found = original(self, k, chosen)
        done.append((k, chosen))
        return found

    monkeypatch.setattr(Pictures, "_outcomes", outcomes)
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[Design, Path]:
    """Files of trainings that nobody interrupted."""
    paths = {design: tmp_path_factory.mktemp("whole") / "a.safetensors" for design in (EXACT, SAMPLED)}
    for design, path in paths.items():
        trained(path, design)
    return paths


def record_of(path: Path) -> dict[str, Any]:
    policy = load(path)
    return dict(policy.record)


@pytest.mark.parametrize(("design", "what", "at"), [
    (EXACT, "full runs", 2), (EXACT, "pictures", 3), (EXACT, "passes", 1), (SAMPLED, "full runs", 3),
    (SAMPLED, "pictures", 2), (SAMPLED, "pictures", 8), (SAMPLED, "pictures", 10), (SAMPLED, "passes", 2),
], ids=lambda value: None if not isinstance(value, Design) else value.choices)
def test_interrupted_training_goes_on_exactly_and_repeats_no_rollout(
    design: Design, what: str, at: int, whole: dict[Design, Path], tmp_path: Path, asked: list[Any]
) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(Stopped):
        trained(path, design, progress=Stop(what, at))
    assert not path.exists()
    before = len(asked)
    assert (before > 0) == (what != "full runs")
    _, record = trained(path, design)
    assert len(asked) == len(set(asked))
    assert sorted(os.listdir(tmp_path)) == ["a.png", "a.safetensors"]
    assert_same_file(path, whole[design])
    uninterrupted = record_of(whole[design])
    assert record["curve"] == json.loads(json.dumps(uninterrupted["curve"]))
    full_runs = uninterrupted["cost"]["rollouts"] - len(asked)
    assert full_runs == (4 if design == EXACT else 3)
    assert full_runs <= record["cost"]["rollouts"] - len(asked) <= 2 * full_runs, "of both calls; full runs may be made again"


@pytest.mark.parametrize("at", [2, 9])
def test_hosts_interrupt_within_a_rollout_keeps_what_is_known(
    at: int, whole: dict[Design, Path], tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, count = Pictures._outcomes, 0

    def outcomes(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            comfy.model_management.interrupt_current_processing()
            comfy.model_management.throw_exception_if_processing_interrupted()
        return counted(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Pictures, "_outcomes", outcomes)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            trained(tmp_path / "a.safetensors")
    trained(tmp_path / "a.safetensors")
    assert len(asked) - len(set(asked)) < 5, "at most those of the prompt that was under way"
    assert_same_file(tmp_path / "a.safetensors", whole[EXACT])


def test_training_may_be_interrupted_again_and_again(whole: dict[Design, Path], tmp_path: Path, asked: list[Any]) -> None:
    path, stops = tmp_path / "a.safetensors", 0
    while not path.exists():
        with contextlib.suppress(Stopped):
            trained(path, SAMPLED, progress=Stop("pictures", 1))
        stops += 1
        assert stops < 50
    assert stops > 5
    assert len(asked) == len(set(asked))
    assert_same_file(path, whole[SAMPLED])


@pytest.mark.parametrize("design", [EXACT, SAMPLED], ids=["schedules", "steps"])
def test_any_checkpoint_written_on_the_way_will_do(
    design: Design, whole: dict[Design, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_SAVED_EVERY", 0.0)
    path = tmp_path / "a.safetensors"
    found: list[bytes] = []

    def progress(*_: Any) -> None:
        checkpoint = path.with_name("a.safetensors.training")
        if checkpoint.is_file() and (data := checkpoint.read_bytes()) not in found:
            found.append(data)

    trained(path, design, progress=progress)
    assert_same_file(path, whole[design])
    monkeypatch.undo()
    assert len(found) > 5
    for k, data in enumerate(found[:: 3 if design == EXACT else 7]):  # as if the machine had gone down
        other = tmp_path / str(k) / "a.safetensors"
        other.parent.mkdir()
        other.with_name("a.safetensors.training").write_bytes(data)
        trained(other, design)
        assert_same_file(other, whole[design])


def test_training_that_is_broken_off_between_two_lines_goes_on_exactly(
    whole: dict[Design, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes anywhere: here, when the weights have changed and the pictures are not yet crossed off."""
    path, update, left = tmp_path / "a.safetensors", torch.optim.AdamW.step, 2

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        done = update(*args, **kwargs)
        if not left:
            raise KeyboardInterrupt
        return done

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(KeyboardInterrupt):
            trained(path)
    trained(path)
    assert_same_file(path, whole[EXACT])


def test_resumed_training_keeps_no_more_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    class Watched(Pictures):
        def _outcomes(self, *args: Any) -> Any:
            found = super()._outcomes(*args)
            full = [run.full for run in self._full.values()]
            held.append(sum(len(one.entered) + len(one.estimates) + sum(map(len, one.predicted)) for one in full) // len(full))
            return found

    monkeypatch.setattr(training, "Pictures", Watched)
    trained(tmp_path / "whole.safetensors")
    usual = held[-1]
    path = tmp_path / "a.safetensors"
    with pytest.raises(Stopped):
        trained(path, progress=Stop("pictures", 1))
    trained(path)
    assert held[-1] == usual


def test_checkpoint_of_other_weights_is_refused(tmp_path: Path) -> None:
    """Stopped, another checkpoint chosen in the loader, queued again: outcomes of two models must not be mixed."""
    path, weights = tmp_path / "a.safetensors", list(model_of(CASE).model.diffusion_model.parameters())
    with pytest.raises(Stopped):
        trained(path, progress=Stop("pictures", 1))
    with torch.no_grad():
        weights[-1].mul_(2)
        try:
            with pytest.raises(ConfigError, match="is of another training"):
                trained(path)
        finally:
            weights[-1].div_(2)
    trained(path)


def test_reward_that_gives_no_number_is_named_before_anything_is_sampled_in_vain(tmp_path: Path) -> None:
    class Broken:
        name, reads = "broken", False

        def __call__(self, results: Tensor, full: Tensor, texts: Sequence[str]) -> Tensor:
            return torch.full((len(texts),), torch.nan)

    reports: list[Any] = []
    with pytest.raises(ConfigError, match=r"The reward broken gave \[nan, nan\] for prompt 1: expected finite numbers"):
        trained(tmp_path / "a.safetensors", reward=Broken(), progress=lambda *report: reports.append(report))
    assert not reports
    assert not os.listdir(tmp_path)


def test_network_too_large_for_a_file_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a policy file has at most 256: choose a smaller width or depth"):
        trained(tmp_path / "a.safetensors", dataclasses.replace(EXACT, width=4096, depth=8), settings=BRIEF, prompts=prompts(4))


@pytest.mark.parametrize("changes", [
    {"settings": dataclasses.replace(BRIEF, rate=1e-2)}, {"design": dataclasses.replace(EXACT, width=16)},
    {"prompts": [dataclasses.replace(one, seed=one.seed + 1) for one in prompts()]}, {"prompts": prompts(3)},
    {"prompts": prompts(cfg=4.0)}, {"texts": [["a red fox", "a dog"]] * 4},
    {"base": calibrated(prompts(1)[0])},
], ids=["rate", "width", "seeds", "fewer", "cfg", "texts", "base"])
def test_checkpoint_of_another_training_is_refused_and_stays(changes: dict[str, Any], tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "a.safetensors", tmp_path / "a.safetensors.training"
    with pytest.raises(Stopped):
        trained(path, progress=Stop("pictures", 1))
    data = checkpoint.read_bytes()
    with pytest.raises(ConfigError, match=r"a\.safetensors\.training is of another training, .* Remove it, or choose"):
        trained(path, **changes)
    assert checkpoint.read_bytes() == data
    trained(path)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "a.safetensors"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_damaged_checkpoint_is_refused_and_stays(share: float, tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "a.safetensors", tmp_path / "a.safetensors.training"
    with pytest.raises(Stopped):
        trained(path, progress=Stop("pictures", 1))
    data = checkpoint.read_bytes()
    data = data[: int(share * len(data))]
    checkpoint.write_bytes(data)
    with pytest.raises(ConfigError, match=r"Cannot go on from .*\.safetensors\.training: it is damaged .* Remove it, or"):
        trained(path)
    assert checkpoint.read_bytes() == data


def test_a_full_disk_leaves_no_part_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any, path: Path) -> None:
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        trained(tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []


def test_checkpoint_does_not_grow_with_the_length_of_texts(tmp_path: Path) -> None:
    """A thousand long prompts would be gigabytes, written anew every minute."""
    sizes = []
    for words in (2, 2000):
        like = prompts(4)
        for k, one in enumerate(like):
            positive = [[text[:, :1].expand(-1, words, -1).clone(), more] for text, more in one.positive]
            like[k] = dataclasses.replace(one, positive=positive)
        path = tmp_path / f"{words}.safetensors"
        with pytest.raises(Stopped):
            trained(path, prompts=like, progress=Stop("pictures", 1))
        sizes.append(path.with_name(f"{words}.safetensors.training").stat().st_size)
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_checkpoint_holds_no_code(tmp_path: Path) -> None:
    checkpoint = tmp_path / "a.safetensors.training"
    torch.save({"about": Path(), "trainer": {}}, checkpoint)
    with pytest.raises(ConfigError, match="damaged"):
        trained(tmp_path / "a.safetensors")


# What is refused


def _base(**changes: Any) -> SchedulePolicy:
    base = calibrated(prompts(1)[0])
    entry: Calibrated = dataclasses.replace(base.entries[0], **changes)
    return dataclasses.replace(base, entries=(entry,))


@pytest.mark.parametrize(("changes", "message"), [
    (lambda: {"prompts": prompts(1)}, "1 prompt is too few"),
    (lambda: {"prompts": []}, "0 prompt"),
    (lambda: {"prompts": [*prompts(1), *prompts(1, sampler="heun")]}, "not sampled alike"),
    (lambda: {"prompts": [*prompts(1), *prompts(1, scheduler="karras")]}, "not sampled alike"),
    (lambda: {"prompts": [*prompts(1), *prompts(1, steps=12)]}, "not sampled alike"),
    (lambda: {"prompts": prompts(2, steps=8)}, "8 steps are too few to decide anything: train with 9 or more"),
    (lambda: {"prompts": prompts(2, steps=12), "base": _base()}, "no schedule for 12 steps of .*only for: euler simple 10"),
    (lambda: {"prompts": prompts(2, sampler="heun"), "base": _base()}, "no schedule for 10 steps of heun"),
    (lambda: {"base": dataclasses.replace(_base(), family="Flux")}, "was calibrated for Flux"),
    (lambda: {"base": dataclasses.replace(_base(), depth=9)}, "with 9 blocks"),
    (lambda: {"design": Design(start=0.9)}, "start = 0.9 leaves no step to decide"),
    (lambda: {"design": Design(start=1.5)}, "start = 1.5 leaves no step to decide"),
    (lambda: {"design": Design(choices="steps", boundaries=(9,))}, r"boundaries \[9\] must be 0 to 7, or 8 for the whole"),
    (lambda: {"design": Design(choices="steps", boundaries=(-1, 3))}, r"boundaries \[-1, 3\] must be 0 to 7"),
    (lambda: {"design": Design(choices="both")}, "choices = 'both' is not valid: expected one of schedules, steps"),
    (lambda: {"design": Design(width=30)}, "multiple of its 4 heads"),
])
def test_what_does_not_fit_is_refused_before_anything_is_sampled(
    changes: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = changes()
    monkeypatch.setattr(training, "Rollouts", None)
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path / "a.safetensors", **given)
    assert os.listdir(tmp_path) == []


def test_levels_of_a_run_are_those_of_its_sampler() -> None:
    like = prompts(1)[0]
    assert len(sigmas_of(model_of(CASE), like)) == STEPS + 1
    assert designed(model_of(CASE), like, None, EXACT, 1).entry.steps == STEPS


# Several processes

PROCESS = """
import sys
sys.path += {folders!r}
from host import launcher
launcher.enter("--cpu")
import torch
torch.set_num_threads(1)
import test_training
test_training.share_of_a_process({folder!r})
"""


def share_of_a_process(folder: str) -> None:
    """Train as one of several processes: once to the end, and once until it is interrupted."""
    training._SAVED_EVERY = 0.0
    with several.processes():
        assert several.world() == 2
        _, record = trained(Path(folder) / "both.safetensors")
        assert record["processes"] == 2
        try:
            trained(Path(folder) / "rest.safetensors", progress=Stop("pictures", 2))
        except Stopped:
            return
    raise AssertionError("it was not interrupted")


def test_two_processes_give_what_one_gives(whole: dict[Design, Path], tmp_path: Path, asked: list[Any]) -> None:
    from host.server import take_port

    here = Path(__file__).resolve().parent
    code = PROCESS.format(folders=[str(here), str(here.parent), str(here.parents[1])], folder=str(tmp_path))
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(take_port(None)),
              "OMP_NUM_THREADS": "1"}
    processes = []
    try:
        for rank in range(2):
            with (tmp_path / f"{rank}.log").open("wb") as log:
                processes.append(subprocess.Popen(
                    [sys.executable, "-c", code], cwd=tmp_path, env={**common, "RANK": str(rank)}, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=subprocess.STDOUT))
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = [(tmp_path / f"{rank}.log").read_text(encoding="utf-8", errors="replace") for rank in range(2)]
    assert codes == [0, 0], "\n".join(said)
    assert_same_file(tmp_path / "both.safetensors", whole[EXACT])
    record = record_of(tmp_path / "both.safetensors")
    assert record["cost"]["rollouts"] == record_of(whole[EXACT])["cost"]["rollouts"]
    assert (tmp_path / "rest.safetensors.training").is_file()
    trained(tmp_path / "rest.safetensors")
    assert_same_file(tmp_path / "rest.safetensors", whole[EXACT])
    assert 0 < len(asked) < record["cost"]["rollouts"] - 4, "one process takes over what both found out"
