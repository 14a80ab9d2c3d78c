"""What is kept between steps: features per stream, sliced out of the batch of a call, within a hard bound of bytes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blockdance_core.forecast import Forecast
from blockdance_core.interception import Feature, nbytes

POSITIVE, NEGATIVE = 0, 1


class Stream(NamedTuple):
    """Whose one chunk of a call is.

    Attributes:
        conditioning: Name of the conditioning.
        kind: `POSITIVE`, `NEGATIVE`, or another number that a guider gives.
        window: Context window.
        rest: Patches, and who asked.
    """

    conditioning: Hashable
    kind: int
    window: Hashable
    rest: Hashable


class StreamKey(NamedTuple):
    """Tells one stream of evaluations from every other: that of one chunk of a call.

    Attributes:
        stream: Model, stream and occurrence.
        passes: Number of the pass of the model in the call.
        rows: Rows of the chunk.
        signature: Shape, dtype and device of what enters block 0, or the model.
    """

    stream: Hashable
    passes: int
    rows: int
    signature: Hashable

    @property
    def whose(self) -> Stream | None:
        """None where that is not known."""
        match self.stream:
            case (_, Stream() as stream, _):
                return stream
        return None

    @property
    def set_against(self) -> Hashable:
        """The same for all streams that guidance may set against each other: it patches some, and calls them by itself."""
        match self.stream:
            case (owner, Stream() as stream, occurrence):
                return (owner, stream.window, occurrence), self.passes, self.rows, self.signature
        return self


class Place(NamedTuple):
    """Where a run stands when a feature is stored, or forecast.

    Attributes:
        step: Index of the executed step.
        group: The group that a feature is valid in; elsewhere it only serves as history.
        condition: What else it is valid under, such as the shapes of control residuals.
        sigma: Noise level at the evaluation.
    """

    step: int
    group: int | None
    condition: Hashable
    sigma: float


@dataclasses.dataclass
class Entry:
    """What one stream stored at one step.

    Attributes:
        at: Where the run stood.
        anchored: Whether `feature` is a residual against the input of block 0, or the boundary output itself.
        feature: Components [rows, tokens, width]; of the whole model its one slope [rows, C, ...].
        whole: Whether `feature` is the slope that the whole model gives, rather than the output of a block.
    """

    at: Place
    anchored: bool
    feature: Feature
    whole: bool


NOTHING_STORED = "nothing stored for this conditioning in this group (it is new, or its shape, control or patches changed)"

NO_MEMORY = "no memory left for the cache"


@contextlib.contextmanager
def memory_permitting() -> Iterator[None]:
    """Where an allocation fails, what is inside ends there, and nothing is raised: what comes behind says what then."""
    try:
        yield
    except RuntimeError as error:
        named = isinstance(error, torch.cuda.OutOfMemoryError)  # the name that older releases of torch have, too
        # Not every device has a class for that: on the CPU, only the message tells.
        if not named and not any(text in str(error) for text in ("out of memory", "DefaultCPUAllocator")):
            raise


class FeatureCache:
    """Stored features of all streams of one model in one sampling run.

    Attributes:
        anchored: Whether residuals are stored, rather than outputs.
        keep: Entries kept per stream and boundary.
        limit: No more bytes than this are ever stored.
        device: Where entries are kept; None for where they are computed.
        stored_bytes: Bytes stored now.
        peak_bytes: Most bytes stored so far.
        changed: The last step at which a stream was stored under another condition than before.
        unweighed: Whether a stream was forecast without weights that hold for one conditioning set against one other, as it
            is of another kind.
    """

    def __init__(self, anchored: bool, keep: int) -> None:
        self.anchored = anchored
        self.keep = keep
        self.limit: float = float("inf")
        self.device: torch.device | None = None
        self.stored_bytes = 0
        self.peak_bytes = 0
        self.changed = -1
        self.unweighed = False
        self._entries: dict[tuple[StreamKey, int], list[Entry]] = {}
        self._seen: dict[StreamKey, int] = {}

    def store(
        self, key: StreamKey, boundary: int, at: Place, output: Feature, base: Feature | None, whole: bool = False
    ) -> Entry | str:
        """Store the output of the boundary block for one stream, or its residual against `base`; or a slope.

        Args:
            key: The stream.
            boundary: Block index of the output.
            at: Where the run stands.
            output: Raw output of the boundary block, rows of this stream only. Never kept by reference.
            base: Input of block 0 in the same layout; None to store the output itself.
            whole: Whether it is a slope.

        Returns:
            What was stored; or why nothing was. Running out of memory here is such a reason; it is not raised.
        """
        self._seen[key] = at.step
        alike = [old for old in self._entries.get((key, boundary), []) if old.at.condition == at.condition]
        if len(alike) < len(self._entries.get((key, boundary), [])):
            self.changed = at.step
        history = [old for old in alike if old.at.step != at.step][: self.keep - 1]
        self._replace(key, boundary, history)
        if self.stored_bytes + nbytes(output) > self.limit:
            return f"the cache is at its limit of {self.limit / 2**20:.0f} MiB"
        anchored = base is not None and all(_fits(part, of) for part, of in zip(output, base, strict=True))
        bases = base if anchored and base is not None else (None,) * len(output)
        with memory_permitting():
            entry = Entry(at, anchored, tuple(self._kept(part, of) for part, of in zip(output, bases, strict=True)), whole)
            self._replace(key, boundary, [entry, *history])
            return entry
        return NO_MEMORY

    def predict(
        self,
        keys: Sequence[StreamKey],
        boundary: int,
        at: Place,
        forecast: Forecast,
        current: Feature | None,
        device: torch.device | None = None,
        since: int = 0,
    ) -> Feature | str:
        """Forecast the boundary feature of a whole batch.

        Args:
            keys: One stream per equal chunk of rows, in batch order.
            boundary: Block index to forecast.
            at: Where the run stands; a stream that stored nothing in this group, or its last feature under another condition,
                has no forecast.
            forecast: How to weigh what is stored.
            current: Input of block 0 now, all rows, in the layout of the boundary; None where that is not known.
            device: Where the model runs; None for where the features are stored.
            since: A stream whose last feature is of an earlier step has no forecast.

        Returns:
            New tensors [rows, tokens, width], of a slope [rows, C, ...]; or why there is no forecast.
        """
        histories = []
        for key in keys:
            history = self._entries.get((key, boundary), [])
            if not history:
                return NOTHING_STORED
            newest = history[0]
            valid = (newest.at.group, newest.at.condition) == (at.group, at.condition) and newest.at.step >= since
            if not valid or (newest.anchored and current is None):
                return NOTHING_STORED
            # An output that did not fit its input is held, never extrapolated.
            weighed = history if newest.whole or newest.anchored else history[:1]
            histories.append([entry for entry in weighed if entry.anchored == newest.anchored])
        least = min(map(len, histories))  # all sides of guidance are forecast alike
        chunks = [
            self._terms(key, boundary, history[:least], forecast, at) for key, history in zip(keys, histories, strict=True)
        ]
        with memory_permitting():
            return tuple(
                self._combined(index, chunks, current, device) for index in range(len(chunks[0][0][1].feature))
            )
        return NO_MEMORY

    def _terms(
        self, key: StreamKey, boundary: int, entries: list[Entry], forecast: Forecast, at: Place
    ) -> list[tuple[float, Entry]]:
        """What is added up for a stream: its own entries, and those of the stream that it is guided away from."""
        ages = [at.step - one.at.step for one in entries]
        if forecast.guided and forecast.fits(ages):
            guided = self._guided(key, boundary, entries, forecast)
            if guided is not None:
                return guided
            self.unweighed |= key.whose is not None
            forecast = dataclasses.replace(forecast, fitted=())
        return list(zip(forecast.weights([one.at.sigma for one in entries], at.sigma, ages), entries, strict=False))

    def _guided(
        self, key: StreamKey, boundary: int, entries: list[Entry], forecast: Forecast
    ) -> list[tuple[float, Entry]] | None:
        """The terms where guidance has weights of its own, for the difference between a stream and its unconditional one.

        Without guidance the others hold for all. None unless one conditioning is set against one other, and both were stored
        at the same steps: what is weighed as another stream should be leaves an error that guidance multiplies.
        """
        own = key.whose
        if own is None:
            return None
        now = [(other, other.whose, history) for (other, tap), history in self._entries.items()
               if tap == boundary and history[0].at.step == entries[0].at.step]
        plain = [(weight, entry) for (_, weight), entry in zip(forecast.fitted, entries, strict=False)]
        if all(stream and stream.kind == POSITIVE for _, stream, _ in now):
            return plain
        stored = _stored(entries[: len(plain)])
        met = [(stream, history) for other, stream, history in now
               if stream and other.set_against == key.set_against and _stored(history[: len(plain)]) == stored]
        if {stream.kind for stream, _ in met} != {POSITIVE, NEGATIVE}:
            return None
        negative = [(stream, history) for stream, history in met if stream.kind == NEGATIVE]
        nearest = [one for one in negative if one[0].rest == own.rest] or negative
        if len(nearest) > 1:
            return None
        if own.kind == NEGATIVE:
            return plain
        ((_, others),) = nearest
        return [term for (weight, one), other, more in zip(plain, others, forecast.guided, strict=False)
                for term in ((more, one), (weight - more, other))]

    def _combined(
        self,
        index: int,
        chunks: Sequence[Sequence[tuple[float, Entry]]],
        current: Feature | None,
        device: torch.device | None,
    ) -> Tensor | None:
        first = chunks[0][0][1].feature[index]
        if first is None:
            return None
        base = current[index] if current is not None else None
        rows = first.shape[0]
        result = torch.empty((rows * len(chunks), *first.shape[1:]), dtype=first.dtype, device=device or first.device)
        for number, chunk in enumerate(chunks):
            target = result.narrow(0, number * rows, rows)
            # Sums of half floats overflow or round on the way; float32 adds in place.
            total = target if target.dtype == torch.float32 else torch.empty_like(target, dtype=torch.float32)
            if base is None or not chunk[0][1].anchored:
                total.zero_()
            else:
                total.copy_(base.narrow(0, number * rows, rows))
            for weight, entry in chunk:
                part = entry.feature[index]
                if part is not None:
                    total.add_(part.to(total.device), alpha=weight)
            if total is not target:
                target.copy_(_saturated(total, target.dtype))
        return result

    def regroup(self, groups: Sequence[int | None]) -> None:
        """The plan has changed: what was stored at step k belongs to `groups[k]`."""
        for history in self._entries.values():
            for entry in history:
                entry.at = entry.at._replace(group=groups[entry.at.step])

    def divided(self, parts: Sequence[Sequence[int]], batch: int) -> list[FeatureCache]:
        """One cache for each part of the samples, of new tensors; this one is empty behind it.

        What does not hold one row for each of `batch` samples is dropped, and what memory is not enough for.
        """
        caches = [FeatureCache(self.anchored, self.keep) for _ in parts]
        for part, rows in zip(caches, parts, strict=True):
            part.device, part.limit = self.device, self.limit * len(rows) / batch
        for (key, boundary), history in list(self._entries.items()):
            for part, rows in zip(caches, parts, strict=True):
                if key.rows == batch:
                    renamed = key._replace(rows=len(rows))
                    part._seen[renamed] = self._seen[key]
                    with memory_permitting():
                        part._replace(renamed, boundary, [_copied(entry, rows) for entry in history])
            self._replace(key, boundary, [])
        self.clear()
        return caches

    def retain(self, boundaries: Collection[int]) -> None:
        """Drop what was stored at other boundaries."""
        for slot in [slot for slot in self._entries if slot[1] not in boundaries]:
            self._replace(*slot, [])

    def drop_unseen(self, since_step: int) -> None:
        """Drop every stream that stored nothing since a step."""
        for key in [key for key, step in self._seen.items() if step < since_step]:
            del self._seen[key]
            for slot in [slot for slot in self._entries if slot[0] == key]:
                self._replace(*slot, [])

    def move(self, device: torch.device, keep: int) -> tuple[str, ...]:
        """Keep entries on `device` from now on, `keep` per stream; those stored already follow.

        Returns:
            Why those were dropped instead, if they were.
        """
        self.device, self.keep = device, keep
        with memory_permitting():
            for slot, history in list(self._entries.items()):
                self._replace(*slot, history[:keep])
                for entry in history[:keep]:
                    entry.feature = tuple(None if part is None else part.to(device) for part in entry.feature)
            return ()
        self.clear()
        return (NO_MEMORY,)

    def clear(self) -> None:
        """Drop every tensor."""
        self._entries.clear()
        self._seen.clear()
        self.stored_bytes = 0

    def _kept(self, part: Tensor | None, base: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        device = self.device or part.device
        # Blocks and the host write into their tensors later on: what is stored must be a new tensor.
        if base is None:
            return part.to(device, copy=True)
        return _saturated(part - base, part.dtype).to(device)  # half floats, too, are subtracted in float32 and rounded once

    def _replace(self, key: StreamKey, boundary: int, history: list[Entry]) -> None:
        before = self._entries.pop((key, boundary), [])
        if history:
            self._entries[key, boundary] = history
        self.stored_bytes += sum(nbytes(entry.feature) for entry in history) - sum(nbytes(entry.feature) for entry in before)
        self.peak_bytes = max(self.peak_bytes, self.stored_bytes)


def _stored(entries: Sequence[Entry]) -> list[Hashable]:
    """When and how they were stored."""
    return [(entry.at.step, entry.at.condition, entry.anchored) for entry in entries]


def _copied(entry: Entry, rows: Sequence[int]) -> Entry:
    """Some rows of an entry."""
    return dataclasses.replace(entry, feature=tuple(None if one is None else one[list(rows)] for one in entry.feature))


def _saturated(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value`, in place, within what float16 can hold if that is the dtype: as the host does with its own features."""
    if dtype == torch.float16:
        limits = torch.finfo(dtype)
        value.clamp_(limits.min, limits.max)
    return value


def _fits(part: Tensor | None, base: Tensor | None) -> bool:
    return part is None or (base is not None and part.shape == base.shape and part.dtype == base.dtype)
