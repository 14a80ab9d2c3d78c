"""Guarantee: several threads in one run, as the host makes them for several GPUs, keep their features apart and end well."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from comfy import model_management
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from contract.test_untouched import snapshot
from harness import STEPS, accelerate, assert_close, last_run, reused_steps
from tiny import CASES, Case, count_calls, sample
from torch import Tensor, nn

from blockdance_core.config import QUALITIES, Config
from blockdance_core.forecast import Forecast
from blockdance_core.host import attach
from blockdance_core.host.rollout import Prompt
from blockdance_core.host.search import profiled
from blockdance_core.policy import Fixed
from blockdance_core.schedule import Reuse
from blockdance_core.session import Session, StepFigures
from blockdance_core.visit import CallInfo

some = [CASES[name] for name in ("sd3", "flux", "wan_vace", "hunyuan_dit", "cosmos_t2v", "ltxav") if name in CASES]
DEVICES = [torch.device("cpu"), torch.device("cpu:0")]
"""To the host these are two devices, to torch they are one."""


class BlockError(RuntimeError):
    pass


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> Callable[[Case], tuple[ModelPatcher, ModelPatcher]]:
    """Gives a MODEL with a deep clone, as of the node "MultiGPU CFG Split", and that clone."""
    multigpu = pytest.importorskip("comfy.multigpu", reason="this release of the host runs one GPU")

    def both(case: Case) -> tuple[ModelPatcher, ModelPatcher]:
        model = case.build()
        model.cached_patcher_init = (case.build, ())
        with monkeypatch.context() as patch:
            patch.setattr(model_management, "get_all_torch_devices", lambda exclude_current=False: DEVICES)
            cloned = multigpu.create_multigpu_deepclones(model, 2)
        (other,) = cloned.get_additional_models_with_key("multigpu")
        assert other.model is not model.model
        return cloned, other

    return both


@contextlib.contextmanager
def on_its_own_thread() -> Iterator[set[int]]:
    """Collects the threads from which the model is called."""
    seen: set[int] = set()
    begin = Session.call

    def call(self: Session, *args: Any) -> Any:
        seen.add(threading.get_ident())
        return begin(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "call", call)
        yield seen


@pytest.mark.parametrize("case", some, ids=lambda case: case.name)
def test_conditionings_on_two_devices_reuse_their_own_and_are_counted(case: Case, two_devices: Any) -> None:
    model, other = two_devices(case)
    accelerated = accelerate(model, forecast="taylor")
    with on_its_own_thread() as threads, contextlib.ExitStack() as stack:
        counts = [stack.enter_context(count_calls(case.blocks(each.model.diffusion_model))) for each in (model, other)]
        found = sample(accelerated, case, steps=STEPS)
    assert len(threads) == 2
    assert threading.get_ident() not in threads
    boundary = last_run(accelerated)["boundary"][4]
    assert counts == [[STEPS - 3] * (boundary + 1) + [STEPS] * (case.depth - boundary - 1)] * 2
    run = last_run(accelerated)
    assert (run["calls"], run["reused_calls"], run["fallbacks"], run["warnings"]) == ([2] * STEPS, 6, {}, [])
    assert run["cached_bytes"] == run["predicted_bytes"]
    alone = accelerate(case.build(), forecast="taylor")
    assert_close(found, sample(alone, case, steps=STEPS), 1e-3)
    assert run["cached_bytes"] == last_run(alone)["cached_bytes"]
    assert torch.equal(sample(accelerated, case, steps=STEPS), found)


@pytest.mark.parametrize("tolerance", [1.0, 3.0, 6.0])
def test_a_quality_gives_both_devices_one_answer(tolerance: float, two_devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that one side of guidance has alone is multiplied."""
    monkeypatch.setitem(QUALITIES, "draft", tolerance)
    case = CASES["sd3"]
    model, _ = two_devices(case)
    settings = {"preset": "auto", "quality": "draft"}
    accelerated, alone = accelerate(model, **settings), accelerate(case.build(), **settings)
    found, expected = (sample(one, case, steps=24) for one in (accelerated, alone))
    assert "reuse" in last_run(alone)["decisions"]
    assert last_run(accelerated)["decisions"] == last_run(alone)["decisions"]
    assert_close(found, expected, 1e-3)


def test_weights_that_guidance_has_of_its_own_hold_on_one_device_alone(two_devices: Any) -> None:
    """They take both sides; those of the unconditional stream for both are worse than the expansions."""
    case = CASES["sd3"]
    model, _ = two_devices(case)

    def follows(one: ModelPatcher, forecast: Forecast) -> ModelPatcher:
        row = Reuse(case.depth, forecast)
        return accelerate(one, policy=Fixed(tuple(row if step in (3, 6) else None for step in range(STEPS))))

    accelerated = follows(model, Forecast(True, 1, fitted=((1, 1.4), (2, -0.4)), guided=(0.9, 0.2)))
    found = sample(accelerated, case, steps=STEPS)
    assert reused_steps(last_run(accelerated)) == [3, 6]
    assert last_run(accelerated)["warnings"] == []
    assert_close(found, sample(follows(case.build(), Forecast(True, 1)), case, steps=STEPS), 1e-3)


@pytest.mark.parametrize("settings", [{"preset": "auto", "quality": "draft"}, {"forecast": "taylor2"}])
def test_a_device_that_is_short_of_memory_drops_no_history_that_the_other_keeps(
    settings: dict[str, Any], two_devices: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would forecast one side of guidance by other orders."""
    monkeypatch.setitem(QUALITIES, "draft", 3.0)
    case = CASES["sd3"]
    model, other = two_devices(case)
    alone = accelerate(case.build(), **settings)
    expected, needed = sample(alone, case, steps=24), last_run(alone)["predicted_bytes"] / 2
    monkeypatch.setattr(attach, "_room", lambda owner, _: needed / 2 if owner is other.model else 2.0**40)
    accelerated = accelerate(model, **settings)
    found = sample(accelerated, case, steps=24)
    run = last_run(accelerated)
    assert "kept in CPU memory" in "".join(run["warnings"])
    assert "reuse" in run["decisions"]
    assert run["decisions"] == last_run(alone)["decisions"]
    assert_close(found, expected, 1e-3)


def test_a_model_on_two_devices_is_profiled_on_one(two_devices: Any) -> None:
    case = CASES["sd3"]
    model, other = two_devices(case)
    prompt = Prompt(*case.conds(model), case.latent(1), 1, 8, 3.0, "euler", "simple")
    profile, _ = profiled(model, prompt, (case.depth - 3, case.depth))
    assert np.isfinite(profile.grams).all()
    alone, _ = profiled(case.build(), prompt, (case.depth - 3, case.depth))
    np.testing.assert_allclose(profile.grams, alone.grams, rtol=1e-3)
    assert [snapshot(each)["forwards"] for each in (model, other)] == [[], []], "no hook stays"


def test_a_conditioning_that_changes_its_device_in_mid_run_takes_no_other_feature(two_devices: Any) -> None:
    """Which device gets which conditioning depends on their number: from four to three, the others move up."""
    case, boundary = CASES["sd3"], 4
    model, other = two_devices(case)
    positive, negative = case.conds(model)
    texts = [case.conds(model, seed=seed)[0][0][0] for seed in (1, 2)]
    more = [[text, {**positive[0][1], **extra}] for text, extra in zip(texts, ({"end_percent": 0.5}, {}), strict=True)]
    accelerated = accelerate(model, group_size=6, boundary=boundary)
    computed: dict[Any, Tensor] = {}
    wrong: list[Any] = []
    now = threading.local()

    def watch(executor: Any, *args: Any, **kwargs: Any) -> Any:
        now.owner, now.computes, now.uuids = id(executor.class_obj), False, args[5]["uuids"]
        return executor(*args, **kwargs)

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for uuid, row in zip(now.uuids, args[1], strict=True):
            if now.computes:
                computed[now.owner, uuid] = row.clone()
            elif not torch.equal(computed[now.owner, uuid], row):
                wrong.append(uuid)

    accelerated.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "watch", watch)
    for each in (model, other):
        blocks = case.blocks(each.model.diffusion_model)
        first = next(module for module in blocks[0].modules() if isinstance(module, nn.Linear))
        first.register_forward_pre_hook(lambda *_: setattr(now, "computes", True))
        blocks[boundary + 1].register_forward_pre_hook(see, with_kwargs=True)
    sample(accelerated, case, steps=STEPS, conds=([more[0], positive[0], more[1]], negative))
    run = last_run(accelerated)
    assert wrong == []
    assert len(computed) > 4, "a conditioning changed its device"
    assert 0 < run["reused_calls"] < 10
    assert sum(run["fallbacks"].values()) > 0


@pytest.mark.parametrize("at", [1, 4, 5], ids=["compute", "cache", "reuse"])
@pytest.mark.parametrize("error", [BlockError, model_management.InterruptProcessingException, torch.OutOfMemoryError])
def test_an_error_in_one_thread_reaches_the_caller_and_leaves_nothing(
    at: int, error: type[BaseException], two_devices: Any
) -> None:
    case = CASES["sd3"]
    model, other = two_devices(case)
    accelerated = accelerate(model, forecast="taylor")
    good = sample(accelerated, case, steps=STEPS)
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            raise error

    handle = case.blocks(other.model.diffusion_model)[-1].register_forward_pre_hook(fail)
    before = [snapshot(each) for each in (model, other)]
    with pytest.raises(error):
        sample(accelerated, case, steps=STEPS)
    for each, then in zip((model, other), before, strict=True):
        now = snapshot(each)
        assert [now[key] == then[key] for key in ("options", "attributes", "modules", "weights", "state")] == [True] * 5
    handle.remove()
    assert last_run(accelerated)["completed"] is False
    assert torch.equal(sample(accelerated, case, steps=STEPS), good)


def test_a_thread_that_outlasts_the_run_is_waited_for(two_devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error on one device the host gives the threads of the others five seconds to end, then goes on."""
    import comfy.multigpu

    case = CASES["sd3"]
    model, other = two_devices(case)
    accelerated = accelerate(model, forecast="taylor")
    good = sample(accelerated, case, steps=STEPS)

    def shutdown(pool: Any) -> None:  # as if those seconds were over
        for queue in pool._work_queues.values():
            queue.put(None)

    monkeypatch.setattr(comfy.multigpu.MultiGPUThreadPool, "shutdown", shutdown)
    lingering, failed = threading.Event(), threading.Event()
    calls = {id(each): 0 for each in (model, other)}

    def fifth_call(each: ModelPatcher) -> bool:
        calls[id(each)] += 1
        return calls[id(each)] == 5

    def linger(*_: Any) -> None:
        if fifth_call(other):
            lingering.set()
            failed.wait(10)
            time.sleep(0.5)

    def fail(*_: Any) -> None:
        if fifth_call(model):
            lingering.wait(10)
            failed.set()
            raise BlockError

    handles = [case.blocks(each.model.diffusion_model)[-1].register_forward_pre_hook(hook)
               for each, hook in ((other, linger), (model, fail))]
    with pytest.raises(BlockError):
        sample(accelerated, case, steps=STEPS)
    for each in (model, other):
        assert not any("forward" in block.__dict__ for block in case.blocks(each.model.diffusion_model))
    for handle in handles:
        handle.remove()
    monkeypatch.undo()
    assert torch.equal(sample(accelerated, case, steps=STEPS), good)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Preempted(StepFigures):
    """Lets other threads run between the reading and the writing of a count."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        time.sleep(1e-5)
        return value


@torch.no_grad()
def test_one_session_called_by_many_threads_at_once_counts_exactly() -> None:
    """Every thread has a model and an input of its own: a feature of another would show at once."""
    threads, steps, outputs, errors = 8, 20, {}, []
    sigmas = [1 - step / steps for step in range(steps + 1)]
    config = Config(preset="custom", window="steps", start_percent=0.1, end_percent=1.0, forecast="hold", boundary=3)
    session = Session(config, sigmas, [1 - sigma for sigma in sigmas])
    session.figures = [Preempted() for _ in range(steps)]
    models = [Blocks() for _ in range(threads)]
    begin, end = threading.Barrier(threads + 1), threading.Barrier(threads + 1)

    def work(number: int) -> None:
        x = torch.full((2, 3, 8), 100.0 * number)
        info = CallInfo((number, "other"), 2, x.device, frozenset(), None, lambda: 1e9)
        try:
            for step in range(steps):
                begin.wait(30)
                with session.call(models[number], models[number], x.device, lambda: info):
                    outputs[number, step] = models[number](x)
                end.wait(30)
        except (RuntimeError, AssertionError) as error:
            errors.append(error)
            begin.abort()
            end.abort()

    workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(threads)]
    for worker in workers:
        worker.start()
    for step in range(steps):
        with session.evaluation(sigmas[step]):
            begin.wait(30)
            end.wait(30)
    for worker in workers:
        worker.join(30)
    session.close()
    assert errors == []
    assert not any(worker.is_alive() for worker in workers)
    reused = [step for step in range(steps) if session.decision(step) == "reuse"]
    assert len(reused) == 8
    for step, figures in enumerate(session.figures):
        assert (figures.calls, figures.reused) == (threads, threads * (step in reused))
        assert figures.depth == 6 * threads
        assert figures.blocks == (2 if step in reused else 6) * threads
    assert session.fallbacks == {}
    assert all((output == 100.0 * number + 6).all() for (number, _), output in outputs.items())


def test_a_call_that_begins_after_the_end_of_the_run_is_left_alone() -> None:
    session = Session(Config(preset="custom"), [1.0, 0.5, 0.0], [0.0, 0.5, 1.0])
    session.close()
    model = Blocks()
    with session.evaluation(1.0), session.call(model, model, torch.device("cpu"), lambda: pytest.fail("asked")):
        assert not any("forward" in block.__dict__ for block in model.blocks)
    assert session.models == {}
