"""Policy files: safetensors with metadata. They are data: nothing in them is ever executed, and everything is checked.

Metadata, all strings: `schema_version`, `kind`, `family`, `depth`, `name` (optional) and `record` (JSON object) in every kind.

Kind `schedule` adds JSON lists with one value for each entry: `sampler`, `scheduler`, `steps`. The tensors of entry i:
`{i}.boundary` int16 [plans, steps] (-1: computed), `{i}.order` and `{i}.anchored` uint8 and `{i}.damping` float32 of the same
shape, `{i}.levels` float32 [steps + 1], `{i}.cut` and `{i}.loss` float32 [plans].
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from blockdance_core.config import ConfigError
from blockdance_core.forecast import Forecast
from blockdance_core.policy.calibrated import Calibrated, SchedulePolicy
from blockdance_core.schedule import Reuse

SCHEMA_VERSION = 1
_MAX_BYTES = 256 * 2**20
_MAX_HEADER = 16 * 2**20
_MAX_ENTRIES = 1_000
_MAX_ROWS = 1_000_000
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
        found = self.tensors.get(key)
        if found is None:
            raise ConfigError(f"it has no tensor {key}")
        if (found.dtype, tuple(found.shape)) != (dtype, shape):
            raise ConfigError(f"{key} is {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}")
        values: list[Any] = found.tolist()
        return values


def save(policy: SchedulePolicy, path: str | os.PathLike[str]) -> None:
    """Write a policy file, whole or not at all.

    Args:
        policy: What to write.
        path: The file; its folder is made if it does not exist.
    """
    path = Path(path)
    metadata = {
        "schema_version": str(SCHEMA_VERSION), "kind": "schedule", "name": policy.name, "family": policy.family,
        "depth": str(policy.depth), "record": json.dumps(dict(policy.record), allow_nan=False),
        **{key: json.dumps([getattr(entry, key) for entry in policy.entries]) for key in ("sampler", "scheduler", "steps")},
    }
    tensors = {f"{i}.{key}": value for i, entry in enumerate(policy.entries) for key, value in _tensors(entry).items()}
    data = safetensors.torch.save(tensors, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".policy-") as folder:  # on the disk that the file goes to
        written = Path(folder) / path.name
        written.write_bytes(data)
        os.replace(written, path)


def load(path: str | os.PathLike[str]) -> SchedulePolicy:
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
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
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


def _tensors(entry: Calibrated) -> dict[str, Tensor]:
    def rows(dtype: torch.dtype, computed: float, field: Any) -> Tensor:
        return torch.tensor([[computed if row is None else field(row) for row in plan] for plan in entry.plans], dtype=dtype)

    return {
        "boundary": rows(torch.int16, -1, lambda row: row.boundary),
        "order": rows(torch.uint8, 0, lambda row: row.forecast.order),
        "damping": rows(torch.float32, 1.0, lambda row: row.forecast.damping),
        "anchored": rows(torch.uint8, 0, lambda row: row.forecast.anchored),
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
    boundary = content.tensors.get(f"{i}.boundary")
    plans = boundary.shape[0] if boundary is not None and boundary.ndim == 2 else 0
    shape = (plans, steps)
    columns = (
        content.tensor(f"{i}.boundary", torch.int16, shape), content.tensor(f"{i}.anchored", torch.uint8, shape),
        content.tensor(f"{i}.order", torch.uint8, shape), content.tensor(f"{i}.damping", torch.float32, shape),
    )
    return Calibrated(
        sampler, scheduler, _shares(content.tensor(f"{i}.levels", torch.float32, (steps + 1,))),
        tuple(tuple(_row(*row) for row in zip(*plan, strict=True)) for plan in zip(*columns, strict=True)),
        _shares(content.tensor(f"{i}.cut", torch.float32, (plans,))),
        tuple(content.tensor(f"{i}.loss", torch.float32, (plans,))),
    )


def _row(boundary: int, anchored: int, order: int, damping: float) -> Reuse | None:
    if boundary == -1:
        return None
    if anchored not in (0, 1):
        raise ConfigError(f"anchored is {anchored}, expected 0 or 1")
    return Reuse(boundary, Forecast(bool(anchored), order, round(damping, _DIGITS)))


def _shares(values: list[float]) -> tuple[float, ...]:
    return tuple(round(value, _DIGITS) for value in values)


_KINDS = {"schedule": _schedule_policy}
"""What a file of each kind becomes."""
