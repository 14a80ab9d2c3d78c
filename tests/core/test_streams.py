"""What is stored, how many bytes, and when it is refused or dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from blockdance_core import streams
from blockdance_core.forecast import FORECASTS
from blockdance_core.interception import Feature
from blockdance_core.streams import NOTHING_STORED, FeatureCache, Place, StreamKey

SHAPE = (1, 4, 8)
BYTES = 4 * 8 * 4


def cache(forecast: str = "hold", keep: int = 1) -> FeatureCache:
    return FeatureCache(FORECASTS[forecast].anchored, keep)


def named(name: str) -> StreamKey:
    return StreamKey(name, 1, 1, None)


def put(
    into: FeatureCache, value: Tensor | float, *, key: str = "a", step: int = 0, group: int | None = 0,
    sigma: float = 1.0, base: Tensor | float | None = None, boundary: int = 2, condition: str | None = None,
) -> str | None:
    feature = (torch.full(SHAPE, value) if isinstance(value, float) else value,)
    start: Feature | None = None
    if base is not None:
        start = (torch.full(SHAPE, base) if isinstance(base, float) else base,)
    stored = into.store(named(key), boundary, Place(step, group, condition, sigma), feature, start)
    return stored if isinstance(stored, str) else None


def get(
    of: FeatureCache, *keys: str, group: int | None = 0, sigma: float = 0.5, current: float | None = None,
    condition: str | None = None,
) -> Tensor | str:
    now = None if current is None else (torch.full((len(keys) or 1, *SHAPE[1:]), current),)
    at = Place(9, group, condition, sigma)
    found = of.predict([named(key) for key in keys or ("a",)], 2, at, FORECASTS["taylor"], now)
    if isinstance(found, str):
        return found
    assert found[0] is not None
    return found[0]


def value(found: Tensor | str) -> float:
    assert isinstance(found, Tensor), found
    assert (found == found.flatten()[0]).all()
    return float(found.flatten()[0])


def test_another_condition_has_no_forecast_and_takes_the_place_of_the_one_before() -> None:
    into = cache("taylor", keep=2)
    put(into, 3.0, base=1.0, condition="control")
    assert get(into, current=1.0) == NOTHING_STORED
    assert value(get(into, current=1.0, condition="control")) == 3
    put(into, 5.0, base=1.0, step=1, sigma=0.8, condition="none")
    assert get(into, current=1.0, condition="control") == NOTHING_STORED
    assert value(get(into, current=1.0, condition="none")) == 5, "no history of the other condition"
    assert into.stored_bytes == BYTES


def test_store_clones_so_that_later_writes_do_not_reach_it() -> None:
    output = torch.ones(SHAPE)
    into = cache()
    put(into, output)
    output.add_(5)
    assert value(get(into)) == 1
    first = get(into)
    assert isinstance(first, Tensor)
    first.add_(7)  # what was injected is written into by the host
    assert value(get(into)) == 1


def test_store_of_a_residual_with_a_zero_base_is_a_new_tensor() -> None:
    output, base = torch.ones(SHAPE), torch.zeros(SHAPE)
    into = cache("delta")
    put(into, output, base=base)
    output.add_(5)
    base.add_(5)
    assert value(get(into, current=10.0)) == 11


def test_storing_a_residual_makes_one_tensor() -> None:
    made: list[Tensor] = []

    class Made(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made.append(function(*args, **(kwargs or {})))
            return made[-1]

    for dtype in (torch.bfloat16, torch.float32):
        output, base = torch.randn(1, 5, 2).to(dtype), torch.randn(1, 5, 2).to(dtype)
        before = output.clone(), base.clone()
        made.clear()
        with Made():
            kept = cache("delta")._kept(output, base)
        assert kept is not None
        assert torch.equal(kept, (output.float() - base.float()).to(dtype))
        assert torch.equal(torch.stack((output, base)), torch.stack(before)), "the model's own tensors stay as they are"
        tensors = [one for one in made if isinstance(one, Tensor)]
        assert {(one.data_ptr(), one.dtype) for one in tensors} == {(kept.data_ptr(), dtype)}


def test_delta_and_taylor_by_hand() -> None:
    into = cache("taylor", keep=2)
    put(into, 5.0, step=0, group=None, sigma=0.8, base=1.0)  # residual 4
    put(into, 9.0, step=1, group=0, sigma=0.6, base=2.0)  # residual 7
    assert value(get(into, sigma=0.4, current=3.0)) == pytest.approx(3 + 7 + 3)
    assert value(get(into, sigma=0.5, current=3.0)) == pytest.approx(3 + 7 + 1.5)


def test_all_of_a_call_are_forecast_with_as_many_features_as_the_newest_has() -> None:
    into = cache("taylor", keep=2)
    for step, value_ in ((0, 1.0), (1, 2.0)):
        put(into, value_, key="old", step=step, sigma=1 - step / 4, base=0.0)
    put(into, 5.0, key="new", step=1, sigma=0.75, base=0.0)
    both = get(into, "old", "new", current=0.0)
    assert isinstance(both, Tensor)
    assert [float(row.mean()) for row in both] == [2, 5], "a line for one side of guidance alone would not cancel"
    assert value(get(into, "old", current=0.0)) == 3


def test_second_evaluation_of_a_step_replaces_the_first() -> None:
    into = cache("taylor", keep=2)
    put(into, 1.0, step=0, sigma=1.0, base=0.0)
    put(into, 2.0, step=1, sigma=0.8, base=0.0)
    put(into, 4.0, step=1, sigma=0.6, base=0.0)
    assert into.stored_bytes == 2 * BYTES
    assert value(get(into, sigma=0.6, current=0.0)) == 4
    assert value(get(into, sigma=1.0, current=0.0)) == pytest.approx(1)


def test_bytes_are_counted_and_only_keep_entries_stay() -> None:
    into = cache("taylor", keep=2)
    for step in range(5):
        put(into, float(step), step=step, sigma=1 - 0.1 * step, base=0.0)
        put(into, float(step), key="b", step=step, sigma=1 - 0.1 * step, base=0.0)
        assert into.stored_bytes == min(step + 1, 2) * 2 * BYTES
    assert into.peak_bytes == 4 * BYTES
    into.clear()
    assert into.stored_bytes == 0
    assert into.peak_bytes == 4 * BYTES


def test_slices_of_a_batch_keep_their_own_bytes_only() -> None:
    batch = torch.arange(64.0).reshape(2, 4, 8)
    into = cache()
    for key, row in (("a", 0), ("b", 1)):
        put(into, batch.narrow(0, row, 1), key=key)
    both = into.predict([named("b"), named("a")], 2, Place(9, 0, None, 0.5), FORECASTS["hold"], None)
    assert not isinstance(both, str)
    assert both[0] is not None
    assert torch.equal(both[0], batch.flip(0))
    held = next(iter(into._entries.values()))[0].feature[0]
    assert held is not None
    assert held.untyped_storage().nbytes() == BYTES


def test_components_that_are_none_stay_none() -> None:
    into = cache("delta")
    ones = torch.ones(SHAPE)
    into.store(named("a"), 2, Place(0, 0, None, 1.0), (None, ones), (ones, ones))
    found = into.predict([named("a")], 2, Place(9, 0, None, 0.5), FORECASTS["delta"], (ones, 3 * ones))
    assert not isinstance(found, str)
    assert found[0] is None
    assert found[1] is not None
    assert (found[1] == 3).all()
    assert into.stored_bytes == BYTES


@pytest.mark.parametrize("case", ["nothing", "other group", "other key", "other boundary", "one of two", "no input"])
def test_predict_missing_feature_is_a_reason(case: str) -> None:
    into = cache("delta" if case == "no input" else "hold")
    if case != "nothing":
        put(into, 1.0, key="b" if case == "other key" else "a", group=1 if case == "other group" else 0,
            boundary=3 if case == "other boundary" else 2, base=0.0 if case == "no input" else None)
    assert isinstance(get(into, *(("a", "c") if case == "one of two" else ("a",))), str)


def test_limit_refuses_before_storing() -> None:
    into = cache()
    into.limit = 1.5 * BYTES
    assert put(into, 1.0) is None
    reason = put(into, 2.0, key="b")
    assert reason is not None
    assert "limit" in reason
    assert into.stored_bytes == into.peak_bytes == BYTES
    assert value(get(into)) == 1
    assert put(into, 3.0, step=1) is None, "replacing needs no more room"
    assert value(get(into)) == 3


def test_out_of_memory_in_our_clone_stores_nothing_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    into = cache()
    put(into, 1.0, step=0)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureCache, "_kept", fail)
        reason = put(into, 2.0, step=1)
    assert reason is not None
    assert "memory" in reason
    assert into.stored_bytes == 0, "with one entry kept, the old one made room"
    assert isinstance(get(into), str)
    put(into, 3.0, step=2)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureCache, "_combined", fail)
        assert isinstance(get(into), str)
    assert value(get(into)) == 3


def test_other_errors_in_our_clone_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(FeatureCache, "_kept", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        put(cache(), 1.0)


def test_drop_unseen_drops_streams_that_stored_nothing_since() -> None:
    into = cache()
    put(into, 1.0, key="a", step=3)
    put(into, 1.0, key="b", step=5)
    into.drop_unseen(3)
    assert into.stored_bytes == 2 * BYTES
    into.drop_unseen(4)
    assert into.stored_bytes == BYTES
    assert isinstance(get(into, "a"), str)
    assert value(get(into, "b")) == 1


def test_move_keeps_values_drops_history_and_stores_there_from_now_on() -> None:
    into = cache("taylor", keep=2)
    put(into, 1.0, step=0, sigma=1.0, base=0.0)
    put(into, 2.0, step=1, sigma=0.8, base=0.0)
    into.move(torch.device("cpu"), 1)
    assert into.stored_bytes == BYTES
    assert value(get(into, sigma=0.4, current=0.0)) == 2, "order 0 without history"
    put(into, 3.0, step=2, sigma=0.6, base=0.0)
    assert into.stored_bytes == BYTES


def test_output_that_does_not_fit_the_input_is_held() -> None:
    into = cache("taylor", keep=2)
    for step, output in ((0, 4.0), (1, 6.0)):
        put(into, output, step=step, sigma=1 - 0.2 * step, base=torch.zeros(1, 2, 8))
    assert value(get(into, sigma=0.6, current=0.0)) == 6, "the newest output itself, never extrapolated"


def test_output_of_another_precision_than_the_input_keeps_its_own() -> None:
    into = cache("delta")
    put(into, torch.ones(SHAPE, dtype=torch.bfloat16), base=torch.zeros(SHAPE))
    found = get(into, current=5.0)
    assert isinstance(found, Tensor)
    assert found.dtype == torch.bfloat16
    assert into.stored_bytes == BYTES // 2


def test_module_keeps_no_state() -> None:
    assert not [name for name, item in vars(streams).items() if isinstance(item, (dict, list, set)) and name[0] != "_"]


def test_forecast_in_half_precision_saturates_where_float16_ends() -> None:
    into = cache("taylor", 2)
    shape = (1, 2, 3)
    for step, (sigma, output) in enumerate(((0.8, 60000.0), (0.6, 64000.0))):
        feature = (torch.full(shape, output, dtype=torch.float16),)
        base = (torch.full(shape, -60000.0, dtype=torch.float16),)
        assert not isinstance(into.store(named("a"), 2, Place(step, 0, None, sigma), feature, base), str)
    now = (torch.full(shape, 65000.0, dtype=torch.float16),)
    found = into.predict([named("a")], 2, Place(9, 0, None, 0.2), FORECASTS["taylor"], now)
    assert not isinstance(found, str)
    assert found[0] is not None
    assert found[0].dtype == torch.float16
    assert torch.isfinite(found[0]).all()
