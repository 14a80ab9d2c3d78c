"""Invariant 8: nothing stays in memory after a run; stored bytes are the predicted ones."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch
from comfy import model_management
from harness import STEPS, accelerate, every_family, last_run, model_of
from tiny import CASES, Case, sample

from blockdance_core.session import Session
from blockdance_core.streams import FeatureCache


def boundary_bytes(case: Case, boundary: int, batch: int) -> int:
    """Bytes of what blocks up to the boundary hand to live blocks, for cond and uncond, seen by hooks of our own."""
    model = model_of(case)
    seen: list[int] = []

    def note(_: Any, __: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        features = [part for part in parts if isinstance(part, torch.Tensor) and part.is_floating_point()]
        seen.append(sum(part.numel() * part.element_size() for part in features))

    blocks = case.blocks(model.model.diffusion_model)
    needed = [boundary, *(early for early, late in case.skips if early < boundary < late)]
    handles = [blocks[index].register_forward_hook(note) for index in needed]
    sample(model, case, steps=2, batch=batch, callback=lambda step, *_: seen.clear() if step == 0 else None)
    for handle in handles:
        handle.remove()
    return sum(seen)


@every_family
@pytest.mark.parametrize("batch", [1, 3])
def test_stored_bytes_are_those_predicted_and_counted_by_hand(case: Case, batch: int) -> None:
    model, batch = model_of(case), case.rows(batch)
    boundary = 1 if batch == 1 else case.depth - 1
    one = boundary_bytes(case, boundary, batch)
    for forecast in ("hold", "taylor") if boundary == 1 else ("taylor",):
        accelerated = accelerate(model, forecast=forecast, boundary=boundary)
        sample(accelerated, case, steps=STEPS, batch=batch)
        run = last_run(accelerated)
        assert run["cached_bytes"] == run["predicted_bytes"] == one * (2 if forecast == "taylor" else 1), forecast


@pytest.mark.parametrize("how", ["finished", "interrupted", "failed"])
def test_no_tensor_and_no_session_stays_after_a_run(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["flux"]
    model = model_of(case)
    accelerated = accelerate(model, forecast="taylor")
    sample(accelerated, case, steps=STEPS)
    sessions: list[weakref.ref[Session]] = []
    stored: list[weakref.ref[torch.Tensor]] = []
    begin, kept = Session.__init__, FeatureCache._kept

    def created(self: Session, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        sessions.append(weakref.ref(self))

    def keep(self: FeatureCache, *args: Any) -> torch.Tensor | None:
        tensor = kept(self, *args)
        if tensor is not None:
            stored.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Session, "__init__", created)
    monkeypatch.setattr(FeatureCache, "_kept", keep)

    def stop(step: int, *_: Any) -> None:
        if how != "finished" and step == 5:
            raise model_management.InterruptProcessingException if how == "interrupted" else ZeroDivisionError

    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(model_management.InterruptProcessingException, ZeroDivisionError):
            sample(accelerated, case, steps=STEPS, callback=stop)
        assert len(stored) > 4
        assert [reference() for reference in stored if reference() is not None] == []
        assert [reference() for reference in sessions] == [None], "a cycle keeps the session, and with it the model"
    finally:
        gc.enable()


@pytest.mark.parametrize("case", [CASES[name] for name in ("sd3", "flux", "wan_vace", "undeclared")], ids=lambda c: c.name)
@pytest.mark.parametrize("settings", [{"forecast": "taylor"}, {"preset": "auto", "quality": "draft"}], ids=str)
def test_no_more_tensors_live_after_a_run_than_before(case: Case, settings: dict[str, str]) -> None:
    accelerated = accelerate(model_of(case), **settings)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    sample(accelerated, case, steps=STEPS)
    before = alive()
    for seed in (1, 2):
        sample(accelerated, case, steps=STEPS, seed=seed)
    assert alive() <= before


def test_cache_device_cpu_stores_the_same() -> None:
    case = CASES["sd3"]
    found = {}
    for device in ("auto", "gpu", "cpu"):
        accelerated = accelerate(model_of(case), forecast="taylor", cache_device=device)
        found[device] = sample(accelerated, case, steps=STEPS)
        assert last_run(accelerated)["cached_bytes"] == last_run(accelerated)["predicted_bytes"]
    assert torch.equal(found["auto"], found["cpu"])
    assert torch.equal(found["auto"], found["gpu"])
