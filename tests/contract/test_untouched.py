"""Invariant 5: the input MODEL, its options, its weights and its blocks stay as they are, whatever happens in a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comfy import model_management
from comfy.model_patcher import ModelPatcher
from harness import STEPS, accelerate, every_family, model_of, runs
from tiny import CASES, Case, sample
from torch import Tensor

pytestmark = pytest.mark.smoke


def frozen(value: Any) -> Any:
    """Containers by content, everything else by identity."""
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [frozen(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


THEIRS = {
    "current_patcher", "_parameters", "_buffers",
    "affline_scale_log_info", "affline_emb", "crossattn_emb",  # at every call (cosmos/predict2.py, v0.30.0, line 877)
    "_kv_cache_entries", "_visual_cache",  # prefix of the prompts (hidream_o1/model.py, v0.30.0, line 208)
}
"""What the host itself leaves on modules."""


def snapshot(model: ModelPatcher) -> dict[str, Any]:
    inner = model.model
    return {
        "options": frozen(model.model_options),
        "patcher": {key: frozen(getattr(model, key)) for key in (
            "wrappers", "callbacks", "attachments", "additional_models", "object_patches", "object_patches_backup",
            "patches", "backup", "injections", "hook_patches")},
        "attributes": sorted(inner.__dict__),
        "modules": {
            name: {key: frozen(value) for key, value in module.__dict__.items()
                   if key not in THEIRS}
            for name, module in inner.diffusion_model.named_modules()
        },
        "forwards": [name for name, module in inner.named_modules() if "forward" in module.__dict__],
        "weights": {name: (id(value), value._version) for name, value in inner.named_parameters()},
        "state": list(inner.state_dict()),
    }


@contextlib.contextmanager
def unchanged(model: ModelPatcher, case: Case) -> Iterator[None]:
    sample(model, case, steps=1)  # what the host itself leaves on a model
    before = snapshot(model)
    weights = {name: value.clone() for name, value in model.model.state_dict().items()}
    yield
    after = snapshot(model)
    for key, value in before.items():
        assert after[key] == value, key
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


class BlockError(RuntimeError):
    pass


@every_family
def test_model_is_unchanged_by_attaching_and_by_runs(case: Case) -> None:
    model = model_of(case)
    with unchanged(model, case):
        for forecast in ("hold", "taylor"):
            sample(accelerate(model, forecast=forecast), case, steps=STEPS)


@every_family
def test_model_is_unchanged_by_an_exception_in_a_deep_block(case: Case) -> None:
    model = model_of(case)
    last = case.blocks(model.model.diffusion_model)[-1]
    full = sample(model, case, steps=STEPS)
    accelerated = accelerate(model, forecast="taylor")
    good = sample(accelerated, case, steps=STEPS)
    for at in (4, 5):  # in the first cache step, and in the first reuse step
        with unchanged(model, case):
            calls = []

            def explode(*_: Any, calls: list[int] = calls, at: int = at) -> None:
                calls.append(1)
                if len(calls) == at:
                    raise BlockError

            handle = last.register_forward_pre_hook(explode)
            with pytest.raises(BlockError):
                sample(accelerated, case, steps=STEPS)
            handle.remove()
        assert runs(accelerated)[-1]["completed"] is False
    assert torch.equal(sample(model, case, steps=STEPS), full)
    assert torch.equal(sample(accelerated, case, steps=STEPS), good)


@every_family
def test_model_is_unchanged_by_an_interrupt(case: Case) -> None:
    model = model_of(case)
    accelerated = accelerate(model)
    good = sample(accelerated, case, steps=STEPS)

    def interrupt(step: int, *_: Tensor) -> None:
        if step == 4:
            raise model_management.InterruptProcessingException

    with unchanged(model, case), pytest.raises(model_management.InterruptProcessingException):
        sample(accelerated, case, steps=STEPS, callback=interrupt)
    run = runs(accelerated)[-1]
    assert (run["completed"], run["decisions"][:5]) == (False, ["compute"] * 3 + ["cache", "reuse"])
    assert torch.equal(sample(accelerated, case, steps=STEPS), good)


@every_family
def test_another_packs_instance_forward_survives_and_runs(case: Case) -> None:
    model = case.build()
    blocks = case.blocks(model.model.diffusion_model)
    calls = dict.fromkeys((0, 3, case.depth - 1), 0)
    theirs = {}
    for index in calls:
        def forward(*args: Any, index: int = index, original: Any = blocks[index].forward, **kwargs: Any) -> Any:
            calls[index] += 1
            return original(*args, **kwargs)

        theirs[index] = blocks[index].forward = forward
    accelerated = accelerate(model, boundary=4)
    with unchanged(model, case):
        for key in calls:
            calls[key] = 0
        found = sample(accelerated, case, steps=STEPS)
        assert list(calls.values()) == [case.calls() * steps for steps in (7, 7, 10)]
    for index, forward in theirs.items():
        assert blocks[index].__dict__["forward"] is forward
    assert torch.equal(found, sample(accelerate(model_of(case), boundary=4), case, steps=STEPS))


def test_accelerated_clones_do_not_share_wrappers_with_the_input() -> None:
    case = CASES["sd3"]
    model = model_of(case)
    full = sample(model, case, steps=STEPS)
    first = accelerate(model, boundary=2)
    second = accelerate(first, group_size=1)
    third = first.clone()
    assert torch.equal(sample(model, case, steps=STEPS), full)
    assert torch.equal(sample(second, case, steps=STEPS), full), "the last node wins"
    assert not torch.equal(sample(first, case, steps=STEPS), full), "and leaves the one before as it was"
    assert torch.equal(sample(third, case, steps=STEPS), sample(first, case, steps=STEPS))
    assert len(runs(first)) == 3, "clones share the log"
    assert len(runs(second)) == 1
