"""A policy that looks: once, at its step; samples that decide differently go on as if each had been sampled alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from comfy.nested_tensor import NestedTensor
from harness import STEPS, accelerate, assert_close, every_family, last_run, model_of, runs
from tiny import CASES, Case, count_calls, sample, sample_custom
from torch import Tensor

from blockdance_core.config import ConfigError
from blockdance_core.forecast import FORECASTS
from blockdance_core.host.attach import handle_of
from blockdance_core.host.levels import noise_levels
from blockdance_core.policy import AdaptivePolicy, Calibrated, Fixed, SchedulePolicy
from blockdance_core.policy.adaptive import Segment
from blockdance_core.policy.network import DecisionNetwork, NetworkShape, Sight
from blockdance_core.schedule import Plan, Reuse
from blockdance_core.session import Session

START = 4
CUT = 0.2
FAMILIES = {case.family: case for case in reversed(CASES.values())}.values()
BATCHED = [case for case in FAMILIES if case.name != "minimax_h3"]  # the host refuses a batch there


def plans_of(depth: int) -> tuple[Plan, ...]:
    """Of 10 steps: one that reuses from the decision on, one that reuses often, one that computes."""
    low, high = Reuse(0, FORECASTS["delta"]), Reuse(depth - 2, FORECASTS["taylor2"])
    return (
        (*[None] * START, high, high, None, high, high, None),
        (*[None] * START, None, low, low, None, low, None),
        (None,) * STEPS,
    )


def adaptive(case: Case, **changes: Any) -> AdaptivePolicy:
    """Chooses among `plans_of`, with a network that likes the first best."""
    model = model_of(case)
    run = accelerate(model)
    sample(run, case, steps=STEPS)
    handle = handle_of(run)
    assert handle is not None
    levels = noise_levels(model.get_model_object("model_sampling"), last_run(run)["sigmas"])
    entry = Calibrated("euler", "simple", tuple(levels), (plans_of(case.depth)[1],), (CUT,), (0.0,))
    base = SchedulePolicy("static", handle.family, case.depth, (entry,))
    latent = case.latent(1, 0)
    text = case.conds(model, 1, 0, False)[0][0][0]
    nested = isinstance(latent, NestedTensor) or not isinstance(latent, Tensor)
    shape = NetworkShape(1 if nested else latent.shape[1], 0 if text is None or text.ndim != 3 else text.shape[2], 3)
    network = DecisionNetwork(shape).eval()
    network.out.bias.data[0] = 1.0
    options = tuple(plan[START:] for plan in plans_of(case.depth))
    return AdaptivePolicy(**{
        "base": base, "trained": 0, "segments": (Segment(START, options),), "cuts": (CUT,), "network": network, "name": "looks",
        **changes})


def choosing(policy: AdaptivePolicy, monkeypatch: pytest.MonkeyPatch, *options: int) -> list[Any]:
    """Let samples choose these options; returns what the network was shown."""
    seen: list[Any] = []

    def decide(sight: Any) -> Tensor:
        seen.append(sight)
        policy.network.read(sight)
        return torch.eye(3)[list(options)]

    monkeypatch.setattr(policy.network, "decide", decide)
    return seen


@pytest.mark.smoke
@every_family
def test_what_the_network_decides_is_done_as_if_it_had_been_known_before(case: Case) -> None:
    policy = adaptive(case)
    accelerated = accelerate(model_of(case), policy=policy)
    totals: list[int] = []
    with count_calls(case.blocks(model_of(case).model.diffusion_model)) as counts:
        result = sample(accelerated, case, steps=STEPS, callback=lambda *_: totals.append(counts[0]))
    run = last_run(accelerated)
    known = accelerate(model_of(case), policy=Fixed(plans_of(case.depth)[0]))
    assert torch.equal(result, sample(known, case, steps=STEPS))
    assert run["decisions"] == last_run(known)["decisions"]
    assert [step for step in range(STEPS) if run["decisions"][step] == "reuse"] == [4, 5, 7, 8]
    assert (run["warnings"], run["fallbacks"]) == ([], {})
    assert run["cached_bytes"] <= run["predicted_bytes"]
    assert run["adaptive"]["step"] == START
    assert run["adaptive"]["decisions"] == ["CCCCRRCRRC"]
    assert run["window"]["text"] == "window covers 6 of 10 steps"
    assert [now - then for now, then in zip(totals, [0, *totals], strict=False)] == [
        0 if step in (4, 5, 7, 8) else case.calls() for step in range(STEPS)]


@pytest.mark.smoke
@pytest.mark.parametrize("case", BATCHED, ids=lambda case: case.name)
def test_samples_that_decide_differently_are_sampled_as_if_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = adaptive(case)
    choosing(policy, monkeypatch, 0, 2, 0)
    accelerated = accelerate(model_of(case), policy=policy)
    result = sample(accelerated, case, steps=STEPS, batch=3)
    run = last_run(accelerated)
    assert set(run["fallbacks"]) <= {"the model keeps the keys and values of the prompt in this call"}  # HiDream-O1's own
    assert run["adaptive"]["decisions"] == ["CCCCRRCRRC", "CCCCCCCCCC", "CCCCRRCRRC"]
    apart = len(run["adaptive"]["parts"]) == 2
    first, third = (sample(accelerate(model_of(case), policy=Fixed(plans_of(case.depth)[index])), case, steps=STEPS, batch=3)
                    for index in (0, 2))
    expected = torch.stack([first[0], third[1], first[2]]) if apart else third
    assert_close(result, expected, 1e-3)
    if apart:
        assert run["adaptive"]["parts"] == [
            {"samples": [0, 2], "decisions": "CCCCRRCRRC"}, {"samples": [1], "decisions": "CCCCCCCCCC"}]
        skipped = 2 / 3 * 4 * (case.depth - 1) / (STEPS * case.depth)
        assert run["cut_arithmetic"] == pytest.approx(skipped, abs=1e-3)
        assert run["window"]["text"] == "window covers 6 of 10 steps"
        assert [run["decisions"][step] for step in (4, 5, 7, 8)] == ["mixed"] * 4
        assert run["cached_bytes"] <= run["predicted_bytes"]


def test_samples_that_reuse_are_not_computed_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["sd3"]
    policy = adaptive(case)
    choosing(policy, monkeypatch, 0, 2)
    rows: list[int] = []
    block = case.blocks(model_of(case).model.diffusion_model)[0]
    first = next(module for module in block.modules() if isinstance(module, torch.nn.Linear))
    handle = first.register_forward_pre_hook(lambda _module, given: rows.append(given[0].shape[0]))
    try:
        sample(accelerate(model_of(case), policy=policy), case, steps=STEPS, batch=2)
    finally:
        handle.remove()
    assert rows == [4] * 4 + [2] * 2 + [2, 2] + [2] * 2 + [2, 2]  # steps 6 and 9 compute both parts, the others one alone


def test_batch_decides_as_one_where_splitting_would_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["sd3"]
    policy = adaptive(case)
    choosing(policy, monkeypatch, 1, 2)  # one block in three steps is not worth a second call
    accelerated = accelerate(model_of(case), policy=policy)
    result = sample(accelerated, case, steps=STEPS, batch=2)
    run = last_run(accelerated)
    assert run["adaptive"]["parts"] == [{"samples": [0, 1], "decisions": "C" * STEPS}]
    assert run["decisions"] == ["compute"] * STEPS, "the one that saves least, so that none gets less than it wants"
    assert torch.equal(result, sample(model_of(case), case, steps=STEPS, batch=2))


def test_guard_judges_the_batch_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["sd3"]
    policy = adaptive(case)
    choosing(policy, monkeypatch, 0, 2)
    accelerated = accelerate(model_of(case), policy=policy, quality="draft", forecast="taylor")
    sample(accelerated, case, steps=STEPS, batch=2)
    assert len(last_run(accelerated)["adaptive"]["parts"]) == 1


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["sd3", "cosmos_t2v", "flux"])
def test_network_looks_once_at_the_latent_and_the_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    policy = adaptive(case)
    seen = choosing(policy, monkeypatch, 0, 0)
    accelerated = accelerate(model_of(case), policy=policy)
    latents: list[Tensor] = []
    estimates: list[Tensor] = []

    def keep(_step: int, denoised: Tensor, x: Tensor, _total: int) -> None:
        latents.append(x.clone())
        estimates.append(denoised.clone())

    sample(accelerated, case, steps=STEPS, batch=2, callback=keep)
    (sight,) = seen
    assert torch.equal(sight.denoised, estimates[START - 1])
    assert torch.equal(sight.change, estimates[START - 1] - estimates[START - 2])
    assert sight.latent.shape == latents[START].shape
    text = case.conds(model_of(case), 2, 0, False)[0][0][0]
    assert torch.equal(sight.text, text.expand(2, -1, -1))
    assert last_run(accelerated)["adaptive"]["milliseconds"] > 0


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpmpp_2s_ancestral", "uni_pc"])
def test_any_sampler_is_decided_once(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["pixart"] if "pixart" in CASES else CASES["sd3"]
    policy = adaptive(case)
    seen = choosing(policy, monkeypatch, 0)
    accelerated = accelerate(model_of(case), policy=policy)
    result = sample(accelerated, case, steps=STEPS, sampler=sampler)
    assert torch.isfinite(result).all()
    assert len(seen) == 1
    assert "reuse" in last_run(accelerated)["decisions"]


@pytest.mark.parametrize("steps", [15, 20, 30, 50])
def test_other_numbers_of_steps_are_fitted(steps: int) -> None:
    case = CASES["sd3"]
    accelerated = accelerate(model_of(case), policy=adaptive(case))
    result = sample(accelerated, case, steps=steps)
    run = last_run(accelerated)
    assert torch.isfinite(result).all()
    assert run["adaptive"]["step"] == pytest.approx(0.4 * steps, abs=1)
    assert 0.3 <= run["adaptive"]["decisions"][0].count("R") / steps <= 0.5
    assert run["decisions"][: run["adaptive"]["step"]].count("reuse") == 0
    assert run["fallbacks"] == {}
    assert "fitted by noise level" in run["warnings"][0]


@pytest.mark.parametrize("settings", [{"denoise": 0.4}, {"start_step": 5}, {"start_step": START}])
def test_run_that_begins_too_late_takes_the_static_schedule_and_says_so(settings: dict[str, Any]) -> None:
    case = CASES["sd3"]
    accelerated = accelerate(model_of(case), policy=adaptive(case))
    sample(accelerated, case, **{"steps": STEPS, **settings})
    run = last_run(accelerated)
    assert run["adaptive"] is None
    assert any("begins at or after the step at which the policy looks" in text for text in run["warnings"])
    assert run["fallbacks"] == {}
    assert "reuse" in run["decisions"]


def test_static_schedule_of_another_kind_of_forecast_is_followed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["sd3"]
    policy = adaptive(case)
    held = (*[Reuse(case.depth - 1, FORECASTS["hold"])] * (STEPS - START - 1), None)
    policy = dataclasses.replace(policy, segments=(Segment(START, (held, *[(None,) * (STEPS - START)] * 2)),))
    looking, static = (accelerate(model_of(case), policy=one) for one in (policy, policy.base))
    monkeypatch.setattr(Session, "saw", lambda *_: None)  # as with a sampler that evaluates too little before
    found, expected = (sample(one, case, steps=STEPS) for one in (looking, static))
    assert any("static schedule is used" in text for text in last_run(looking)["warnings"])
    assert last_run(looking)["decisions"] == last_run(static)["decisions"]
    assert torch.equal(found, expected)
    assert last_run(looking)["cached_bytes"] == last_run(static)["cached_bytes"] > 0


def test_run_that_ends_before_takes_the_static_schedule() -> None:
    case = CASES["sd3"]
    accelerated = accelerate(model_of(case), policy=adaptive(case))
    sample(accelerated, case, steps=STEPS, last_step=START)
    assert any("ends before the step" in text for text in last_run(accelerated)["warnings"])


@every_family
def test_switched_off_it_changes_nothing(case: Case) -> None:
    model, policy = model_of(case), adaptive(case)
    full = sample(model, case, steps=STEPS)
    for settings in ({"enabled": False}, {"group_size": 1}):
        accelerated = accelerate(model, policy=policy, **settings)
        assert torch.equal(sample(accelerated, case, steps=STEPS), full)
        run = last_run(accelerated)
        assert run["decisions"] == ["compute"] * STEPS
        assert (run["cached_bytes"], run["adaptive"]) == (0, None)


def test_two_runs_are_the_same_and_nothing_stays() -> None:
    case = CASES["sd3"]
    accelerated = accelerate(model_of(case), policy=adaptive(case))
    assert torch.equal(sample(accelerated, case, steps=STEPS, batch=2), sample(accelerated, case, steps=STEPS, batch=2))
    assert [run["adaptive"]["decisions"] for run in runs(accelerated)] == [["CCCCRRCRRC"] * 2] * 2


@pytest.mark.parametrize("guider", ["cfg", "basic", "dual_cfg"])
def test_any_guider(guider: str) -> None:
    case = CASES["sd3"]
    accelerated = accelerate(model_of(case), policy=adaptive(case))
    sample_custom(accelerated, case, steps=STEPS, guider=guider)
    run = last_run(accelerated)
    assert run["adaptive"]["decisions"] == ["CCCCRRCRRC"]
    assert run["fallbacks"] == {}


def test_prompts_of_other_lengths_and_several_of_them_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["flux"]
    policy = adaptive(case)
    seen = choosing(policy, monkeypatch, 0)
    positive, negative = case.conds(model_of(case), 1, 0, True)
    sample(accelerate(model_of(case), policy=policy), case, steps=STEPS, conds=(positive + negative, negative))
    assert seen[0].text.shape[1] == positive[0][0].shape[1] + negative[0][0].shape[1]


def test_three_computed_steps_are_kept_wherever_it_looks() -> None:
    """A decision at step 2 has two steps behind it; later groups have three all the same."""
    case = CASES["sd3"]
    high = Reuse(case.depth - 2, FORECASTS["taylor2"])
    plan = (None, None, None, high, None, high, None, high, None, None)
    policy = adaptive(case)
    policy = dataclasses.replace(policy, segments=(Segment(2, (plan[2:],) * 3),))
    expected = sample(accelerate(model_of(case), policy=Fixed(plan)), case, steps=STEPS)
    assert torch.equal(sample(accelerate(model_of(case), policy=policy), case, steps=STEPS), expected)


@pytest.mark.parametrize(("option", "kept"), [(0, True), (2, False)])
def test_what_nothing_needs_any_more_is_dropped(option: int, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["sd3"]
    policy = adaptive(case)
    choosing(policy, monkeypatch, option)
    sessions: list[Session] = []
    stored: list[int] = []
    follow = Session._decide
    monkeypatch.setattr(Session, "_decide", lambda self, latent: (sessions.append(self), follow(self, latent)))

    def watch(step: int, *_: Any) -> None:
        if step >= START:
            stored.append(sum(state.cache.stored_bytes for state in sessions[0].models.values()))

    sample(accelerate(model_of(case), policy=policy), case, steps=STEPS, callback=watch)
    assert (stored[0] > 0) == kept


def test_memory_that_runs_out_at_the_split_only_costs_reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["sd3"]
    policy = adaptive(case)
    choosing(policy, monkeypatch, 0, 2)

    def full(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr("blockdance_core.streams._copied", full)
    accelerated = accelerate(model_of(case), policy=policy)
    result = sample(accelerated, case, steps=STEPS, batch=2)
    assert torch.isfinite(result).all()
    assert last_run(accelerated)["fallbacks"]


def test_batch_goes_as_one_where_another_node_keeps_things_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy_extras.nodes_easycache import EasyCacheNode

    case = CASES["flux"]
    policy = adaptive(case)
    choosing(policy, monkeypatch, 0, 2)
    model = EasyCacheNode.execute(model_of(case), 0.2, 0.15, 0.95, False).args[0]
    accelerated = accelerate(model, policy=policy)
    assert torch.isfinite(sample(accelerated, case, steps=STEPS, batch=2)).all()
    assert len(last_run(accelerated)["adaptive"]["parts"]) == 1


def test_batch_goes_as_one_where_a_patch_holds_a_row_for_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["qwen_image"]
    policy = adaptive(case)
    choosing(policy, monkeypatch, 0, 2, 2)
    control = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1)

    def patch(args: dict[str, Any]) -> dict[str, Any]:  # as LLLite does it
        image = args["img"]
        assert image.shape[0] % 3 == 0
        image += control.repeat(image.shape[0] // 3, 1, 1).to(image)
        return args

    model = model_of(case).clone()
    model.set_model_double_block_patch(patch)
    accelerated = accelerate(model, policy=policy)
    result = sample(accelerated, case, steps=STEPS, batch=3)
    assert len(last_run(accelerated)["adaptive"]["parts"]) == 1
    assert torch.equal(result, sample(model, case, steps=STEPS, batch=3)), "as the one that saves least"


def test_text_that_lies_on_another_device_than_the_latent_is_moved() -> None:
    network = adaptive(CASES["sd3"]).network.to("meta")
    latent = torch.empty(1, network.shape.channels, 8, 8, device="meta")
    read = network.read(Sight(latent, latent, latent, torch.zeros(1, 4, network.shape.text_width, dtype=torch.float16)))
    assert {part.device.type for part in read if part is not None} == {"meta"}
    assert {part.dtype for part in read if part is not None} == {torch.float32}


@pytest.mark.parametrize(("change", "message"), [
    ({"channels": 5}, "latents of 5 channels, this model has 16"),
    ({"text_width": 7}, "text embeddings of width 7, this run has"),
])
def test_policy_for_other_latents_or_texts_is_refused(change: dict[str, int], message: str) -> None:
    case = CASES["sd3"]
    policy = adaptive(case)
    network = DecisionNetwork(dataclasses.replace(policy.network.shape, **change))
    accelerated = accelerate(model_of(case), policy=dataclasses.replace(policy, network=network))
    with pytest.raises(ConfigError, match=message):
        sample(accelerated, case, steps=STEPS)
    full = sample(model_of(case), case, steps=STEPS)
    assert torch.equal(sample(accelerate(model_of(case), enabled=False), case, steps=STEPS), full), "nothing is left behind"


def test_policy_of_another_family_or_depth_is_refused() -> None:
    with pytest.raises(ConfigError, match="was calibrated for SD3 with 8 blocks; this model is Flux"):
        accelerate(model_of(CASES["flux"]), policy=adaptive(CASES["sd3"]))
