"""Does a picture, or a clip, show what its caption says? Template matching over colours; no learned parts.

The objects of a scene differ in colour. For each of the eight colours, every pixel is weighed for being that colour in
any of its shades (+1), for showing the background (-1), or something else that may lie in front (a little below 0). The
shape, size and place whose mask gathers the most is what is there, if that is enough to be seen; then its pixels are
taken away and the colour is looked for again. Of a clip every second frame is looked at. The caption is read only
afterwards. Texture, letters, sizes, and the fill of the background are not judged.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import torch

from . import renderer, scenes
from .scenes import OPEN, Column

_REACH = 16  # pixels: half the side of a mask
_SCALES = (0.94, 1.0, 1.06)
_CLEAR = 0.02  # difference of squared errors, mean over the channels, at which a pixel is sure
_HIDDEN = 0.2  # cost of a pixel that shows another object
_ENOUGH, _SHARE = 22.0, 0.15  # pixels, and share of a mask, that are gathered where an object is seen
_AGAIN, _SHARE_AGAIN = 40.0, 0.5  # the same for a second object of one colour: remains of the first are not one
_MOVED = 6.5  # pixels between where a moving object should be and where it is
_MOST = scenes.MAX_OBJECTS + 2  # objects that are compared with the caption; more of them are wrong in any case
_EVERY = 2  # frames of a clip that are looked at


@dataclasses.dataclass(frozen=True)
class Found:
    """One object of a picture: codes of shape and colour, and its centre in pixels (row, column)."""

    shape: int
    colour: int
    centre: tuple[float, float]

    @property
    def place(self) -> tuple[int, int]:
        """The nearest named row and column."""
        row, column = (min(range(3), key=lambda i: abs(scenes.CENTRES[i] - at)) for at in self.centre)
        return row, column


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one picture or clip shows.

    Attributes:
        objects: For each object of the caption, what was judged (shape, colour, place, motion) -> right or wrong; a word
            that the caption leaves open is right.
        background: Whether the background has the named colour.
        nothing_else: Whether there is no object that the caption does not name.
    """

    objects: tuple[dict[str, bool], ...]
    background: bool
    nothing_else: bool

    @property
    def right(self) -> bool:
        """Everything the caption says is there, and nothing else."""
        return self.background and self.nothing_else and all(all(found.values()) for found in self.objects)


def judge(frames: torch.Tensor, caption: str) -> Verdict:
    """Compare one picture or clip with its caption.

    Args:
        frames: ``[3, H, H]``, or ``[F, 3, H, H]`` for a clip, float in 0..1.
        caption: Text that ``scenes.parse`` accepts.
    """
    moving = frames.ndim == 4
    said = scenes.parse(caption, moving)
    named = [codes for codes in said.objects[0] if codes[Column.SHAPE] != OPEN]
    first, background = look(frames[0] if moving else frames)
    times = range(_EVERY, len(frames), _EVERY) if moving else range(0)
    later = {time: look(frames[time], background)[0] for time in times}
    # Which object of the caption is which that was found: the assignment that makes most right.
    found: list[Found | None] = [*first[:_MOST], *[None] * (len(named) - len(first))]
    best = max(
        itertools.permutations(found, len(named)),
        key=lambda order: sum(_points(codes, one, later) for codes, one in zip(named, order, strict=True)),
    )
    verdicts = tuple(_compare(codes, one, later) for codes, one in zip(named, best, strict=True))
    seen = {one.colour for one in best if one is not None}
    strangers = any(one.colour not in seen for objects in later.values() for one in objects)
    doubled = any(len({one.colour for one in objects}) < len(objects) for objects in later.values())
    colour = int(said.background[0, 0])
    nothing_else = len(first) <= len(named) and not strangers and not doubled
    return Verdict(verdicts, colour in (OPEN, background), nothing_else)


def look(picture: torch.Tensor, background: int | None = None) -> tuple[list[Found], int]:
    """The objects of a picture ``[3, H, H]`` and the code of its background's colour (given, or found)."""
    picture = picture.float().clamp(0, 1)
    margin = (picture.shape[-1] - scenes.SIZE) / 2
    colours = torch.tensor(list(scenes.COLOURS.values()))
    object_errors = _to_segments(picture, colours * renderer.SHADE, colours)
    tones = torch.tensor(list(scenes.BACKGROUNDS.values()))
    background_errors = _to_segments(picture, tones[:, 0], tones[:, 1])
    if background is None:
        background = int(background_errors.clamp(max=_CLEAR).sum((1, 2)).argmin())
    behind = background_errors[background]
    ink = torch.tensor([[0.03] * 3, [0.97] * 3])
    letters = _to_segments(picture, ink, ink).amin(0)
    others = torch.stack([_without(object_errors, c).amin(0) for c in range(len(colours))])
    rest = torch.minimum(torch.minimum(others, letters), behind)
    is_it = ((rest - object_errors) / _CLEAR).clamp(0, 1)
    is_behind = ((torch.minimum(object_errors, others) - behind) / _CLEAR).clamp(0, 1)
    evidence = is_it - torch.where(is_it > 0, 0, is_behind.clamp(min=_HIDDEN))
    masks, shapes = _masks()
    side = picture.shape[-1]
    padded, inside = (side + 2 * _REACH,) * 2, slice(_REACH, _REACH + side)
    spectra = torch.fft.rfft2(masks.flip(-1, -2), s=padded)  # some CPUs take a hundred times as long to convolve
    objects = []
    axis = torch.arange(side)
    for (enough, share), colour in itertools.product(((_ENOUGH, _SHARE), (_AGAIN, _SHARE_AGAIN)), range(len(colours))):
        if evidence[colour].clamp(min=0).sum() < enough:
            continue
        gathered = torch.fft.irfft2(torch.fft.rfft2(evidence[colour], s=padded) * spectra, s=padded)[:, inside, inside]
        value, index = gathered.flatten().max(0)
        mask, row, column = (int(i) for i in torch.unravel_index(index, gathered.shape))
        if value > max(enough, share * masks[mask].sum()):
            objects.append(Found(shapes[mask], colour, (row + 0.5 - margin, column + 0.5 - margin)))
            near = ((axis[:, None] - row).abs() <= _REACH) & ((axis - column).abs() <= _REACH)
            evidence[colour] = torch.where(near, evidence[colour].clamp(max=0), evidence[colour])
    return objects, background


def _compare(codes: torch.Tensor, found: Found | None, later: dict[int, list[Found]]) -> dict[str, bool]:
    """What of one object of the caption is right in what was found; ``later`` holds what further frames show."""
    if found is None:
        return dict.fromkeys(("shape", "colour", "place", *(["motion"] if later else [])), False)
    place = zip(codes[[Column.ROW, Column.COLUMN]].tolist(), found.place, strict=True)
    judged = {
        "shape": codes[Column.SHAPE] == found.shape,
        "colour": codes[Column.COLOUR] in (OPEN, found.colour),
        "place": all(said in (OPEN, seen) for said, seen in place),
    }
    if later:
        times = torch.tensor([0.0, *later])
        path = renderer.place(codes[None].clamp(min=0), times)[0]
        path = path - path[0] + torch.tensor(found.centre)
        tracked = {time: one for time, objects in later.items() for one in objects if one.colour == found.colour}
        far = [(torch.tensor(one.centre) - path[1 + list(later).index(time)]).norm() for time, one in tracked.items()]
        same = sum(one.shape == found.shape for one in tracked.values())
        # Others may hide it for a while, and cut its outline: most frames must show it, and where it is seen it is in place.
        judged["motion"] = 2 * len(tracked) >= len(later) and max(far, default=torch.inf) < _MOVED
        judged["shape"] &= 2 * same >= len(tracked)
    return {name: bool(right) for name, right in judged.items()}


def _points(codes: torch.Tensor, found: Found | None, later: dict[int, list[Found]]) -> float:
    """How well a found object answers one of the caption; the colour counts most."""
    judged = _compare(codes, found, later)
    return sum(judged.values()) + 4 * judged["colour"]


def _to_segments(picture: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Squared distance, mean over the channels, of each pixel to the lines between colours ``[N, 3]``: ``[N, H, W]``."""
    along = end - start
    offset = picture[None] - start[:, :, None, None]
    share = (offset * along[:, :, None, None]).sum(1) / along.square().sum(1).clamp(min=1e-6)[:, None, None]
    nearest = start[:, :, None, None] + share.clamp(0, 1)[:, None] * along[:, :, None, None]
    return (picture[None] - nearest).square().mean(1)


def _without(errors: torch.Tensor, index: int) -> torch.Tensor:
    return torch.cat([errors[:index], errors[index + 1 :]])


@functools.cache
def _masks() -> tuple[torch.Tensor, list[int]]:
    """Masks ``[M, S, S]`` of all shapes and sizes with their centre in the middle, and the shape of each."""
    axis = torch.arange(-_REACH, _REACH + 1)
    radii = [radius * factor for radius in scenes.SIZES.values() for factor in _SCALES]
    masks, shapes = [], []
    for index, name in enumerate(scenes.SHAPES):
        for radius in radii:
            away = renderer.distance(name, axis[None, None, :], axis[None, :, None], torch.tensor(radius))
            masks.append((0.5 - away[0]).clamp(0, 1))
            shapes.append(index)
    return torch.stack(masks), shapes
