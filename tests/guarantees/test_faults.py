"""Guarantee: whatever fails, and whenever, the model is untouched, nothing stays in memory, and the next run is right."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy import model_management
from comfy.model_patcher import ModelPatcher
from contract.reference import Reference, plan
from contract.test_untouched import unchanged
from harness import STEPS, accelerate, assert_close, distance, last_run, model_of, reused_steps
from tiny import CASES, Case, sample
from torch import Tensor, nn

import blockdance_core
from blockdance_core import visit
from blockdance_core.host import attach as host_attach
from blockdance_core.session import Session
from blockdance_core.streams import NO_MEMORY, Entry, FeatureCache
from blockdance_core.timing import Stopwatch
from blockdance_core.visit import Visit

Interrupted = model_management.InterruptProcessingException
sd3, flux = CASES["sd3"], CASES["flux"]


def cases(*names: str) -> pytest.MarkDecorator:
    """These cases, as far as this release of the host has them."""
    return pytest.mark.parametrize("case", [CASES[name] for name in names if name in CASES], ids=lambda case: case.name)


class BlockError(RuntimeError):
    pass


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """No session and no stored tensor of the runs inside outlives them, not even until the next garbage collection."""
    sessions: list[weakref.ref[Session]] = []
    stored: list[weakref.ref[Tensor]] = []
    begin, kept = Session.__init__, FeatureCache._kept

    def created(self: Session, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        sessions.append(weakref.ref(self))

    def keep(self: FeatureCache, *args: Any) -> Tensor | None:
        tensor = kept(self, *args)
        if tensor is not None:
            stored.append(weakref.ref(tensor))
        return tensor

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Session, "__init__", created)
            patch.setattr(FeatureCache, "_kept", keep)
            yield
        assert sessions
        assert [reference() for reference in (*sessions, *stored) if reference() is not None] == []
    finally:
        gc.enable()


# Interrupts and exceptions


@cases("sd3", "flux", "hunyuan_dit", "ltxav")
def test_an_interrupt_during_any_step_leaves_nothing(case: Case) -> None:
    """The host sets a flag, and the next operation inside the model raises."""
    model = model_of(case)
    accelerated = accelerate(model, forecast="taylor")
    good = sample(accelerated, case, steps=STEPS)
    with unchanged(model, case):
        for at in range(STEPS - 1):
            def stop(step: int, *_: Any, at: int = at) -> None:
                if step == at:
                    model_management.interrupt_current_processing()

            with nothing_left(), contextlib.suppress(Interrupted):
                sample(accelerated, case, steps=STEPS, callback=stop)
            assert not model_management.interrupt_processing, "it was noticed"
            run = last_run(accelerated)
            assert (run["completed"], run["evaluations"]) == (False, at + 2)
            assert run["decisions"][at + 1:] in ([d] + ["compute"] * (STEPS - at - 2) for d in ("compute", "cache"))
            assert torch.equal(sample(accelerated, case, steps=STEPS), good), at


def test_error_of_a_device_that_cannot_tell_the_times_either_is_shown_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any) -> None:
        raise RuntimeError("device lost")

    def fail(*_: Any) -> None:
        raise ValueError("what went wrong")

    accelerated = accelerate(model_of(sd3))
    good = sample(accelerated, sd3, steps=STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(Stopwatch, "milliseconds", lost)
        with pytest.raises(ValueError, match="what went wrong"):
            sample(accelerated, sd3, steps=STEPS, callback=fail)
    assert torch.equal(sample(accelerated, sd3, steps=STEPS), good)


@cases("sd3", "flux", "hunyuan_dit")
@pytest.mark.parametrize("call", [1, 4, 5], ids=["compute", "cache", "reuse"])
def test_an_exception_in_any_block_leaves_nothing(case: Case, call: int) -> None:
    model = model_of(case)
    accelerated = accelerate(model, forecast="taylor", boundary=4)
    good = sample(accelerated, case, steps=STEPS)
    for block in case.blocks(model.model.diffusion_model):
        for register in (block.register_forward_pre_hook, block.register_forward_hook):
            calls: list[int] = []

            def fail(*_: Any, calls: list[int] = calls) -> None:
                calls.append(1)
                if len(calls) == call:
                    raise BlockError

            with unchanged(model, case), nothing_left(), contextlib.suppress(BlockError):
                handle = register(fail)
                try:
                    sample(accelerated, case, steps=STEPS)
                finally:
                    handle.remove()
            assert len(calls) == call
            assert last_run(accelerated)["completed"] is False
    assert torch.equal(sample(accelerated, case, steps=STEPS), good)


# Memory that runs out


def real_cpu_error() -> BaseException:
    try:
        torch.empty(2**50)
    except RuntimeError as error:
        return RuntimeError(*error.args)
    pytest.skip("this machine promises any amount of memory")


ERRORS: dict[str, Callable[[], BaseException]] = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "cpu": real_cpu_error,
}
ALLOCATIONS: dict[str, tuple[Any, str]] = {
    "clone of the input": (visit, "cloned"),
    "layout of the boundary": (Visit, "_in_layout_of"),
    "stored feature": (FeatureCache, "_kept"),
    "forecast": (FeatureCache, "_combined"),
}


class Failing:
    """Stands in for a function, and fails while `active`."""

    def __init__(self, original: Callable[..., Any], error: Callable[[], BaseException]) -> None:
        self.original, self.error, self.active = original, error, True

    def __get__(self, owner: object, kind: type | None = None) -> Callable[..., Any]:
        return functools.partial(self, owner)

    def __call__(self, *args: Any) -> Any:
        if self.active:
            raise self.error()
        return self.original(*args)


@cases("flux", "hunyuan_dit")
@pytest.mark.parametrize("where", ALLOCATIONS)
@pytest.mark.parametrize("kind", ERRORS)
def test_memory_that_runs_out_in_our_own_code_means_full_compute(
    case: Case, where: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = sample(model_of(case), case, steps=STEPS)
    owner, name = ALLOCATIONS[where]
    accelerated = accelerate(model_of(case), forecast="taylor", boundary=4)
    failing = Failing(getattr(owner, name), ERRORS[kind])

    def fail_in_steps_3_and_6(step: int, *_: Any) -> None:
        failing.active = step + 1 in (3, 6)

    with unchanged(model_of(case), case), nothing_left(), monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        assert torch.equal(sample(accelerated, case, steps=STEPS), full)
        run = last_run(accelerated)
        assert run["reused_calls"] == 0
        assert NO_MEMORY in run["fallbacks"]
        failing.active = False
        assert torch.isfinite(sample(accelerated, case, steps=STEPS, callback=fail_in_steps_3_and_6)).all()
        run = last_run(accelerated)
        assert 0 < run["reused_steps"] < 3, "one that did not fail reuses"
        assert run["fallbacks"][NO_MEMORY] > 0


@pytest.mark.parametrize("where", ALLOCATIONS)
def test_any_other_error_in_our_own_code_is_not_swallowed(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = ALLOCATIONS[where]
    accelerated = accelerate(model_of(flux), forecast="taylor", boundary=4)
    with unchanged(model_of(flux), flux), nothing_left(), contextlib.suppress(BlockError), monkeypatch.context() as patch:
        patch.setattr(owner, name, Failing(getattr(owner, name), BlockError))
        sample(accelerated, flux, steps=STEPS)
    assert last_run(accelerated)["completed"] is False


class Immovable(Tensor):
    """A stored tensor that cannot go to another device."""

    def to(self, *_: Any, **__: Any) -> Tensor:
        raise real_cpu_error()


@pytest.mark.parametrize("choice", ["cpu", "auto"])
def test_memory_that_runs_out_while_features_move_to_the_cpu_drops_them(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_attach, "_room", lambda *_: -1)
    kept = FeatureCache._kept

    def immovable(self: FeatureCache, *args: Any) -> Tensor | None:
        tensor = kept(self, *args)
        return tensor.as_subclass(Immovable) if tensor is not None and len(moved) == 0 else tensor

    moved: list[Any] = []
    move = FeatureCache.move

    def moving(self: FeatureCache, *args: Any) -> Any:
        result = move(self, *args)
        moved.append((result, self.stored_bytes, len(self._entries)))
        return result

    monkeypatch.setattr(FeatureCache, "_kept", immovable)
    monkeypatch.setattr(FeatureCache, "move", moving)
    accelerated = accelerate(model_of(flux), start_percent=0.0, group_size=4, cache_device=choice)
    found = sample(accelerated, flux, steps=STEPS)
    assert moved == [((NO_MEMORY,), 0, 0)]
    run = last_run(accelerated)
    assert NO_MEMORY in run["warnings"]
    assert run["decisions"] == ["cache", "cache", "reuse", "reuse", "cache", "reuse", "reuse", "reuse", "compute", "compute"]
    assert torch.isfinite(found).all()


@cases("flux", "sd3", "hunyuan_dit", "hunyuan3d_21", "cosmos_t2v", "ltxav", "minimax_h3", "seedvr2_3b", "mochi")
def test_every_kind_of_feature_can_be_kept_anywhere(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several components, None among them, several taps, samples in another dimension or not apart."""
    model, found, runs = model_of(case), {}, {}
    boundary = case.depth - 1 if case.name == "sd3" else 4
    two = None
    for name, device, room in (("gpu", "gpu", 2.0**40), ("cpu", "cpu", 0), ("fits", "auto", 2.0**40), ("none", "auto", -1.0),
                               ("half", "auto", None)):
        room = two - 1 if room is None else room
        monkeypatch.setattr(host_attach, "_room", lambda *_, room=room: room)
        accelerated = accelerate(model, forecast="taylor", boundary=boundary, cache_device=device)
        found[name] = sample(accelerated, case, steps=STEPS)
        runs[name] = last_run(accelerated)
        two = runs[name]["predicted_bytes"] if two is None else two
        assert runs[name]["cached_bytes"] == runs[name]["predicted_bytes"]
        assert (runs[name]["reused_steps"], runs[name]["fallbacks"]) == (3, {})
    for name in ("cpu", "fits", "none"):
        assert torch.equal(found[name], found["gpu"]), name
    assert torch.equal(found["half"], sample(accelerate(model, forecast="delta", boundary=boundary), case, steps=STEPS))
    assert runs["half"]["cached_bytes"] == two // 2
    assert "CPU" in runs["none"]["warnings"][0]
    assert "no history" in runs["half"]["warnings"][0]


# What changes between runs and within one


class Changing(Reference):
    """Restates the method for a run in whose middle something changes: at another size all starts anew, dtypes stay apart."""

    size: tuple[int, ...] = ()

    def _call(self, model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        super()._call(model, arguments, keywords)
        x = arguments[0]
        self.control = (self.control, x.dtype)
        if x.shape[2:] != self.size:
            self.size = x.shape[2:]
            self.full.clear()


def progressive(change: Callable[[int, Tensor], Tensor]) -> comfy.samplers.KSAMPLER:
    """Euler, with `change` applied to the latent behind each step, as samplers of rising resolution do it."""
    def run(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None) -> Tensor:
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i] * x.new_ones([len(x)]), **(extra_args or {}))
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
            x = change(i, x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i]))
        return x

    return comfy.samplers.KSAMPLER(run)


def sample_with(model: ModelPatcher, case: Case, sampler: Any, callback: Any = None) -> Tensor:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*case.conds(model))
    guider.set_cfg(3.0)
    latent = case.latent()
    return guider.sample(comfy.sample.prepare_noise(latent, 0), latent, sampler, sigmas_of(model), callback=callback,
                         disable_pbar=True, seed=0)


def sigmas_of(model: ModelPatcher) -> Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)


def resized(sizes: dict[int, tuple[int, ...]], step: int, x: Tensor) -> Tensor:
    size = (*x.shape[2:-2], *sizes[step]) if step in sizes else None
    return x if size is None else nn.functional.interpolate(x, size)


RESIZED: dict[str, dict[int, tuple[int, ...]]] = {
    "up in a group": {4: (12, 12)},
    "up at its start": {5: (12, 12)},
    "up by far": {3: (2, 2), 4: (16, 16)},
    "there and back": {3: (12, 10), 4: (8, 8)},
    "three sizes": {2: (6, 6), 4: (8, 10), 6: (12, 12)},
}


@cases("sd3", "flux", "wan_t2v")
@pytest.mark.parametrize("name", RESIZED)
@pytest.mark.parametrize("forecast", ["hold", "taylor"])
def test_a_latent_resized_in_mid_run_starts_anew_and_crosses_nothing(case: Case, name: str, forecast: str) -> None:
    model = model_of(case)
    change = functools.partial(resized, RESIZED[name])
    reference = Changing(case, forecast, 4, sigmas_of(model), plan(STEPS, 0.25, 1.0, 4))
    with reference.watch(model):
        expected = sample_with(model, case, progressive(change), reference.callback)
    accelerated = accelerate(model, forecast=forecast, boundary=4, group_size=4)
    found = sample_with(accelerated, case, progressive(change))
    assert_close(found, expected)
    run = last_run(accelerated)
    assert reused_steps(run) == sorted(set(reference.replaced))
    assert run["warnings"] == []
    assert all("shape" in reason for reason in run["fallbacks"])
    assert torch.equal(sample_with(accelerated, case, progressive(change)), found)


def at_dtype(model: ModelPatcher, dtype: torch.dtype) -> ModelPatcher:
    """A MODEL whose weights are cast on the fly to another dtype, as for weights that cannot be computed with."""
    model.model.manual_cast_dtype = dtype
    return model


def castable(case: Case) -> ModelPatcher:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("comfy.ops.pick_operations", lambda *_, **__: comfy.ops.manual_cast)
        return case.build()


@cases("sd3", "flux", "wan_t2v")
@pytest.mark.parametrize("forecast", ["hold", "taylor"])
def test_a_dtype_changed_in_mid_run_starts_anew(case: Case, forecast: str) -> None:
    model = castable(case)
    reference = Changing(case, forecast, 4, sigmas_of(model), plan(STEPS, 0.25, 1.0, 4))

    def switch(step: int, *_: Any) -> None:
        at_dtype(model, torch.bfloat16 if step in (3, 4) else torch.float32)

    with reference.watch(model):
        at_dtype(model, torch.float32)
        expected = sample(model, case, steps=STEPS, callback=lambda *args: (switch(*args), reference.callback(*args))[0])
    accelerated = accelerate(model, forecast=forecast, boundary=4, group_size=4)
    at_dtype(model, torch.float32)
    found = sample(accelerated, case, steps=STEPS, callback=switch)
    run = last_run(accelerated)
    assert distance(found, expected) <= (1e-4 if forecast == "hold" else 2e-2)
    assert reused_steps(run) == sorted(set(reference.replaced)) == [5, 6, 8]
    assert list(run["fallbacks"].values()) == [1]


def test_a_dtype_changed_between_runs_gives_what_a_fresh_model_gives() -> None:
    used, fresh = castable(sd3), castable(sd3)
    accelerated = accelerate(used, forecast="taylor")
    first = sample(accelerated, sd3, steps=STEPS)
    at_dtype(used, torch.bfloat16)
    second = sample(accelerated, sd3, steps=STEPS)
    assert torch.equal(second, sample(accelerate(at_dtype(fresh, torch.bfloat16), forecast="taylor"), sd3, steps=STEPS))
    assert not torch.equal(first, second)
    at_dtype(used, torch.float32)
    assert torch.equal(sample(accelerated, sd3, steps=STEPS), first)


# Many runs


def test_fifty_runs_leave_as_many_objects_as_ten() -> None:
    accelerated = accelerate(model_of(flux), forecast="taylor")

    def stop(step: int, *_: Any) -> None:
        if step == 5:
            raise Interrupted

    def alive() -> Counter[str]:
        gc.collect()
        return Counter(
            kind.__qualname__ for kind in map(type, gc.get_objects())
            if str(kind.__module__).startswith(blockdance_core.__name__) or issubclass(kind, Tensor)
        )

    counts = []
    for number in range(50):
        with contextlib.suppress(Interrupted):
            sample(accelerated, flux, steps=STEPS, seed=number, callback=stop if number % 3 == 2 else None)
        if number in (9, 49):
            counts.append(alive())
    assert counts[1] == counts[0]
    assert not {Session.__qualname__, Entry.__qualname__, Visit.__qualname__} & set(counts[1])
