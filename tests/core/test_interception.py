"""Interception on toy blocks whose outputs can be checked by hand: block i adds 10**i."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockdance_core.interception import (
    Block,
    Feature,
    InterceptionError,
    Passage,
    Port,
    cloned,
    intercept,
    nbytes,
    signature,
    taps,
)

X = Port("x", 0)


class Add(nn.Module):
    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount, self.ran = amount, 0

    def forward(self, x: Tensor) -> Tensor:
        self.ran += 1
        return x + self.amount


class Toy(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Add(10.0**i) for i in range(depth))
        self.entries = [Block(block, (X,)) for block in self.blocks]

    def forward(self, x: Tensor, control: bool = False) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if control:
                x += 0.5  # as the host adds control residuals
        return x

    @property
    def ran(self) -> list[int]:
        return [block.ran for block in self.blocks]


class Inject:
    """Injects a constant, or nothing; notes what it is told."""

    def __init__(self, amount: float | None = None, at: int = 0) -> None:
        self.amount, self.at = amount, at
        self.inputs: list[float] = []
        self.outputs: list[tuple[int, float]] = []

    def at_input(self, feature: Feature | None, obstacle: str | None) -> dict[int, Feature] | None:
        assert feature is not None
        assert feature[0] is not None
        self.inputs.append(float(feature[0].flatten()[0]))
        return None if self.amount is None else {self.at: (torch.full_like(feature[0], self.amount),)}

    def at_output(self, index: int, passage: Passage) -> None:
        assert passage.returned is not None
        assert passage.returned[0] is not None
        self.outputs.append((index, float(passage.returned[0].flatten()[0])))


def x(value: float = 0.0) -> Tensor:
    return torch.full((1, 2, 3), float(value))


def untouched(model: Toy) -> bool:
    return not any("forward" in block.__dict__ for block in model.blocks)


@pytest.mark.parametrize("boundary", [0, 1, 2, 3])
def test_injection_replaces_blocks_up_to_and_including_the_boundary(boundary: int) -> None:
    model = Toy()
    with intercept(model.entries, Inject(5.0, boundary), boundary=boundary):
        result = model(x())
    assert float(result[0, 0, 0]) == 5 + sum(10.0**i for i in range(boundary + 1, 4))
    assert model.ran == [0] * (boundary + 1) + [1] * (3 - boundary)
    assert untouched(model)


def test_no_injection_runs_everything_bit_identical() -> None:
    model = Toy()
    visit = Inject(None)
    with intercept(model.entries, visit, observe=(0, 2), boundary=2):
        result = model(x(3))
    assert torch.equal(result, Toy()(x(3)))
    assert visit.inputs == [3.0]
    assert visit.outputs == [(0, 4.0), (2, 114.0)]
    assert model.ran == [1] * 4


def test_observation_alone_hooks_only_what_is_observed() -> None:
    model = Toy()
    with intercept(model.entries, Inject(), observe=(2,)):
        assert ["forward" in block.__dict__ for block in model.blocks] == [True, False, True, False]
        model(x())
    assert untouched(model)


def test_a_skipped_first_block_never_hands_back_the_callers_tensor() -> None:
    model = Toy()
    start = x(1)
    with intercept(model.entries, Inject(5.0, 2), boundary=2):
        result = model(start, control=True)
    assert (start == 1).all(), "the host wrote its residual into the caller's tensor"
    assert float(result[0, 0, 0]) == 5 + 0.5 + 1000 + 0.5


def test_injected_feature_at_block_0_takes_the_residuals_of_the_host() -> None:
    model = Toy()
    with intercept(model.entries, Inject(5.0, 0), boundary=0):
        assert float(model(x(1), control=True)[0, 0, 0]) == 5 + 1110 + 4 * 0.5


def exploding(where: int) -> Toy:
    model = Toy()

    def explode(_: Tensor) -> Tensor:
        raise ZeroDivisionError

    model.blocks[where].forward = explode
    return model


@pytest.mark.parametrize(("where", "boundary"), [(0, None), (3, 1), (1, None)])
def test_an_exception_passes_and_everything_is_put_back(where: int, boundary: int | None) -> None:
    model = exploding(where)
    before = [dict(block.__dict__) for block in model.blocks]
    visit = Inject(5.0 if boundary is not None else None, boundary or 0)
    with pytest.raises(ZeroDivisionError), intercept(model.entries, visit, observe=(0, 1, 2, 3), boundary=boundary):
        model(x())
    assert [{**block.__dict__, "ran": 0} for block in model.blocks] == [{**old, "ran": 0} for old in before]
    assert model.blocks[where].__dict__["forward"] is before[where]["forward"]


def test_another_packs_instance_forward_runs_inside_ours_and_is_put_back() -> None:
    model = Toy()
    calls = []

    def theirs(value: Tensor) -> Tensor:
        calls.append(1)
        return value + 7

    model.blocks[0].forward = theirs
    visit = Inject()
    with intercept(model.entries, visit, observe=(0,)):
        model(x())
    assert calls == [1]
    assert visit.outputs == [(0, 7.0)]
    assert model.blocks[0].__dict__["forward"] is theirs
    with intercept(model.entries, Inject(5.0, 0), boundary=0):
        model(x())
    assert calls == [1], "skipped"
    assert model.blocks[0].__dict__["forward"] is theirs


def test_an_instance_forward_put_there_during_the_call_does_not_break_the_way_back() -> None:
    model = Toy()
    with intercept(model.entries, Inject(), observe=(1,)):
        model.blocks[1].__dict__.pop("forward")
        model(x())
    assert untouched(model)


def test_nested_calls_of_two_visitors_both_see_the_call() -> None:
    model = Toy()
    outer, inner = Inject(), Inject()
    with intercept(model.entries, outer, observe=(3,)), intercept(model.entries, inner, observe=(1,)):
        model(x())
    assert outer.inputs == inner.inputs == [0.0]
    assert outer.outputs == [(3, 1111.0)]
    assert inner.outputs == [(1, 11.0)]
    assert untouched(model)


def test_inner_injection_inside_an_outer_observation() -> None:
    model = Toy()
    outer = Inject()
    with intercept(model.entries, outer, observe=(1, 3)), intercept(model.entries, Inject(5.0, 1), boundary=1):
        assert float(model(x())[0, 0, 0]) == 1105
    assert model.ran == [0, 0, 1, 1]
    assert untouched(model)


class Skipping(Toy):
    """Another node replaces the boundary block: it never runs."""

    def forward(self, x: Tensor, control: bool = False) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x) if index != 2 else x
        return x


def test_an_injection_that_does_not_fire_is_an_error() -> None:
    model = Skipping()
    with pytest.raises(InterceptionError, match="block 2 was injected 0 times in one pass"):  # noqa: SIM117
        with intercept(model.entries, Inject(5.0, 2), boundary=2):
            model(x())
    assert untouched(model)


def test_an_injection_that_fires_twice_is_an_error() -> None:
    model = Toy()
    with pytest.raises(InterceptionError, match="injected 2 times"):  # noqa: SIM117
        with intercept(model.entries, Inject(5.0, 1), boundary=1):
            model.blocks[1](model(x()))
    assert untouched(model)


def test_a_call_that_never_reaches_the_blocks_is_no_error() -> None:
    model = Toy()
    visit = Inject(5.0, 2)
    with intercept(model.entries, visit, boundary=2):
        pass
    assert visit.inputs == []


class Pair(nn.Module):
    """Takes and returns (image, text), by keyword, and writes into its input as Flux does."""

    def forward(self, img: Tensor, txt: Tensor | None, vec: Tensor) -> tuple[Tensor, Tensor | None]:
        img += vec
        return img, txt


PORTS = (Port("img", 0), Port("txt", 1))


def run_pair(call: Callable[..., Any], txt: Tensor | None) -> Any:
    return call(img=x(1), txt=txt, vec=x(2))


@pytest.mark.parametrize("txt", [None, torch.zeros(1, 1, 3)])
def test_ports_by_keyword_and_none_components(txt: Tensor | None) -> None:
    blocks = nn.ModuleList([Pair(), Pair()])
    entries = [Block(block, PORTS) for block in blocks]

    class Fixed(Inject):
        def at_input(self, feature: Feature | None, obstacle: str | None) -> dict[int, Feature] | None:
            assert feature is not None
            assert (feature[1] is None) is (txt is None)
            return {1: (x(9), txt)}

    with intercept(entries, Fixed(), boundary=1):
        first = run_pair(blocks[0], txt)
        second = run_pair(blocks[1], txt)
    assert float(first[0][0, 0, 0]) == 1
    assert float(second[0][0, 0, 0]) == 9
    assert second[1] is txt


def test_a_call_of_another_form_is_told_as_none_and_refused_between() -> None:
    block = Block(Pair(), PORTS)
    assert block.received((x(),), {}) is None
    assert block.received((), {"img": x(), "txt": "text"}) is None
    assert block.returned(x()) is None
    assert block.returned((x(),)) is None
    assert block.returned([x(), x()]) is None
    assert block.returned((x(), None)) is not None
    model = Toy()

    class Odd(Toy):
        def forward(self, x: Tensor, control: bool = False) -> Tensor:
            return self.blocks[1](self.blocks[0](x), unknown=1)

    model = Odd()
    model.entries[1] = Block(model.blocks[1], (Port("y", 3),))
    with pytest.raises(InterceptionError, match="block 1 was called with other arguments"):  # noqa: SIM117
        with intercept(model.entries, Inject(5.0, 2), boundary=2):
            model(x())
    assert untouched(model)


def test_a_second_pass_through_the_model_in_one_call_is_asked_for_and_checked_anew() -> None:
    model = Toy()
    visit = Inject(5.0, 1)
    with intercept(model.entries, visit, boundary=1):
        assert float((model(x(1)) + model(x(2)))[0, 0, 0]) == 2 * 1105
    assert visit.inputs == [1.0, 2.0]
    assert model.ran == [0, 0, 2, 2]


class UShaped(Toy):
    """The last two of five blocks also take what the second and the first returned."""

    def __init__(self) -> None:
        super().__init__(5)
        for early, late in ((0, 4), (1, 3)):
            self.entries[early] = Block(self.blocks[early], (X,), feeds=late)

    def forward(self, x: Tensor, control: bool = False) -> Tensor:
        kept = []
        for index, block in enumerate(self.blocks):
            x = block(x + kept.pop() if index > 2 else x)
            kept += [x] if index < 2 else []
        return x


@pytest.mark.parametrize(("boundary", "needed"), [(0, (0,)), (1, (0, 1)), (2, (0, 1, 2)), (3, (0, 3)), (4, (4,))])
def test_what_feeds_a_live_block_over_a_long_skip_is_injected_too(boundary: int, needed: tuple[int, ...]) -> None:
    model = UShaped()
    assert taps(model.entries, boundary) == needed
    full = Inject()
    with intercept(model.entries, full, observe=range(5)):
        expected = model(x())

    class Each(Inject):
        def at_input(self, feature: Feature | None, obstacle: str | None) -> dict[int, Feature]:
            return {index: (x(full.outputs[index][1]),) for index in needed}

    with intercept(model.entries, Each(), boundary=boundary):
        assert torch.equal(model(x()), expected)
    assert model.ran == [1] * (boundary + 1) + [2] * (4 - boundary)


class Sideways(nn.Module):
    """Samples in dimension 1, two components in one tuple, and a shape that is handed on."""

    def forward(self, both: tuple[Tensor, Tensor], *, shape: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return both[0] + 1, both[1] + 2, shape, None


def test_samples_in_another_dimension_tuples_and_what_is_passed_on() -> None:
    blocks = nn.ModuleList([Sideways(), Sideways()])
    ports = (Port("both", 0, 0), Port("both", 0, 1))
    entries = [Block(block, ports, batch_dim=1, passed_on=(Port("shape", 9), None)) for block in blocks]
    one, two, shape = torch.zeros(4, 2, 3), torch.zeros(5, 2, 3), torch.tensor([4, 5])

    class Fixed(Inject):
        def at_input(self, feature: Feature | None, obstacle: str | None) -> dict[int, Feature]:
            assert feature is not None
            assert [part.shape for part in feature if part is not None] == [(2, 4, 3), (2, 5, 3)]
            return {1: (torch.full((2, 4, 3), 7.0), torch.full((2, 5, 3), 8.0))}

    with intercept(entries, Fixed(), boundary=1):
        passed = blocks[0]((one, two), shape=shape)
        result = blocks[1](passed[:2], shape=passed[2])
    assert (passed[0].shape, passed[1].shape) == (one.shape, two.shape)
    assert result[0].shape == one.shape
    assert result[0].is_contiguous()
    assert (result[0] == 7).all()
    assert (result[1] == 8).all()
    assert result[2] is shape
    assert result[3] is None
    assert entries[0].received(((one,),), {}) is None
    assert entries[0].received((torch.zeros(3),), {}) is None
    assert entries[0].returned((one, two)) is None


def test_samples_that_cannot_be_told_apart_count_as_one() -> None:
    block = Block(Add(1), (X,), batch_dim=None)
    feature = block.received((torch.zeros(6, 3),), {})
    assert feature is not None
    assert feature[0] is not None
    assert feature[0].shape == (1, 6, 3)
    returned = block.to_return(feature)
    assert isinstance(returned, Tensor)
    assert returned.shape == (6, 3)


def test_an_obstacle_in_the_arguments_is_told_to_the_visitor() -> None:
    told: list[str | None] = []

    class Listening(Inject):
        def at_input(self, feature: Feature | None, obstacle: str | None) -> None:
            told.append(obstacle)

    block = Block(Pair(), PORTS, obstacle=lambda arguments: "no" if arguments["txt"] is None else None)
    with intercept([block], Listening()):
        run_pair(block.module, None)
        run_pair(block.module, torch.zeros(1, 1, 3))
    assert told == ["no", None]


def test_feature_helpers() -> None:
    feature: Feature = (torch.ones(2, 3, 4), None, torch.ones(2, 5, dtype=torch.float16))
    copy = cloned(feature)
    assert copy[1] is None
    assert copy[0] is not feature[0]
    assert nbytes(feature) == 24 * 4 + 10 * 2
    assert signature(feature) == (((3, 4), torch.float32, torch.device("cpu")), None,
                                  ((5,), torch.float16, torch.device("cpu")))
