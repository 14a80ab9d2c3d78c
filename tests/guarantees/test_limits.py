"""Guarantees about memory and honesty: bounded, never the cause of an out-of-memory error, no blanket except."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from harness import STEPS, accelerate, every_family, last_run, model_of, reused_steps
from tiny import CASES, Case, sample

from blockdance_core.host import attach as host_attach
from blockdance_core.streams import FeatureCache

sd3 = CASES["sd3"]


def room_of(monkeypatch: pytest.MonkeyPatch, nbytes: float) -> None:
    monkeypatch.setattr(host_attach, "_room", lambda *_: nbytes)


def needed(forecast: str) -> int:
    accelerated = accelerate(model_of(sd3), forecast=forecast)
    sample(accelerated, sd3, steps=STEPS)
    return last_run(accelerated)["cached_bytes"]


def test_auto_keeps_no_history_first_and_then_moves_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    two = needed("taylor")
    delta = sample(accelerate(model_of(sd3), forecast="delta"), sd3, steps=STEPS)
    taylor = sample(accelerate(model_of(sd3), forecast="taylor"), sd3, steps=STEPS)
    for room, expected, kept, said in ((two, taylor, two, None), (two - 1, delta, two // 2, "no history"),
                                       (two // 2 - 1, taylor, two, "CPU"), (-5, taylor, two, "CPU")):
        room_of(monkeypatch, room)
        accelerated = accelerate(model_of(sd3), forecast="taylor")
        assert torch.equal(sample(accelerated, sd3, steps=STEPS), expected), room
        run = last_run(accelerated)
        assert run["cached_bytes"] == run["predicted_bytes"] == kept
        assert (said is None) == (run["warnings"] == [])
        assert said is None or said in run["warnings"][0]


@every_family
def test_the_host_is_asked_to_keep_free_what_will_be_stored(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, float]] = []  # samples the host plans for, and what it counts for one

    def note(executor: Any, model: Any, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append((noise_shape[0], model.model.memory_required([1, *noise_shape[1:]])))
        return executor(model, [1, *noise_shape[1:]], *args, **kwargs)

    with monkeypatch.context() as patch:  # as on a GPU
        patch.setattr(host_attach.model_management, "is_device_cpu", lambda _: False)
        accelerated = accelerate(model_of(case), forecast="taylor")
        accelerated.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "note", note)
        sample(accelerated, case, steps=STEPS)
    samples, of_one = asked[0]
    extra = (samples - 1) * of_one
    assert extra >= 0.95 * last_run(accelerated)["cached_bytes"] / 2
    assert extra <= 100 * last_run(accelerated)["cached_bytes"] + 2**20, "not a whole sample for a few tokens"
    accelerated = accelerate(model_of(case), cache_device="cpu")
    accelerated.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "note", note)
    sample(accelerated, case, steps=1)
    assert asked[1][0] == 1


def test_gpu_never_stores_more_than_fits_and_computes_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    room_of(monkeypatch, needed("hold") - 1)
    accelerated = accelerate(model_of(sd3), cache_device="gpu")
    full = sample(model_of(sd3), sd3, steps=STEPS)
    assert torch.equal(sample(accelerated, sd3, steps=STEPS), full)
    run = last_run(accelerated)
    assert run["reused_calls"] == 0
    assert run["cached_bytes"] < needed("hold")
    assert any("limit" in reason for reason in run["fallbacks"])
    assert "choose cache device auto or cpu" in run["warnings"][0]


def test_weights_that_the_host_would_give_up_are_room_for_features(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerated = accelerate(model_of(sd3))
    for free, said in ((0, "kept in CPU memory"), (2**40, None)):
        monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda *_, free=free: free)  # counts weights loaded on demand
        sample(accelerated, sd3, steps=STEPS)
        warnings = last_run(accelerated)["warnings"]
        assert warnings == [] if said is None else said in warnings[0]


def test_streams_that_turn_up_later_find_no_more_room_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    room = needed("taylor") - 1
    room_of(monkeypatch, room)
    accelerated = accelerate(model_of(sd3), forecast="taylor")
    positive, negative = sd3.conds(accelerated)
    more = [sd3.conds(accelerated, seed=seed)[0][0] for seed in range(10, 16)]
    regions = [[text, {**extras, "start_percent": 0.2, "end_percent": 1.0}] for text, extras in more]
    sample(accelerated, sd3, steps=STEPS, conds=([*positive, *regions], negative))
    run = last_run(accelerated)
    assert run["cached_bytes"] <= room
    assert any("limit" in reason for reason in run["fallbacks"])


def test_out_of_memory_in_our_clone_computes_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    full = sample(model_of(sd3), sd3, steps=STEPS)
    for method in ("_kept", "_combined"):
        with monkeypatch.context() as patch:
            patch.setattr(FeatureCache, method, fail)
            accelerated = accelerate(model_of(sd3), forecast="taylor")
            assert torch.equal(sample(accelerated, sd3, steps=STEPS), full)
        run = last_run(accelerated)
        assert run["reused_calls"] == 0
        assert any("memory" in reason for reason in run["fallbacks"])


def test_out_of_memory_inside_a_block_propagates() -> None:
    model = sd3.build()
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise torch.OutOfMemoryError("no memory")

    sd3.blocks(model.model.diffusion_model)[-1].register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        sample(accelerate(model), sd3, steps=STEPS)
    assert len(calls) == 6, "the sampling was not started again"


def test_reported_numbers_agree_with_each_other() -> None:
    accelerated = accelerate(model_of(sd3), forecast="taylor")
    sample(accelerated, sd3, steps=STEPS)
    run = last_run(accelerated)
    assert run["window"] == {"first": 3, "last": 9, "covered": 7, "steps": 10, "text": "window covers 7 of 10 steps"}
    assert run["reused_steps"] == len(reused_steps(run)) == 3
    assert len(run["dit_ms"]) == STEPS
    assert min(run["dit_ms"]) > 0
    assert run["config"]["boundary_label"] == "6 of 8 blocks"


def test_no_blanket_except_and_no_print_in_the_pack() -> None:
    root = Path(__file__).resolve().parents[2]
    for path in [*(root / "blockdance_core").rglob("*.py"), *(root / "nodes").rglob("*.py")]:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        assert not [line for line in lines if line.startswith(("except:", "except Exception", "except BaseException"))], path
        assert not [line for line in lines if line.startswith("print(")], path
