"""Policy files: safetensors with metadata. They are data: nothing in them is ever executed, and everything is checked.

Metadata, all strings: `schema_version`, `kind`, `family`, `depth`, `name` (optional) and `record` (JSON object) in every kind.

Kind `schedule` adds JSON lists with one value for each entry: `sampler`, `scheduler`, `steps`. The tensors of entry i:
`{i}.boundary` int16 [plans, steps] (-1: computed), `{i}.order` and `{i}.anchored` uint8 and `{i}.damping` float32 of the same
shape, `{i}.levels` float32 [steps + 1], `{i}.cut` and `{i}.loss` float32 [plans]; where weights were fitted, also `{i}.age`
int16 and `{i}.weight` float32 [plans, steps, 3] (age 0: none), and where those of guidance were, `{i}.guided` float32 of the
same shape (not a number: none). A boundary of `depth` is the whole model.

Kind `network` has all that, and in its metadata `trained` (the entry that the network was trained for), `segments` (JSON list
of their first steps), `level_cuts` (JSON list) and `network` (JSON object, the fields of `NetworkShape`). The options of
segment j are `segment.{j}.boundary` and so on, [options, steps of the segment]. The weights are `network.{name}`, float32 or
float16.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from blockdance_core.config import ConfigError
from blockdance_core.forecast import MOST_FEATURES, Forecast
from blockdance_core.policy.adaptive import AdaptivePolicy, Segment
from blockdance_core.policy.calibrated import Calibrated, SchedulePolicy
from blockdance_core.policy.network import DecisionNetwork, NetworkShape
from blockdance_core.schedule import Plan, Reuse

SCHEMA_VERSION = 1
_MAX_BYTES = 256 * 2**20
_MAX_HEADER = 16 * 2**20
_MAX_ENTRIES = 1_000
_MAX_ROWS = 1_000_000
_MOST_EXACT = 16 * 2**20
"""Larger networks are kept in half precision."""
_DIGITS = 6
"""Shares are exact to this many decimals in float32."""


class PolicyError(ConfigError):
    """A policy file cannot be used; the message names the file and the reason."""


class _Content(NamedTuple):
    """What a file of any kind holds: its name without folder and ending, its metadata and its tensors."""

    stem: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]

    def text(self, key: str) -> str:
        if key not in self.metadata:
            raise ConfigError(f"its metadata has no {key}")
        return self.metadata[key]

    def whole(self, key: str) -> int:
        text = self.text(key)
        if not (text.isascii() and text.isdigit() and len(text) < 6):
            raise ConfigError(f"{key} is {text[:40]!r}, expected a whole number")
        return int(text)

    def json(self, key: str, kind: type) -> Any:
        value = json.loads(self.text(key))
        if not isinstance(value, kind):
            raise ConfigError(f"{key} is not a JSON {kind.__name__}")
        return value

    def tensor(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> list[Any]:
        values: list[Any] = self.checked(key, shape, dtype).tolist()
        return values

    def checked(self, key: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        found = self.tensors.get(key)
        if found is None:
            raise ConfigError(f"it has no tensor {key}")
        if found.dtype not in dtypes or tuple(found.shape) != shape:
            expected = " or ".join(str(dtype) for dtype in dtypes)
            raise ConfigError(f"{key} is {found.dtype} {list(found.shape)}, expected {expected} {list(shape)}")
        return found

    def fitted(self, prefix: str, shape: tuple[int, int]) -> list[list[tuple[tuple[int, float], ...]]]:
        """Weights of every row with the ages of their features; none where the file has none."""
        if f"{prefix}.age" not in self.tensors:
            return [[()] * shape[1]] * shape[0]
        ages = self.tensor(f"{prefix}.age", torch.int16, (*shape, MOST_FEATURES))
        weights = self.tensor(f"{prefix}.weight", torch.float32, (*shape, MOST_FEATURES))
        return [
            [tuple(pair for pair in zip(*row, strict=True) if pair[0]) for row in zip(*plan, strict=True)]
            for plan in zip(ages, weights, strict=True)
        ]

    def guided(self, prefix: str, shape: tuple[int, int]) -> list[list[tuple[float, ...]]]:
        """Weights of the guidance of every row; none where the file has none."""
        if f"{prefix}.guided" not in self.tensors:
            return [[()] * shape[1]] * shape[0]
        weights = self.tensor(f"{prefix}.guided", torch.float32, (*shape, MOST_FEATURES))
        return [[tuple(weight for weight in row if not math.isnan(weight)) for row in plan] for plan in weights]

    def plans(self, prefix: str, steps: int) -> tuple[Plan, ...]:
        """The rows of `{prefix}.boundary` and so on."""
        boundary = self.tensors.get(f"{prefix}.boundary")
        shape = (boundary.shape[0] if boundary is not None and boundary.ndim == 2 else 0, steps)
        if shape[0] > _MAX_ROWS:
            raise ConfigError(f"{prefix} has more than {_MAX_ROWS} plans")
        columns = (
            self.tensor(f"{prefix}.boundary", torch.int16, shape), self.tensor(f"{prefix}.anchored", torch.uint8, shape),
            self.tensor(f"{prefix}.order", torch.uint8, shape), self.tensor(f"{prefix}.damping", torch.float32, shape),
            self.fitted(prefix, shape), self.guided(prefix, shape),
        )
        return tuple(tuple(_row(*row) for row in zip(*plan, strict=True)) for plan in zip(*columns, strict=True))


def save(policy: SchedulePolicy | AdaptivePolicy, path: str | os.PathLike[str]) -> None:
    """Write a policy file, whole or not at all.

    Args:
        policy: What to write.
        path: The file; its folder is made if it does not exist.
    """
    path = Path(path)
    base = policy if isinstance(policy, SchedulePolicy) else policy.base
    metadata = {
        "schema_version": str(SCHEMA_VERSION), "kind": "schedule", "name": policy.name, "family": base.family,
        "depth": str(base.depth), "record": json.dumps(dict(policy.record), allow_nan=False),
        **{key: json.dumps([getattr(entry, key) for entry in base.entries]) for key in ("sampler", "scheduler", "steps")},
    }
    tensors = {f"{i}.{key}": value for i, entry in enumerate(base.entries) for key, value in _tensors(entry).items()}
    if isinstance(policy, AdaptivePolicy):
        metadata |= {
            "kind": "network", "trained": str(policy.trained), "level_cuts": json.dumps(policy.cuts),
            "segments": json.dumps([segment.start for segment in policy.segments]),
            "network": json.dumps(dataclasses.asdict(policy.network.shape)),
        }
        for j, segment in enumerate(policy.segments):
            tensors |= {f"segment.{j}.{key}": value for key, value in _rows(segment.options).items()}
        for name, value in policy.network.state_dict().items():
            tensors[f"network.{name}"] = value.detach().cpu().to(_dtype(policy.network.shape)).contiguous()
    data = safetensors.torch.save(tensors, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".policy-") as folder:  # on the disk that the file goes to
        written = Path(folder) / path.name
        written.write_bytes(data)
        os.replace(written, path)


def require_room(shape: NetworkShape) -> None:
    """Raise a `ConfigError` if a network of this shape is too large for a policy file."""
    size = shape.parameters * _dtype(shape).itemsize
    if size > _MAX_BYTES:
        raise ConfigError(f"The network would take {size / 2**20:.0f} MiB, a policy file has at most {_MAX_BYTES // 2**20}: "
                          "choose a smaller width or depth.")


def _dtype(shape: NetworkShape) -> torch.dtype:
    """What the weights of a network are saved in."""
    return torch.float32 if shape.parameters <= _MOST_EXACT else torch.float16


def load(path: str | os.PathLike[str]) -> SchedulePolicy | AdaptivePolicy:
    """Read a policy file.

    Raises:
        PolicyError: It is missing, damaged, of another kind or version, or a value in it is out of its range.
    """
    path = Path(path)
    try:
        content = _read(path)
        version, kind = content.whole("schema_version"), content.text("kind")
        if version != SCHEMA_VERSION:
            raise ConfigError(f"it has schema version {version}, this pack reads {SCHEMA_VERSION}: update the pack")
        if kind not in _KINDS:
            raise ConfigError(f"it is of kind {kind[:40]!r}, this pack reads {', '.join(_KINDS)}: update the pack")
        return _KINDS[kind](content)
    except OSError as error:
        reason = error.strerror or str(error)
    except ConfigError as error:
        reason = str(error)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        reason = f"it is damaged, or no safetensors file ({type(error).__name__}: {str(error)[:200]})"
    raise PolicyError(f"Cannot use the policy file {path}: {reason.removesuffix('.')}.")


def _read(path: Path) -> _Content:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_BYTES:
            raise ConfigError(f"it has {size / 2**20:.0f} MiB, no policy file has more than {_MAX_BYTES // 2**20}")
        data = file.read(_MAX_BYTES)
    header = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 0 < header <= min(_MAX_HEADER, len(data) - 8):
        raise ConfigError("it is cut short, or no safetensors file")
    tensors = safetensors.torch.load(data)
    metadata = json.loads(data[8 : 8 + header]).get("__metadata__", {})
    return _Content(path.stem, metadata, tensors)


def _rows(plans: Sequence[Plan]) -> dict[str, Tensor]:
    def column(dtype: torch.dtype, computed: Any, field: Any) -> Tensor:
        return torch.tensor([[computed if row is None else field(row) for row in plan] for plan in plans], dtype=dtype)

    def padded(row: Reuse) -> list[tuple[int, float]]:
        return [*row.forecast.fitted, *[(0, 0.0)] * (MOST_FEATURES - len(row.forecast.fitted))]

    none, unguided = [0] * MOST_FEATURES, [math.nan] * MOST_FEATURES
    guided = {"guided": column(
        torch.float32, unguided, lambda row: [*row.forecast.guided, *unguided][:MOST_FEATURES]
    )} if any(row and row.forecast.guided for plan in plans for row in plan) else {}
    return guided | {
        "boundary": column(torch.int16, -1, lambda row: row.boundary),
        "order": column(torch.uint8, 0, lambda row: row.forecast.order),
        "damping": column(torch.float32, 1.0, lambda row: row.forecast.damping),
        "anchored": column(torch.uint8, 0, lambda row: row.forecast.anchored),
        "age": column(torch.int16, none, lambda row: [age for age, _ in padded(row)]),
        "weight": column(torch.float32, none, lambda row: [weight for _, weight in padded(row)]),
    }


def _tensors(entry: Calibrated) -> dict[str, Tensor]:
    return _rows(entry.plans) | {
        "levels": torch.tensor(entry.levels, dtype=torch.float32),
        "cut": torch.tensor(entry.cuts, dtype=torch.float32),
        "loss": torch.tensor(entry.losses, dtype=torch.float32),
    }


def _schedule_policy(content: _Content) -> SchedulePolicy:
    samplers, schedulers, steps = (content.json(key, list) for key in ("sampler", "scheduler", "steps"))
    if not 0 < len(samplers) <= _MAX_ENTRIES or not len(samplers) == len(schedulers) == len(steps):
        raise ConfigError(f"it lists {len(samplers)} samplers, {len(schedulers)} schedulers and {len(steps)} numbers of steps: "
                          f"expected as many of each, 1 to {_MAX_ENTRIES}")
    if not all(isinstance(name, str) and name for name in (*samplers, *schedulers)):
        raise ConfigError("a sampler or scheduler has no name")
    if not all(type(count) is int and 0 < count <= _MAX_ROWS for count in steps):
        raise ConfigError("steps are not whole numbers of 1 or more")
    if sum(tensor.numel() for key, tensor in content.tensors.items() if key.endswith(".boundary")) > _MAX_ROWS:
        raise ConfigError(f"its plans have more than {_MAX_ROWS} rows in all")
    return SchedulePolicy(
        name=content.metadata.get("name") or content.stem, family=content.text("family"), depth=content.whole("depth"),
        entries=tuple(_entry(content, i, *named) for i, named in enumerate(zip(samplers, schedulers, steps, strict=True))),
        record=content.json("record", dict),
    )


def _entry(content: _Content, i: int, sampler: str, scheduler: str, steps: int) -> Calibrated:
    plans = content.plans(str(i), steps)
    return Calibrated(
        sampler, scheduler, _shares(content.tensor(f"{i}.levels", torch.float32, (steps + 1,))), plans,
        _shares(content.tensor(f"{i}.cut", torch.float32, (len(plans),))),
        tuple(content.tensor(f"{i}.loss", torch.float32, (len(plans),))),
    )


def _adaptive_policy(content: _Content) -> AdaptivePolicy:
    base = _schedule_policy(content)
    trained, starts, cuts = content.whole("trained"), content.json("segments", list), content.json("level_cuts", list)
    if trained >= len(base.entries):
        raise ConfigError(f"trained is {trained}, it has {len(base.entries)} entries")
    steps = base.entries[trained].steps
    if not starts or not all(type(start) is int and 0 <= start < steps for start in starts):
        raise ConfigError(f"segments are not steps of {steps}")
    if any(one >= other for one, other in itertools.pairwise(starts)):
        raise ConfigError("segments must ascend, and have a step each")
    if not all(type(cut) in (int, float) for cut in cuts):
        raise ConfigError("level_cuts are not numbers")
    shape = NetworkShape(**content.json("network", dict))
    with torch.device("meta"):  # a shape that the weights do not have takes no memory
        network = DecisionNetwork(shape)
    weights = {
        name: content.checked(f"network.{name}", tuple(value.shape), torch.float32, torch.float16).float()
        for name, value in network.state_dict().items()
    }
    if not all(value.isfinite().all() for value in weights.values()):
        raise ConfigError("a weight of its network is not finite")
    if not (weights["spread"] > 0).all():
        raise ConfigError("network.spread must be above 0")
    network.load_state_dict(weights, assign=True)
    segments = tuple(
        Segment(start, content.plans(f"segment.{j}", stop - start))
        for j, (start, stop) in enumerate(zip(starts, [*starts[1:], steps], strict=True))
    )
    return AdaptivePolicy(
        dataclasses.replace(base, record={}), trained, segments, tuple(cuts), network.eval().requires_grad_(False), base.name,
        base.record)


def _row(
    boundary: int, anchored: int, order: int, damping: float, fitted: tuple[tuple[int, float], ...], guided: tuple[float, ...]
) -> Reuse | None:
    if boundary == -1:
        return None
    if anchored not in (0, 1):
        raise ConfigError(f"anchored is {anchored}, expected 0 or 1")
    return Reuse(boundary, Forecast(bool(anchored), order, round(damping, _DIGITS), fitted, guided))


def _shares(values: list[float]) -> tuple[float, ...]:
    return tuple(round(value, _DIGITS) for value in values)


_KINDS: dict[str, Callable[[_Content], SchedulePolicy | AdaptivePolicy]] = {
    "schedule": _schedule_policy, "network": _adaptive_policy}
"""What a file of each kind becomes."""
