"""Does a picture, or a clip, show what its caption says? Template matching over colours; no learned parts.

The objects of a scene differ in colour. For each of the eight colours, every pixel is weighed for being that colour in
any of its shades (+1), for showing the background (-1), or something else that may lie in front (a little below 0). The
shape, size and place whose mask gathers the most is what is there, if that is enough to be seen. The caption is read only
afterwards. Texture, letters and sizes are not judged.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from . import scenes

_REACH = 16  # pixels: half the side of a mask
_SCALES = (0.94, 1.0, 1.06)
_CLEAR = 0.02  # difference of squared errors, mean over the channels, at which a pixel is sure
_HIDDEN = 0.2  # cost of a pixel that shows another object
_ENOUGH, _SHARE = 22.0, 0.15  # pixels, and share of a mask, that are gathered where an object is seen
_MOVED = 6.5  # pixels between where a moving object should be and where it is


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
    first, background = look(frames[0] if moving else frames)
    found, last = list(first), {}
    if moving:
        last = {one.colour: one for one in look(frames[-1], background)[0]}
    verdicts: list[dict[str, bool] | None] = [None] * int(said.present.sum())
    named_first = sorted(range(len(verdicts)), key=lambda k: bool(said.objects[0, k, 1] < 0))
    for k in named_first:
        codes = said.objects[0, k]
        options = [_compare(codes, one, last.get(one.colour), len(frames) - 1 if moving else 0) for one in found]
        if codes[1] >= 0:
            options = [option if option["colour"] else {} for option in options]
        best = max(range(len(options)), key=lambda i: sum(options[i].values()), default=None)
        if best is None or not options[best]:
            verdicts[k] = dict.fromkeys(("shape", "colour", "place", *(["motion"] if moving else [])), False)
        else:
            verdicts[k] = options[best]
            del found[best]
    named = int(said.background[0, 0])
    return Verdict(tuple(v for v in verdicts if v is not None), named in (scenes.OPEN, background), not found)


def look(picture: torch.Tensor, background: int | None = None) -> tuple[list[Found], int]:
    """The objects of a picture ``[3, H, H]`` and the code of its background's colour (given, or found)."""
    picture = picture.float().clamp(0, 1)
    margin = (picture.shape[-1] - scenes.SIZE) / 2
    colours = torch.tensor(list(scenes.COLOURS.values()))
    object_errors = _to_segments(picture, colours * scenes.SHADE, colours)
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
    gathered = torch.nn.functional.conv2d(evidence[:, None], masks[:, None], padding=_REACH)
    objects = []
    for colour, maps in enumerate(gathered):
        value, index = maps.flatten().max(0)
        mask, row, column = (int(i) for i in torch.unravel_index(index, maps.shape))
        if value > max(_ENOUGH, _SHARE * masks[mask].sum()):
            objects.append(Found(shapes[mask], colour, (row + 0.5 - margin, column + 0.5 - margin)))
    return objects, background


def _compare(codes: torch.Tensor, found: Found, last: Found | None, frames: int) -> dict[str, bool]:
    _, colour, _, shape, row, column, _, _, _ = codes.tolist()
    judged = {
        "shape": shape == found.shape,
        "colour": colour in (scenes.OPEN, found.colour),
        "place": row == scenes.OPEN or (row, column) == found.place,
    }
    if frames:
        start, goal = scenes.place(codes[None].clamp(min=0), torch.tensor([0.0, frames]))[0]
        moved = torch.tensor(last.centre) - torch.tensor(found.centre) if last else torch.tensor([torch.inf] * 2)
        judged["motion"] = bool((moved - (goal - start)).norm() < _MOVED)
    return judged


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
            away = scenes.distance(name, axis[None, None, :], axis[None, :, None], torch.tensor(radius))
            masks.append((0.5 - away[0]).clamp(0, 1))
            shapes.append(index)
    return torch.stack(masks), shapes
