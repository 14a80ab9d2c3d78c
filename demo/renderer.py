"""Draw scenes by arithmetic: signed distances with one-pixel antialiasing, for whole batches. Only torch is imported."""

from __future__ import annotations

import torch

from .scenes import (
    BACKGROUNDS,
    CENTRES,
    COLOURS,
    FILLS,
    FRAMES,
    LETTERS,
    MAX_OBJECTS,
    MOTIONS,
    PACES,
    SHAPES,
    SIZE,
    SIZES,
    TEXTURES,
    Column,
    Scenes,
)

_PERIODS = {"striped": (5.0, 7.5), "dotted": (6.5, 8.5), "checkered": (7.0, 10.0)}  # pixels
SHADE = 0.45  # second tone of a texture, as a share of the first
_WAVES = 10  # of a marbled background
_BITMAPS = {
    "c": "01110 10001 10000 10000 10000 10001 01110",
    "e": "11111 10000 10000 11110 10000 10000 11111",
    "h": "10001 10001 10001 11111 10001 10001 10001",
    "k": "10001 10010 10100 11000 10100 10010 10001",
    "n": "10001 11001 11001 10101 10011 10011 10001",
    "t": "11111 00100 00100 00100 00100 00100 00100",
    "x": "10001 10001 01010 00100 01010 10001 10001",
    "z": "11111 00001 00010 00100 01000 10000 11111",
}


def render(scenes: Scenes, generator: torch.Generator | None = None, size: int = SIZE) -> torch.Tensor:
    """Draw pictures.

    Args:
        scenes: Batch of B scenes with nothing open.
        generator: Source of what captions never say: places (2 pixels either way), sizes (5 %), angles and phases.
            None draws at the named places, upright.
        size: Side of the picture; beyond ``SIZE`` a margin on all sides.

    Returns:
        ``[B, 3, size, size]`` float32 in 0..1.
    """
    return render_clips(scenes, generator, 1, size)[:, 0]


def render_clips(
    scenes: Scenes, generator: torch.Generator | None = None, frames: int = FRAMES, size: int = SIZE
) -> torch.Tensor:
    """Draw clips: objects start at their places and move at their pace, textures with them, over a still background.

    Args:
        scenes: Batch of B scenes with nothing open.
        generator: As for ``render``.
        frames: Number of frames F.
        size: As for ``render``.

    Returns:
        ``[B, F, 3, size, size]`` float32 in 0..1.
    """
    batch = len(scenes)
    numbers = _random((batch, MAX_OBJECTS, 7), generator)
    wobble = numbers[..., :3] * 2 - 1
    axis = torch.arange(size) + 0.5 - (size - SIZE) / 2
    picture = _background(scenes.background, axis, generator)[:, None].expand(-1, frames, -1, -1, -1)
    time = torch.arange(frames)
    for k in range(MAX_OBJECTS):
        rows = scenes.present[:, k].nonzero()[:, 0]
        if len(rows):
            layer, alpha = _object(scenes.objects[rows, k], wobble[rows, k], numbers[rows, k, 3:], time, axis)
            picture = picture.index_add(0, rows, alpha * (layer - picture[rows]))
    return picture


def place(codes: torch.Tensor, time: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Where objects of codes ``[N, 9]`` are at frame ``time`` (number or ``[T]``): ``[N, T, 2]`` pixels, row and column."""
    centres = torch.tensor(CENTRES)[codes[:, [Column.ROW, Column.COLUMN]]]
    direction = torch.tensor(list(MOTIONS.values()))[codes[:, Column.MOTION]]
    velocity = direction * torch.tensor(list(PACES.values()))[codes[:, Column.PACE], None]
    return centres[:, None] + velocity[:, None] * torch.as_tensor(time, dtype=torch.float32).reshape(1, -1, 1)


def _random(shape: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
    """Numbers in 0..1; without a generator the middle of it."""
    return torch.full(shape, 0.5) if generator is None else torch.rand(shape, generator=generator)


def _object(
    codes: torch.Tensor, wobble: torch.Tensor, numbers: torch.Tensor, time: torch.Tensor, axis: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Paint ``[N, T, 3, H, W]`` and cover ``[N, T, 1, H, W]`` of one object a scene; ``axis`` holds the pixels' places."""
    centre = place(codes, time) + 2.0 * wobble[:, None, :2]
    dy = (axis - centre[..., :1])[..., :, None]  # [N, T, H, 1]
    dx = (axis - centre[..., 1:])[..., None, :]
    radius = torch.tensor(list(SIZES.values()))[codes[:, Column.SIZE]] * (1 + 0.05 * wobble[:, 2])
    shape = torch.broadcast_shapes(dy.shape, dx.shape)
    alpha = torch.empty(shape)
    ink = torch.zeros(shape)
    for index, name in enumerate(SHAPES):
        rows = (codes[:, Column.SHAPE] == index).nonzero()[:, 0]
        if len(rows):
            alpha[rows] = (0.5 - distance(name, dx[rows], dy[rows], radius[rows, None, None, None])).clamp(0, 1)
    for index, name in enumerate(TEXTURES):
        rows = (codes[:, Column.TEXTURE] == index).nonzero()[:, 0]
        if len(rows) and name != "plain":
            ink[rows] = _ink(name, dx[rows], dy[rows], numbers[rows])
    colour = torch.tensor(list(COLOURS.values()))[codes[:, Column.COLOUR]]
    paint = colour[:, None, :, None, None] * (1 - (1 - SHADE) * ink)[:, :, None]
    rows = (codes[:, Column.LETTER] > 0).nonzero()[:, 0]
    if len(rows):
        glyph = _glyph(codes[rows, Column.LETTER], dx[rows], dy[rows], radius[rows])
        light = (colour[rows].mean(1) < 0.45).float()[:, None, None, None, None]
        paint[rows] = torch.lerp(paint[rows], light * 0.94 + 0.03, glyph[:, :, None])
        alpha[rows] = torch.maximum(alpha[rows], glyph)
    return paint, alpha[:, :, None]


def _ink(texture: str, dx: torch.Tensor, dy: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The second tone of a texture in 0..1: its angle, phases and period come from numbers ``[N, 4]`` in 0..1."""
    angle, first, second, stretch = (numbers[:, i, None, None, None] for i in range(4))
    low, high = _PERIODS[texture]
    period = low + (high - low) * stretch
    cosine, sine = (torch.pi * angle).cos(), (torch.pi * angle).sin()
    u, v = dx * cosine - dy * sine + first * period, dx * sine + dy * cosine + second * period
    turn = 2 * torch.pi / period
    if texture == "striped":
        return (0.5 + 1.2 * (v * turn).sin() / turn).clamp(0, 1)
    if texture == "checkered":
        return (0.5 + 1.5 * (u * turn).sin() * (v * turn).sin() / turn).clamp(0, 1)
    cell_u, cell_v = (torch.remainder(d, period) - period / 2 for d in (u, v))
    return (0.5 + 0.31 * period - (cell_u.square() + cell_v.square()).sqrt()).clamp(0, 1)


def _glyph(letters: torch.Tensor, dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Cover ``[N, T, H, W]`` of letters, 5 by 7 dots, as high as the radius."""
    bitmaps = torch.stack([_bitmap(name) for name in LETTERS])[letters]
    pitch = radius[:, None, None, None] / 7
    u, v = torch.broadcast_tensors(dx / pitch * (2 / 7), dy / pitch * (2 / 9))
    frames = u.shape[1]
    grid = torch.stack([u, v], dim=-1).flatten(0, 1)
    bitmaps = bitmaps[:, None].expand(-1, frames, -1, -1).flatten(0, 1)[:, None]
    cover = torch.nn.functional.grid_sample(bitmaps, grid, align_corners=False)[:, 0]
    return (cover * 2 - 0.5).clamp(0, 1).unflatten(0, (-1, frames))


def _bitmap(letter: str) -> torch.Tensor:
    """A letter with an empty border, ``[9, 7]``."""
    lines = _BITMAPS.get(letter, " ".join(["00000"] * 7)).split()
    return torch.nn.functional.pad(torch.tensor([[float(dot) for dot in line] for line in lines]), (1, 1, 1, 1))


def _background(codes: torch.Tensor, axis: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """``[B, 3, H, W]`` from colours and fills ``[B, 2]``."""
    numbers = _random((len(codes), 3, _WAVES), generator)
    mix = torch.zeros(len(codes), len(axis), len(axis))
    mix[codes[:, 1] == FILLS.index("gradient")] = (axis[:, None] / SIZE).expand(-1, len(axis))
    for name, waves in (("rippled", 1), ("marbled", _WAVES)):
        rows = (codes[:, 1] == FILLS.index(name)).nonzero()[:, 0]
        if len(rows):
            angle, phase, stretch = numbers[rows, :, :waves].unbind(1)
            period = 6 + 3 * stretch if name == "rippled" else 14 * 3**stretch
            turn = 2 * torch.pi / period
            angle = 2 * torch.pi * angle
            x, y, start = (value[:, :, None, None] for value in (turn * angle.cos(), turn * angle.sin(), 2 * torch.pi * phase))
            field = (x * axis + y * axis[:, None] + start).cos().sum(1)
            mix[rows] = (0.5 + (0.8 if name == "rippled" else 1.1) * field).clamp(0, 1)
    tones = torch.tensor(list(BACKGROUNDS.values()))[codes[:, 0], :, :, None, None]
    return torch.lerp(tones[:, 0], tones[:, 1], mix[:, None])


def distance(shape: str, dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Signed distance in pixels (exact or a lower bound), negative inside; ``dx``, ``dy``, ``radius`` broadcast."""
    ax, ay = dx.abs(), dy.abs()
    if shape == "circle":
        return (dx.square() + dy.square()).sqrt() - radius
    if shape == "ring":
        return ((dx.square() + dy.square()).sqrt() - 0.74 * radius).abs() - 0.26 * radius
    if shape == "square":
        return torch.maximum(ax, ay) - 0.86 * radius
    if shape == "diamond":
        return (ax + ay - 1.1 * radius) * 0.7071
    if shape == "cross":
        long, short = 0.98 * radius, 0.34 * radius
        return torch.minimum(torch.maximum(ax - long, ay - short), torch.maximum(ax - short, ay - long))
    if shape == "triangle":
        return torch.maximum(0.8575 * ax - 0.5145 * (dy + radius), dy - 0.72 * radius)
    if shape == "star":
        return _star(dx, dy, 1.12 * radius)
    raise ValueError(f"Unknown shape {shape!r}. Known: {', '.join(SHAPES)}.")


def _star(dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """A five-pointed star: fold the plane into one tenth, then take the distance to one edge."""
    angle = torch.atan2(dx, -dy)
    fold = (torch.remainder(angle + torch.pi / 5, 2 * torch.pi / 5) - torch.pi / 5).abs()
    length = (dx.square() + dy.square()).sqrt()
    x, y = length * fold.sin(), length * fold.cos()  # the tip is at (0, radius)
    inner = 0.45
    px, py = inner * 0.5878, inner * 0.8090  # the notch, at 36 degrees
    nx, ny = 1 - py, px
    scale = (nx * nx + ny * ny) ** 0.5
    return (x * nx + (y - radius) * ny) / scale
