"""Guarantee beside torch.compile: blocks really are skipped, the result is the uncompiled one, little is compiled again.

Backends without a C++ compiler, and the guard filter of the host's TorchCompileModel node, which leaves the
transformer_options unguarded.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from comfy.ldm.modules import attention
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from harness import STEPS, accelerate, assert_close, last_run, model_of, reused_steps
from tiny import CASES, Case, sample

from blockdance_core.config import QUALITIES
from blockdance_core.host import profiling
from blockdance_core.host.rollout import Prompt, Rollouts
from blockdance_core.interception import FullGraphError

sd3, flux = CASES["sd3"], CASES["flux"]
MODELS = [CASES[name] for name in ("sd3", "flux", "pixart_sigma", "wan_t2v", "hunyuan3d_21", "undeclared")]


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled yet, and the attention of a GPU: the one of the CPU asks for the free memory, which breaks graphs."""
    for module in [module for name, module in sys.modules.items() if name.startswith("comfy.")]:
        for name in ("optimized_attention", "optimized_attention_masked"):
            if getattr(module, name, None) is not None:
                monkeypatch.setattr(module, name, attention.attention_pytorch)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model: ModelPatcher, keys: list[str] | None = None, backend: Any = "eager", **settings: Any) -> ModelPatcher:
    clone = model.clone()
    options = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(clone, backend=backend, keys=keys or ["diffusion_model"], options=options, **settings)
    return clone


def blocks_of(case: Case) -> list[str]:
    (path,) = case.lists
    return [f"diffusion_model.{path}.{index}" for index in range(case.depth)]


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("case", "order"), [*((case, "compile first") for case in MODELS), (sd3, "accelerate first")],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_compiled_model_skips_blocks_and_recompiles_little(case: Case, order: str) -> None:
    model = model_of(case)
    settings = {"forecast": "taylor", "boundary": 4}
    expected = sample(accelerate(model, **settings), case, steps=STEPS)
    if order == "compile first":
        accelerated = accelerate(compiled(model), **settings)
    else:
        accelerated = compiled(accelerate(model, **settings))
    assert_close(expected, sample(accelerated, case, steps=STEPS))
    run = last_run(accelerated)
    assert reused_steps(run) == [4, 6, 8]
    assert run["fallbacks"] == {}
    first = graphs()
    assert 0 < first <= 3 * case.depth
    sample(accelerated, case, steps=STEPS, seed=1)
    assert graphs() <= first + 2
    second = graphs()
    sample(accelerated, case, steps=STEPS, seed=2)
    assert graphs() == second, "a third run compiles again"
    assert not any("forward" in block.__dict__ for block in case.blocks(model.model.diffusion_model))


@pytest.mark.parametrize("case", [sd3, flux], ids=lambda case: case.name)
def test_one_compiled_model_serves_runs_with_other_settings_and_without_us(case: Case) -> None:
    """A node before ours keeps its compiled model, whatever is done behind it in the next prompt."""
    model = model_of(case)
    base = compiled(model)
    full = sample(model, case, steps=STEPS)
    for settings in ({}, {"boundary": 4, "forecast": "taylor"}, {}, {"boundary": 2, "forecast": "hold"}, {}):
        if settings:
            found = sample(accelerate(base, **settings), case, steps=STEPS)
            assert_close(found, sample(accelerate(model, **settings), case, steps=STEPS))
        else:
            assert_close(full, sample(base, case, steps=STEPS))
    assert graphs() <= 3 * case.depth


@pytest.mark.parametrize("order", ["compile first", "accelerate first"])
def test_compiled_blocks_are_skipped(order: str) -> None:
    ran: list[int] = []

    def counting(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            ran.append(1)
            return graph(*args)

        return run

    model = model_of(sd3)
    settings = {"keys": blocks_of(sd3), "backend": counting, "fullgraph": True}  # one graph a block
    expected = sample(accelerate(model, boundary=4), sd3, steps=STEPS)
    if order == "compile first":
        accelerated = accelerate(compiled(model, **settings), boundary=4)
    else:
        accelerated = compiled(accelerate(model, boundary=4), **settings)
    for seed in (0, 1):
        ran.clear()
        found = sample(accelerated, sd3, steps=STEPS, seed=seed)
        assert len(ran) == 7 * 8 + 3 * 3
        assert reused_steps(last_run(accelerated)) == [4, 6, 8]
        assert graphs() <= sd3.depth
        if seed == 0:
            assert_close(expected, found)


@pytest.mark.parametrize("order", ["compile first", "accelerate first"])
def test_one_graph_of_the_whole_model_is_refused_with_what_to_do(order: str) -> None:
    model = model_of(sd3)
    if order == "compile first":
        accelerated = accelerate(compiled(model, fullgraph=True))
    else:
        accelerated = compiled(accelerate(model), fullgraph=True)
    with pytest.raises(FullGraphError, match="Turn fullgraph off, or compile the blocks one by one"):
        sample(accelerated, sd3, steps=STEPS)
    assert not any("forward" in block.__dict__ for block in sd3.blocks(model.model.diffusion_model))


@pytest.mark.parametrize("order", ["compile first", "accelerate first"])
def test_one_graph_of_the_whole_model_is_skipped_as_a_whole(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a quality nothing is put between the blocks: the graph stays as it is."""
    monkeypatch.setitem(QUALITIES, "draft", math.inf)
    model, settings = model_of(sd3), {"preset": "auto", "quality": "draft"}
    expected = sample(accelerate(model, **settings), sd3, steps=STEPS)
    if order == "compile first":
        accelerated = accelerate(compiled(model, fullgraph=True), **settings)
    else:
        accelerated = compiled(accelerate(model, **settings), fullgraph=True)
    assert_close(expected, sample(accelerated, sd3, steps=STEPS))
    assert reused_steps(last_run(accelerated)) == list(range(2, STEPS))
    assert graphs() == 1


def test_one_graph_behind_a_node_that_may_answer_itself_is_refused_with_what_to_do() -> None:
    """Whether the model ran is then seen at its first block alone, and there is no getting at it."""
    model = compiled(model_of(sd3), fullgraph=True)
    model.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))
    with pytest.raises(FullGraphError, match="Turn fullgraph off, or compile the blocks one by one"):
        sample(accelerate(model, preset="auto", quality="balanced"), sd3, steps=STEPS)
    assert not any("forward" in block.__dict__ for block in sd3.blocks(model.model.diffusion_model))


def test_one_graph_of_the_whole_model_is_profiled() -> None:
    positive, negative = sd3.conds(model_of(sd3))
    prompt = Prompt(positive, negative, sd3.latent(1), 0, 4, 3.0, "euler", "simple")
    models = model_of(sd3), compiled(model_of(sd3), fullgraph=True)
    expected, found = (profiling.gram(Rollouts(model, prompt), [sd3.depth]) for model in models)
    assert found == pytest.approx(expected, rel=1e-3)
