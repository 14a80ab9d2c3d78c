"""Does a picture show what its caption says? Analysis by synthesis over the scene renderer; no learned parts.

For each object of the caption, at the place the caption names, every shape, texture, size and small displacement is
drawn over the rest of the scene with the best of the eight colours; the least squared error says what is there. Places
are therefore judged by how well anything explains the picture there: an object elsewhere leaves background, which no
candidate fits well, so the candidates include "nothing".
"""

from __future__ import annotations

import dataclasses
import itertools

import torch

from . import scenes

_REACH = 15  # pixels around the place that count
_OFFSETS = torch.arange(-3.0, 3.5, 1.0)  # pixels; the renderer's jitter and a little more
_STRAY_ERROR, _STRAY_PIXELS = 0.02, 16  # mean square over the channels; pixels that may exceed it


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one picture shows.

    Attributes:
        objects: For each object of the caption, attribute name -> right or wrong.
        background: Whether the background has the named colour and fill, and nothing that the caption does not name.
    """

    objects: tuple[dict[str, bool], ...]
    background: bool

    @property
    def right(self) -> bool:
        """Everything the caption says is there."""
        return self.background and all(all(found.values()) for found in self.objects)


def judge(picture: torch.Tensor, caption: str) -> Verdict:
    """Compare one picture with its caption.

    Args:
        picture: ``[3, 64, 64]`` float in 0..1.
        caption: Text that ``scenes.parse`` accepts.
    """
    scene = scenes.parse(caption)
    picture = picture.float()
    count = int((scene.objects[0, :, 0] >= 0).sum())
    found = tuple(_object(picture, scene, k) for k in range(count))
    return Verdict(found, _background(picture, scene))


def _background(picture: torch.Tensor, scene: scenes.Scenes) -> bool:
    covered = _alpha(scene, range(scenes.MAX_OBJECTS), grow=4.0)
    every = torch.cartesian_prod(*(torch.arange(len(group)) for group in scenes.BACKGROUND_ATTRIBUTES))
    drawn = scenes.render(scenes.Scenes(scene.objects.expand(len(every), -1, -1) * 0 - 1, every))
    errors = (drawn - picture).square().mean(1) * (1 - covered)
    best = int(errors.sum((1, 2)).argmin())
    stray = int((errors[best] > _STRAY_ERROR).sum())
    return bool((every[best] == scene.background[0]).all()) and stray <= _STRAY_PIXELS


def _object(picture: torch.Tensor, scene: scenes.Scenes, index: int) -> dict[str, bool]:
    size, colour, texture, shape, row, column = scene.objects[0, index].tolist()
    y0, x0 = scenes.CENTRES[row], scenes.CENTRES[column]
    top, left = int(y0 - _REACH), int(x0 - _REACH)
    rows, columns = slice(max(top, 0), top + 2 * _REACH), slice(max(left, 0), left + 2 * _REACH)
    others = scene.objects.clone()
    others[0, index:] = -1
    behind = scenes.render(scenes.Scenes(others, scene.background))[0][:, rows, columns]
    seen = 1 - _alpha(scene, range(index + 1, scenes.MAX_OBJECTS), grow=1.0)[rows, columns]
    target = picture[:, rows, columns]

    axis = torch.arange(scenes.SIZE) + 0.5
    offset_y, offset_x = (o.flatten()[:, None, None] for o in torch.meshgrid(_OFFSETS, _OFFSETS, indexing="ij"))
    dy = axis[rows][None, :, None] - y0 - offset_y
    dx = axis[columns][None, None, :] - x0 - offset_x
    palette = torch.tensor(list(scenes.COLOURS.values()))
    best: tuple[float, tuple[int, ...]] = (((target - behind).square() * seen).sum().item(), (-1, -1, -1, -1))
    for c_shape, c_size in itertools.product(range(len(scenes.SHAPES)), range(len(scenes.SIZES))):
        radius = torch.tensor(list(scenes.SIZES.values())[c_size])
        alpha = (0.5 - scenes.distance(scenes.SHAPES[c_shape], dx, dy, radius)).clamp(0, 1)
        for c_texture, name in enumerate(scenes.TEXTURES):
            shade = scenes.shade(name, dx, dy).expand_as(alpha)
            error = _errors(target, behind, seen, alpha, shade, palette)
            value, place = error.flatten().min(0)
            if value.item() < best[0]:
                best = (value.item(), (c_size, int(place) % len(palette), c_texture, c_shape))
    named = (size, colour, texture, shape)
    return {k: a == b for k, a, b in zip(("size", "colour", "texture", "shape"), named, best[1], strict=True)}


def _errors(
    target: torch.Tensor,
    behind: torch.Tensor,
    seen: torch.Tensor,
    alpha: torch.Tensor,
    shade: torch.Tensor,
    palette: torch.Tensor,
) -> torch.Tensor:
    """Squared error ``[offsets, colours]`` of painting each colour, expanded so that no picture is painted."""
    rest = (target - behind)[None] + alpha[:, None] * behind  # what the paint has to explain
    ink = alpha * shade * seen
    constant = (rest.square() * seen).sum((1, 2, 3))[:, None]
    linear = (rest * ink[:, None]).sum((2, 3)) @ palette.T
    square = (ink * alpha * shade).sum((1, 2))[:, None] * palette.square().sum(1)
    return constant - 2 * linear + square


def _alpha(scene: scenes.Scenes, which: range, grow: float) -> torch.Tensor:
    """Where the named objects may cover the picture, ``[64, 64]`` in 0..1, each grown by some pixels."""
    axis = torch.arange(scenes.SIZE) + 0.5
    cover = torch.zeros(scenes.SIZE, scenes.SIZE)
    for k in which:
        size, _, _, shape, row, column = scene.objects[0, k].tolist()
        if size >= 0:
            dy, dx = axis[None, :, None] - scenes.CENTRES[row], axis[None, None, :] - scenes.CENTRES[column]
            radius = torch.tensor(list(scenes.SIZES.values())[size])
            away = scenes.distance(scenes.SHAPES[shape], dx, dy, radius)[0]
            cover = torch.maximum(cover, (0.5 + grow - away).clamp(0, 1))
    return cover
