"""Adaptive policies by themselves: what the network reads, what files keep, and that teaching finds what is worth it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from core.test_policy import even, policy

from blockdance_core.config import Config, ConfigError, Policy
from blockdance_core.forecast import FORECASTS, Forecast
from blockdance_core.policy import AdaptivePolicy, PolicyError, load, save
from blockdance_core.policy.adaptive import Segment, every_step, one_choice, parts_of, step_at
from blockdance_core.policy.calibrated import level_for
from blockdance_core.policy.network import GRID, DecisionNetwork, NetworkShape, Sight
from blockdance_core.policy.training import Chosen, Outcome, Reading, Settings, Trainer
from blockdance_core.schedule import Reuse, Schedule, follow

SHALLOW, DEEP = Reuse(20, FORECASTS["delta"]), Reuse(26, Forecast(True, 2, 0.5))
START = 8


def sight(*dims: int, batch: int = 2, channels: int = 4, tokens: int = 5, width: int = 6) -> Sight:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(batch, channels, *dims, generator=generator)
    return Sight(latent, latent * 0.5, latent * 0.1, torch.randn(batch, tokens, width, generator=generator))


def adaptive(segments: tuple[Segment, ...] | None = None, levels: int = 2, **changes: Any) -> AdaptivePolicy:
    segments = segments or one_choice(policy().entries[0], START)
    choices = sum(len(segment.options) for segment in segments)
    torch.manual_seed(0)
    network = DecisionNetwork(NetworkShape(4, 6, levels * choices, width=16, depth=1, heads=2))
    return AdaptivePolicy(**{
        "base": policy(), "trained": 0, "segments": segments, "cuts": tuple(0.2 + 0.3 * k for k in range(levels)),
        "network": network, "name": "looks", "record": {"reward": "fidelity"}, **changes})


# What the network reads


@pytest.mark.parametrize("dims", [(64,), (8, 8), (128, 96), (5, 7), (1, 1), (9, 16, 16), (3, 5, 7), (2, 3, 4, 5)])
def test_latents_of_any_shape_are_read_as_a_few_cells(dims: tuple[int, ...]) -> None:
    network = adaptive().network
    cells, places, _ = network.read(sight(*dims))
    assert cells.shape[1] == places.shape[0] <= GRID[0] * GRID[1] * GRID[2]
    assert cells.shape[2] == 2 * 3 * 4
    assert torch.isfinite(cells).all()
    assert ((places > 0) & (places < 1)).all()
    assert network.decide(sight(*dims)).shape == (2, network.shape.outputs)


def test_texts_of_any_length_are_read() -> None:
    network = adaptive().network
    torch.nn.init.normal_(network.out.weight)
    short, long = (network.decide(sight(8, 8, tokens=tokens)) for tokens in (1, 300))
    assert torch.isfinite(long).all()
    assert not torch.equal(short, long)


def test_cells_tell_texture_from_flat_colour() -> None:
    flat = torch.ones(1, 1, 16, 16)
    rough = flat + torch.tensor([1.0, -1.0]).repeat(8)[None, None, None, :]
    network = DecisionNetwork(NetworkShape(1, 0, 2, maps=1))
    one, other = (network.read(Sight(latent, latent, latent, None))[0] for latent in (flat, rough))
    assert torch.allclose(one[..., 0], other[..., 0]), "the means agree"
    assert (other[..., 1] - one[..., 1]).min() > 3, "the spreads do not"


def test_one_map_sees_the_latent_alone() -> None:
    network = DecisionNetwork(NetworkShape(4, 0, 2, maps=1))
    given = sight(8, 8)
    assert torch.equal(network.decide(given), network.decide(given._replace(denoised=given.latent * 9)))


def test_untrained_network_says_what_its_bias_says_and_leaves_nothing_on_the_device() -> None:
    network = adaptive().network
    network.out.bias.data = torch.arange(network.shape.outputs).float()
    assert torch.equal(network.decide(sight(8, 8)), torch.arange(network.shape.outputs).float().expand(2, -1))


def test_published_network_has_the_published_size() -> None:
    from blockdance_core.host.training import PUBLISHED

    design, settings = PUBLISHED
    shape = NetworkShape(16, 4096, 18, design.maps, design.width, design.depth, design.heads)
    assert 0.07e9 < shape.parameters < 0.1e9
    assert (design.depth, settings.tradeoffs, settings.baseline) == (3, (2.0,), False)


# What is chosen


def test_levels_are_picked_by_n_and_options_by_likelihood() -> None:
    looks = adaptive()
    assert [level_for(looks.cuts, group_size, looks.wanted, looks.name) for group_size in (2, 3, 64)] == [(1, ())] * 3
    assert level_for((0.2, 0.6), 2, looks.wanted, looks.name) == (0, ())
    assert level_for((0.6, 0.7), 2, looks.wanted, looks.name)[1][0].startswith(f"N = 2 is slower than anything in {looks.name}")
    cautious = looks.at(0.25)
    assert [level_for((0.2, 0.6), group_size, cautious.wanted, cautious.name) for group_size in (2, 64)] == [(0, ())] * 2
    assert cautious.base.wanted == 0.25, "for runs in which the network cannot look"
    assert looks.likeliest(torch.tensor([0.0, 2.0, 1.0])) == (1,)


def test_plan_of_a_choice_computes_everything_before_the_decision() -> None:
    looks = adaptive()
    assert looks.plan((0,)) == (None,) * 20
    assert looks.plan((2,)) == (*(None,) * START, *policy().entries[0].plans[1][START:])


@pytest.mark.parametrize("steps", [20, 40])
def test_choice_may_reuse_the_last_step(steps: int) -> None:
    ending = tuple(SHALLOW if k % 4 == 3 else None for k in range(20))
    source = dataclasses.replace(policy().entries[0], plans=(ending,), cuts=(0.2,), losses=(0.0,))
    looks = adaptive(one_choice(source, START))
    levels = [k / steps for k in range(steps + 1)]
    computing, reusing = (looks.scheduled(looks.plan((choice,)), levels, START) for choice in (0, 1))
    assert (computing.steps[-1].decision, reusing.steps[-1].decision) == ("compute", "reuse")
    assert not computing.boundaries


def test_every_step_has_options_of_its_own_but_the_last_is_computed() -> None:
    segments = every_step(20, START, (None, SHALLOW, DEEP))
    looks = adaptive(segments, levels=1)
    assert [segment.start for segment in segments] == list(range(START, 20))
    chosen = looks.likeliest(torch.cat([*torch.eye(3)[[0, 1, 2, 1, *[0] * 7]], torch.zeros(1)]))
    assert looks.plan(chosen) == (*(None,) * 9, SHALLOW, DEEP, SHALLOW, *(None,) * 8)


@pytest.mark.parametrize(
    ("steps", "share", "expected"), [(30, 0.4, 12), (20, 0.2, 4), (10, 0.1, 2), (50, 0.2, 10), (9, 0.0, 2)])
def test_decision_falls_after_its_share_of_the_steps(steps: int, share: float, expected: int) -> None:
    assert step_at(steps, share) == expected


@pytest.mark.parametrize(("changes", "message"), [
    ({"trained": 1}, "entry 1 is none of 1"), ({"segments": ()}, "it decides nothing"),
    ({"segments": (Segment(8, ()),)}, "no options"), ({"segments": (Segment(1, ((None,) * 19,)),)}, "looks at step 1"),
    ({"segments": (Segment(8, ((None,) * 11,)),)}, "must fill the steps"),
    ({"segments": (Segment(8, ((None,) * 12, (None,))),)}, "as many steps"),
    ({"segments": (Segment(8, ((Reuse(29, FORECASTS["hold"]),) * 12,) * 3),)}, "boundary 29 is outside"),
    ({"cuts": (0.5, 0.2)}, "cuts must ascend"), ({"cuts": (0.5,)}, "has 6 outputs, expected 3"),
])
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    looks = adaptive()
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(looks, **changes)


@pytest.mark.parametrize("change", [
    {"channels": 0}, {"width": 5000}, {"width": 62}, {"text_width": -1}, {"depth": True}, {"heads": 2.0}])
def test_sizes_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        NetworkShape(**{"channels": 4, "text_width": 6, "outputs": 2, **change})


# Runs


def test_undecided_run_stores_what_any_choice_may_need() -> None:
    looks = adaptive(every_step(20, START, (None, SHALLOW, DEEP)), levels=1, cuts=(0.4,))
    plan = looks.schedule(even(20), "euler", 2)
    assert [k for k, step in enumerate(plan.steps) if step.record] == [5, 6, 7]
    assert (plan.boundaries, plan.anchored, plan.needed, plan.kept) == ((20, 26), True, 3, 3)
    assert {step.decision for step in plan.steps} == {"compute"}


@pytest.mark.parametrize(("levels", "reason"), [
    (even(20, 0.5), "begins at or after"), (even(20, 0.0, 0.3), "ends before"), (even(20, 1.0, 0.0), "rises"),
    (even(4), "4 steps cover as much noise level"),
])
def test_runs_in_which_it_cannot_look_follow_the_static_schedule(levels: list[float], reason: str) -> None:
    looks = adaptive()
    plan = looks.schedule(levels, "euler", 2)
    assert plan.steps == looks.base.schedule(levels, "euler", 2).steps
    assert any(reason in text for text in plan.warnings)


def test_n_1_computes_everything() -> None:
    assert adaptive().schedule(even(20), "euler", 1).boundaries == ()


@pytest.mark.parametrize("steps", [12, 15, 30, 45, 60])
def test_choices_are_fitted_to_other_steps_and_nothing_reuses_before_the_decision(steps: int) -> None:
    looks = adaptive()
    at = looks.looks_at(even(steps), "euler", 2)
    assert at == pytest.approx(0.4 * steps, abs=1)
    assert isinstance(at, int)
    plan = looks.scheduled(looks.plan((2,)), even(steps), at)
    assert all(step.decision != "reuse" for step in plan.steps[:at])
    share = sum(step.decision == "reuse" for step in plan.steps) / steps
    assert share == pytest.approx(sum(row is not None for row in looks.plan((2,))) / 20, abs=0.12)


# Files


def test_file_comes_back_as_it_was(tmp_path: Path) -> None:
    looks = adaptive(every_step(20, START, (None, SHALLOW, DEEP)))
    torch.nn.init.normal_(looks.network.out.weight)
    save(looks, tmp_path / "looks.safetensors")
    again = load(tmp_path / "looks.safetensors")
    assert isinstance(again, AdaptivePolicy)
    assert isinstance(again, Policy)
    assert Config(policy=again).policy is again
    for name in ("trained", "segments", "cuts", "name", "record", "boundary", "start"):
        assert getattr(again, name) == getattr(looks, name), name
    assert [one.plans for one in again.base.entries] == [one.plans for one in looks.base.entries]
    assert torch.allclose(again.logits(sight(8, 8)), looks.logits(sight(8, 8)), atol=1e-5)
    assert not any(parameter.requires_grad for parameter in again.network.parameters())


def test_large_network_is_kept_in_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from blockdance_core.policy import file

    monkeypatch.setattr(file, "_MOST_EXACT", 1)
    save(adaptive(), tmp_path / "large.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "large.safetensors")
    assert {value.dtype for name, value in tensors.items() if name.startswith("network.")} == {torch.float16}
    assert isinstance(load(tmp_path / "large.safetensors"), AdaptivePolicy)


def _rewritten(path: Path, metadata: dict[str, str | None], tensors: dict[str, torch.Tensor | None]) -> None:
    with safetensors.safe_open(path, "pt") as file:
        found, kept = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found |= {key: value for key, value in metadata.items() if value is not None}
    kept |= {name: value for name, value in tensors.items() if value is not None}
    gone = {key for key, value in (*metadata.items(), *tensors.items()) if value is None}
    safetensors.torch.save_file({name: value for name, value in kept.items() if name not in gone}, path,
                                {key: value for key, value in found.items() if key not in gone})


@pytest.mark.parametrize(("metadata", "tensors", "message"), [
    ({"trained": "7"}, {}, "trained is 7"), ({"trained": None}, {}, "no trained"),
    ({"segments": "[8.5]"}, {}, "segments are not"), ({"segments": "[]"}, {}, "segments are not"),
    ({"segments": "[9, 4]"}, {}, "must ascend"), ({"segments": "[8, 8]"}, {}, "must ascend"),
    ({"level_cuts": '["a"]'}, {}, "level_cuts"), ({}, {"segment.0.boundary": torch.zeros(2**40, 0).short()}, "more than"),
    ({"level_cuts": "[0.9, 0.1]"}, {}, "ascend"), ({"level_cuts": "[NaN, 0.1]"}, {}, "ascend"),
    ({"network": '{"width": 1e9}'}, {}, "damaged|whole number"), ({"network": '{"os": 1}'}, {}, "damaged"),
    ({"network": json.dumps({"channels": 4, "text_width": 6, "outputs": 6, "width": 4096, "depth": 64, "heads": 2})}, {},
     "expected torch"),
    ({"network": "[]"}, {}, "not a JSON"), ({}, {"network.out.bias": None}, "no tensor network.out.bias"),
    ({}, {"network.out.bias": torch.full((6,), torch.nan)}, "not finite"),
    ({}, {"network.out.bias": torch.ones(7)}, "expected"), ({}, {"network.spread": torch.zeros(16)}, "above 0"),
    ({}, {"network.out.bias": torch.ones(6, dtype=torch.int64)}, "expected"),
    ({}, {"segment.0.boundary": None}, "segment.0"),
    ({}, {"segment.0.boundary": torch.full((3, 12), 99, dtype=torch.int16)}, "mix hold"),
    ({}, {"segment.0.boundary": torch.full((3, 12), 99, dtype=torch.int16),
          "segment.0.anchored": torch.ones(3, 12, dtype=torch.uint8)}, "boundary 99 is outside"),
    ({"kind": "other"}, {}, "kind 'other'"), ({"schema_version": "2"}, {}, "schema version 2"),
])
def test_damaged_files_are_refused_with_their_name(
    tmp_path: Path, metadata: dict[str, str | None], tensors: dict[str, torch.Tensor | None], message: str
) -> None:
    path = tmp_path / "looks.safetensors"
    save(adaptive(), path)
    _rewritten(path, metadata, tensors)
    with pytest.raises(PolicyError, match=message) as raised:
        load(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "looks.safetensors"
    save(adaptive(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(PolicyError):
        load(path)


# Teaching


def readings(count: int) -> tuple[list[Reading], list[bool]]:
    """Pictures of two kinds, flat or rough."""
    generator = torch.Generator().manual_seed(1)
    made, hard = [], []
    network = adaptive().network
    for k in range(count):
        latent = torch.randn(1, 4, 16, 16, generator=generator) * (1.0 if k % 2 else 0.1)
        text = torch.randn(1, 5, 6, generator=generator)
        cells, places, words = network.read(Sight(latent, latent, latent * 0.1, text))
        assert words is not None
        made.append(Reading(cells[0], places, words[0]))
        hard.append(bool(k % 2))
    return made, hard


def said(network: DecisionNetwork, reading: Reading) -> torch.Tensor:
    assert reading.text is not None
    logits: torch.Tensor = network(reading.cells[None], reading.places, reading.text[None])
    return logits


def world(hard: list[bool], options: int) -> tuple[Any, list[Any]]:
    """Flat pictures lose nothing, rough ones everything that is reused; returns the function and what it was asked."""
    asked: list[Any] = []

    def ask(pairs: list[tuple[int, Chosen]]) -> list[Outcome]:
        asked.extend(pairs)
        outcomes = []
        for picture, chosen in pairs:
            cut = 0.9 * sum(chosen) / (len(chosen) * (options - 1))
            outcomes.append(Outcome(1.0 - cut * hard[picture], cut))
        return outcomes

    return ask, asked


def trainer(looks: AdaptivePolicy, settings: Settings, count: int = 24) -> tuple[Trainer, list[bool], list[Any]]:
    read, hard = readings(count)
    ask, asked = world(hard, len(looks.segments[0].options))
    return Trainer(looks, read, [k // 2 for k in range(count)], ask, settings), hard, asked


def test_enumerated_training_gives_each_kind_of_picture_its_own_and_asks_once() -> None:
    looks = adaptive(one_choice(policy().entries[0], START), levels=2)
    teach, hard, asked = trainer(looks, Settings(tradeoffs=(0.5, 2.0), epochs=60, rate=3e-3, patience=60))
    teach.begin([])
    while not teach.over:
        teach.step()
    done, order = teach.finished()
    assert order == [1, 0]
    assert len(asked) == len(set(asked)) == 24 * 3
    assert done.cuts == pytest.approx((0.45, 0.9), abs=0.1)
    logits = torch.cat([said(done.network, reading) for reading in teach.readings])
    careful = logits.view(24, 2, -1)[:, 0].argmax(1).tolist()
    assert [careful[k] == 0 for k in teach.held] == [hard[k] for k in teach.held], "rough pictures are computed, flat reused"
    assert sum(teach.curve[-1]["held_out"]) > sum(teach.alike()), "better than one choice for all"


def test_sampled_training_finds_it_too() -> None:
    segments = every_step(20, 15, (None, SHALLOW))
    looks = adaptive(segments, levels=1, cuts=(0.0,))
    read, hard = readings(24)

    def ask(pairs: list[tuple[int, Chosen]]) -> list[Outcome]:
        return [Outcome(1.0 - sum(chosen) / 4 * hard[picture], sum(chosen) / 4) for picture, chosen in pairs]

    teach = Trainer(looks, read, list(range(24)), ask, Settings(tradeoffs=(2.0,), epochs=80, group=6, rate=3e-3, patience=80))
    teach.all = []  # as if there were too many to try them all
    teach.begin([(0,) * 5, (1, 1, 1, 1, 0)])
    while not teach.over:
        teach.step()
    teach.finished()
    logits = torch.cat([said(looks.network, reading) for reading in read])
    reused = [sum(looks.likeliest(row)) for row in logits]
    assert [count < 2 for count in reused] == hard


def test_training_goes_on_exactly_where_it_was_interrupted() -> None:
    settings = Settings(tradeoffs=(0.5, 2.0), epochs=8)
    whole, _, _ = trainer(adaptive(), settings)
    whole.begin([])
    for _ in range(8):
        whole.step()
    first, _, _ = trainer(adaptive(), settings)
    first.begin([])
    for _ in range(3):
        first.step()
    state = first.state()
    second, _, asked = trainer(adaptive(), settings)
    second.resume(state)
    for _ in range(5):
        second.step()
    assert second.curve == whole.curve
    assert asked == []
    pairs = zip(second.finished()[0].network.parameters(), whole.finished()[0].network.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_pictures_of_one_prompt_are_held_out_together() -> None:
    teach, _, _ = trainer(adaptive(), Settings(tradeoffs=(1.0, 2.0), held_out=0.25))
    assert len(teach.held) == 6
    assert not {k // 2 for k in teach.held} & {k // 2 for k in teach.training}


def test_training_stops_when_held_out_pictures_gain_no_more() -> None:
    teach, _, _ = trainer(adaptive(), Settings(tradeoffs=(1.0, 2.0), epochs=500, patience=5, rate=1e-6))
    teach.begin([])
    while not teach.over:
        teach.step()
    assert teach.epoch < 20


def test_baseline_lowers_the_variance_of_the_gradient() -> None:
    def spread(baseline: bool) -> float:
        gradients = []
        for seed in range(12):
            looks = adaptive(every_step(20, 15, (None, SHALLOW)), levels=1, cuts=(0.0,))
            read, hard = readings(8)
            ask = lambda pairs: [Outcome(1.0 - sum(c) / 4 * hard[p], sum(c) / 4) for p, c in pairs]  # noqa: E731, B023
            teach = Trainer(looks, read, list(range(8)), ask, Settings(tradeoffs=(2.0,), group=4, baseline=baseline, seed=seed))
            teach._sampled_loss(range(8)).backward()
            assert looks.network.out.bias.grad is not None
            gradients.append(looks.network.out.bias.grad.clone())
        return float(torch.stack(gradients).var(0).sum())

    assert spread(True) < 0.5 * spread(False)


@pytest.mark.parametrize("change", [
    {"tradeoffs": ()}, {"tradeoffs": (-1.0,)}, {"epochs": 0}, {"patience": 0}, {"group": 1}, {"pictures": 0}, {"rate": 0.0},
    {"held_out": 1.0},
])
def test_settings_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Settings(**change)


def test_record_of_a_file_is_plain_json(tmp_path: Path) -> None:
    save(adaptive(), tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert json.loads(file.metadata()["record"]) == {"reward": "fidelity"}


# Samples of a batch


def wanted(*shares: float) -> list[Schedule]:
    """For each sample a schedule that reuses a share of 20 steps at all of 27 blocks."""
    reuse = Reuse(26, FORECASTS["delta"])
    return [follow((None, *(reuse if k <= share * 20 else None for k in range(1, 20)))) for share in shares]


def test_samples_that_want_the_same_go_together() -> None:
    parts = parts_of(wanted(0.8, 0.0, 0.8), 28)
    assert [samples for samples, _ in parts] == [(0, 2), (1,)]


def test_parts_that_differ_little_are_joined_and_follow_the_one_that_saves_least() -> None:
    many = wanted(0.8, 0.75, 0.7, 0.1, 0.8, 0.75, 0.7, 0.1)
    parts = parts_of(many, 28)
    assert [samples for samples, _ in parts] == [(0, 1, 2, 4, 5, 6), (3, 7)]
    assert [schedule for _, schedule in parts] == [many[2], many[3]]


def test_batch_that_must_go_as_one_follows_the_one_that_saves_least() -> None:
    many = wanted(0.8, 0.3, 0.6)
    assert parts_of(many, 28, together=True) == (((0, 1, 2), many[1]),)


@pytest.mark.parametrize("levels", [even(4), even(20, 1.0, 0.0)])
def test_where_everything_is_computed_no_static_schedule_is_promised(levels: Any) -> None:
    warnings = adaptive().schedule(levels, "euler", 2).warnings
    assert any("all computed" in text for text in warnings)
    assert not any("static schedule" in text for text in warnings)
