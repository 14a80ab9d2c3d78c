"""Finding the blocks of a model: declared, by structure, or refused with what was looked for."""

from __future__ import annotations

import logging
import pkgutil
import re
import types
from typing import Any

import comfy.ldm.hydit.models as hydit
import comfy.ops
import pytest
import torch
from harness import accelerate, every_case, last_run, model_of
from tiny import Case, sample
from torch import Tensor, nn

from blockdance_core import families, model_state
from blockdance_core.config import Config
from blockdance_core.schedule import Schedule
from blockdance_core.session import Session
from blockdance_core.visit import CallInfo


@pytest.mark.smoke
@every_case
def test_every_tiny_model_is_found_with_its_blocks_in_order(case: Case) -> None:
    model = model_of(case).model.diffusion_model
    match = families.find(model)
    assert [block.module for block in match.blocks] == case.blocks(model)
    assert match.family.verify is (case.family == "undeclared")
    assert match.family.name.lower().replace(" ", "_").startswith(case.family.split("_")[0])
    assert match.family.defaults.source


def test_every_family_module_is_usable() -> None:
    modules = [module.name for module in pkgutil.iter_modules(families.__path__) if not module.name.startswith("_")]
    assert len(families.declared()) == len(modules)


def test_families_are_small_declarations_with_a_source() -> None:
    declared = families.declared()
    assert {family.name for family in declared} >= {"SD3", "PixArt", "Flux", "Chroma", "Wan", "HunyuanVideo", "LTXV"}
    keys = [(name, tuple(section.path for section in family.sections)) for family in declared for name in family.classes]
    assert len(set(keys)) == len(keys), "SD3 and AuraFlow share the name MMDiT, but not their lists"


class Like(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, skip: Any = None) -> Tensor:
        return x + self.linear(x)


class Other(Like):
    pass


def lists(**named: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, module in named.items():
        model.add_module(name, module)
    return model


def likes(count: int) -> nn.ModuleList:
    return nn.ModuleList(Like() for _ in range(count))


@pytest.mark.parametrize(("model", "message"), [
    (lists(), r"children: none"),
    (lists(head=nn.Linear(2, 2), blocks=likes(3)), r"\(children: head, blocks; looked for blocks, .*double_blocks, "),
    (lists(head=nn.Linear(64, 64), blocks=likes(4)), "No block list|ambiguous"),
    (lists(blocks=nn.ModuleList([Like(), Other(), Like(), Like()])), "No block list"),
    (lists(first=likes(4), second=likes(4)), r"ambiguous \(first, second\)"),
    (lists(input_blocks=likes(6), output_blocks=likes(6)), "U-Net"),
    (lists(down_blocks=likes(6), up_blocks=likes(6)), "U-Net"),
])
def test_a_model_without_one_list_is_refused_with_what_was_found(model: nn.Module, message: str) -> None:
    with pytest.raises(families.UnsupportedModelError, match=message) as error:
        families.find(model)
    assert "U-Net" in message or "docs/adding-a-model.md" in str(error.value)


def test_lists_inside_the_blocks_do_not_make_a_model_ambiguous() -> None:
    blocks = nn.ModuleList(lists(experts=likes(4)) for _ in range(4))
    assert len(families.find(lists(inner=lists(blocks=blocks))).blocks) == 4


def test_a_compiled_model_is_looked_through() -> None:
    model = lists(blocks=likes(4))
    compiled = types.SimpleNamespace(_orig_mod=model)
    assert len(families.find(compiled).blocks) == 4  # type: ignore[arg-type]


def test_refused_subclasses_say_why() -> None:
    class WanModel(nn.Module):
        pass

    class CausalWanModel(WanModel):
        pass

    with pytest.raises(families.UnsupportedModelError, match=r"CausalWanModel cannot be accelerated: .* cache"):
        families.find(CausalWanModel())


@pytest.mark.parametrize("error", [ImportError, AttributeError, NameError, TypeError, KeyError, ValueError, SyntaxError])
def test_a_broken_family_is_left_out_by_name_and_the_others_stay(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    real = families.importlib.import_module

    def fail(name: str) -> Any:
        if name.endswith(".flux"):
            raise error("the host renamed something")
        return real(name)

    families.declared.cache_clear()
    try:
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(families.importlib, "import_module", fail)
            names = {family.name for family in families.declared()}
        assert "Flux" not in names
        assert "SD3" in names
        assert re.search("'flux' is not available: .*the host renamed something", caplog.text)
    finally:
        families.declared.cache_clear()


class Model(nn.Module):
    """x through like blocks; `how` says what else flows."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.blocks = how, likes(6)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for index, block in enumerate(reversed(self.blocks) if self.how == "reversed" else self.blocks):
            skip: Any = None
            if self.how == "long skip" and index > 3:
                skip = skips.pop(0)
            elif self.how == "derived skip" and index > 3:
                skip = skips.pop(0) + 1
            elif self.how == "list of skips" and index > 3:
                skip = [skips.pop(0)]
            elif self.how == "constant":
                skip = self.constant
            if self.how == "concatenated" and index > 3:
                x = x + skips.pop()
            if self.how == "twice":
                x = block(x)
            x = block(x, skip)
            skips.append(x)
        return x


def run(how: str, rows: int = 2, calls: int = 12) -> Session:
    model = Model(how)
    model.constant = torch.ones(2, 4, 8)
    sigmas = [1 - k / calls for k in range(calls + 1)]
    config = Config(preset="custom", window="steps", start_percent=0.25, end_percent=1.0, forecast="hold", boundary=2)
    session = Session(config, sigmas, [1 - sigma for sigma in sigmas])
    info = CallInfo((("cond", 0),), rows, torch.device("cpu"), frozenset(), None, lambda: float("inf"))
    x = torch.randn(2, 4, 8)
    for sigma in sigmas[:-1]:
        with session.evaluation(sigma), session.call(model, model, info.device, lambda: info):
            model(x)
    return session


@pytest.mark.parametrize("how", ["plain", "constant"])
def test_an_undeclared_model_with_a_plain_flow_is_accelerated(how: str) -> None:
    session = run(how)
    assert sum(figures.reused for figures in session.figures) == 4
    assert session.warnings == []


def test_a_fault_of_ours_is_no_unsupported_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> Schedule:
        raise ValueError("a fault")

    monkeypatch.setattr(model_state, "planned", fault)
    with pytest.raises(ValueError, match="a fault"):
        run("plain")


@pytest.mark.parametrize("how", ["long skip", "derived skip", "list of skips", "concatenated", "twice", "reversed"])
def test_an_undeclared_model_with_another_flow_is_computed_and_said(how: str) -> None:
    session = run(how)
    assert sum(figures.reused for figures in session.figures) == 0
    assert "cannot be accelerated" in session.warnings[0]
    assert session.fallbacks
    session.close()


def test_a_model_that_flattens_its_batch_is_computed_and_said() -> None:
    session = run("plain", rows=1)
    assert sum(figures.reused for figures in session.figures) == 0
    assert "one row per sample" in session.warnings[0]


@every_case
def test_structure_alone_accelerates_rightly_or_not_at_all(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model, as if nobody had declared its family."""
    model = model_of(case)
    full = sample(model, case, steps=6)
    expected = sample(accelerate(model, boundary=2), case, steps=6)
    monkeypatch.setattr(families, "declared", lambda: ())
    try:
        accelerated = accelerate(model, boundary=2)
    except families.UnsupportedModelError as error:
        assert "No block list found" in str(error) or "ambiguous" in str(error)
        return
    found = sample(accelerated, case, steps=6)
    run = last_run(accelerated)
    if run["reused_calls"]:
        assert len(case.lists) == 1
        assert case.skips == ()
        assert torch.equal(found, expected)
    else:
        assert torch.equal(found, full)
        assert any("cannot be accelerated" in warning for warning in run["warnings"])


@pytest.mark.parametrize("controlled", [False, True])
def test_hunyuan_dit_has_long_skips_and_is_never_accelerated(controlled: bool) -> None:
    """Its skips carry shallow features around the boundary; a control turns them into new tensors (hydit/models.py:371)."""
    blocks = nn.ModuleList(
        hydit.HunYuanDiTBlock(hidden_size=16, c_emb_size=16, num_heads=2, text_states_dim=8, skip=index > 4,
                              operations=comfy.ops.disable_weight_init)
        for index in range(8)
    )
    for parameter in blocks.parameters():
        nn.init.normal_(parameter, std=0.05)

    class Shell(nn.Module):  # HunYuanDiT.forward, v0.30.0, without its embeddings
        def __init__(self) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: Tensor) -> Tensor:
            c, text, skips = torch.ones(2, 16), torch.ones(2, 3, 8), []
            for layer, block in enumerate(self.blocks):
                skip = None
                if layer > 4:
                    skip = skips.pop() + 1 if controlled else skips.pop()
                x = block(x, c, text, None, skip)
                if layer < 3:
                    skips.append(x)
            return x

    model = Shell()
    sigmas = [1 - k / 12 for k in range(13)]
    session = Session(Config(preset="paper"), sigmas, [1 - s for s in sigmas])
    info = CallInfo((("cond", 0),), 2, torch.device("cpu"), frozenset(), None, lambda: float("inf"))
    for sigma in sigmas[:-1]:
        with session.evaluation(sigma), session.call(model, model, info.device, lambda: info), torch.no_grad():
            model(torch.randn(2, 4, 16))
    assert sum(figures.reused for figures in session.figures) == 0
    assert "long skip" in session.warnings[0]


def test_the_autoregressive_wan_model_is_refused_by_name() -> None:
    import comfy.supported_models as models
    from tiny.case import from_config

    if not hasattr(models, "WAN21_CausalAR_T2V"):
        pytest.skip("a release of the host without this model")
    size = {"dim": 48, "ffn_dim": 96, "num_heads": 2, "num_layers": 8, "freq_dim": 32, "text_dim": 32}
    model = from_config(models.WAN21_CausalAR_T2V, size)
    with pytest.raises(families.UnsupportedModelError, match=r"CausalWanModel cannot be accelerated: .* key/value cache"):
        families.find(model.diffusion_model)
