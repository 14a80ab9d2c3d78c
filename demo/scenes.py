"""Captioned scenes drawn by arithmetic: the world the demo models are trained on.

A scene is one to four objects on a background, for example
``a large red striped circle top left, a small blue square bottom right marked k, on a grey marbled background``; in a
clip its objects move: ``a small green star top left moving right fast``. Objects named later lie in front. Everything
is a table of integers first (``Scenes``), so captions, token ids and pictures of a whole batch come from the same
codes; the renderer evaluates signed distances with one-pixel antialiasing. Only torch is imported.

What a caption leaves open is drawn at random: the words it omits, and always the exact places, the angle and phase of
textures, and the waves of a background. ``difficulty`` tells easy captions (at most two plain objects, nothing omitted)
from hard ones.
"""

from __future__ import annotations

import dataclasses
import re

import torch

SIZE = 64  # pixels
FRAMES = 9  # of a clip
MAX_OBJECTS = 4
SIZES = {"small": 8.5, "large": 13.0}  # radius in pixels
COLOURS = {
    "red": (0.86, 0.12, 0.14),
    "orange": (0.98, 0.52, 0.08),
    "yellow": (0.97, 0.88, 0.18),
    "green": (0.13, 0.62, 0.22),
    "cyan": (0.16, 0.80, 0.86),
    "blue": (0.14, 0.27, 0.86),
    "purple": (0.52, 0.17, 0.66),
    "pink": (0.97, 0.55, 0.75),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "ring", "cross")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
CENTRES = (16.0, 32.0, 48.0)  # pixels, for rows and columns alike
LETTERS = ("unmarked", "c", "e", "h", "k", "n", "t", "x", "z")
MOTIONS = {"still": (0, 0), "leftward": (0, -1), "rightward": (0, 1), "upward": (-1, 0), "downward": (1, 0)}  # rows, columns
PACES = {"slowly": 1.6, "fast": 3.4}  # pixels a frame
BACKGROUNDS = {  # two tones each, which the fill mixes
    "white": ((0.96, 0.96, 0.96), (0.62, 0.63, 0.66)),
    "grey": ((0.58, 0.58, 0.60), (0.32, 0.32, 0.34)),
    "black": ((0.05, 0.05, 0.06), (0.32, 0.32, 0.33)),
    "beige": ((0.91, 0.84, 0.71), (0.62, 0.53, 0.41)),
    "navy": ((0.09, 0.12, 0.30), (0.31, 0.36, 0.55)),
}
FILLS = ("flat", "gradient", "rippled", "marbled")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "shape": SHAPES,
    "row": ROWS,
    "column": COLUMNS,
    "letter": LETTERS,
    "motion": tuple(MOTIONS),
    "pace": tuple(PACES),
}
BACKGROUND_ATTRIBUTES: dict[str, tuple[str, ...]] = {"colour": tuple(BACKGROUNDS), "fill": FILLS}
UNSAID = ("unmarked", "still", "slowly")  # what holds where a caption says nothing, and is not left open
FILLERS = frozenset(["a", "an", "the", "at", "in", "on", "of", "with", "and", "background", "marked", "moving"])
PAD = "<pad>"
VOCABULARY: tuple[str, ...] = (
    PAD,
    *(word for group in ATTRIBUTES.values() for word in group),
    *(word for group in BACKGROUND_ATTRIBUTES.values() for word in group),
)
PHRASES = MAX_OBJECTS + 1  # of a caption: the objects, back to front, and the background
SPLITS = ("train", "validation", "test")
DIFFICULTIES = ("easy", "hard")
EASY = 0.35  # share of easy captions
OPEN = -1  # the code of what is not there: an object, or a word that is left open

_ID = {word: i for i, word in enumerate(VOCABULARY)}
_NAMES = tuple(ATTRIBUTES)
_SIZE, _COLOUR, _TEXTURE, _SHAPE, _ROW, _COLUMN, _LETTER, _MOTION, _PACE = range(len(_NAMES))
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


@dataclasses.dataclass(frozen=True)
class Scenes:
    """A batch of scenes as codes into ``ATTRIBUTES`` and ``BACKGROUND_ATTRIBUTES``.

    A caption is the same table with ``OPEN`` for what it omits. A row whose shape is ``OPEN`` is no object.

    Attributes:
        objects: ``[B, MAX_OBJECTS, 9]`` int64, columns in the order of ``ATTRIBUTES``.
        background: ``[B, 2]`` int64, colour and fill.
    """

    objects: torch.Tensor
    background: torch.Tensor

    def __len__(self) -> int:
        return self.background.shape[0]

    def __getitem__(self, index: slice | torch.Tensor) -> Scenes:
        return Scenes(self.objects[index], self.background[index])

    @property
    def present(self) -> torch.Tensor:
        """Which rows are objects, ``[B, MAX_OBJECTS]`` bool."""
        return self.objects[:, :, _SHAPE] >= 0

    def tokens(self) -> torch.Tensor:
        """Word ids ``[B, PHRASES, 9]`` int64: a row for each object and one for the background, ``PAD`` where open."""
        offsets = torch.tensor([_ID[group[0]] for group in ATTRIBUTES.values()])
        objects = torch.where(self.objects < 0, 0, self.objects + offsets)
        offsets = torch.tensor([_ID[group[0]] for group in BACKGROUND_ATTRIBUTES.values()])
        background = torch.where(self.background < 0, 0, self.background + offsets)
        background = torch.nn.functional.pad(background, (0, objects.shape[-1] - background.shape[-1]))
        return torch.cat([objects, background[:, None]], dim=1)

    def captions(self) -> list[str]:
        """The scenes in words; ``parse`` of a caption gives its codes back."""
        return [_caption(o, b) for o, b in zip(self.objects.tolist(), self.background.tolist(), strict=True)]

    def splits(self) -> torch.Tensor:
        """Split of each caption, ``[B]`` int64 into ``SPLITS``: 90 / 5 / 5 %, whatever the order of its objects."""
        weights = torch.tensor([1, 3, 29, 149, 1201, 4807, 19231, 192313, 1153879])
        mixed = _mix(((self.objects + 1) * weights).sum(-1))
        total = (mixed * self.present).sum(1) + _mix((self.background + 1) @ torch.tensor([7, 1]) + 9001)
        bucket = _mix(total) % 20
        return torch.where(bucket == 0, 2, torch.where(bucket == 1, 1, 0))

    def difficulties(self) -> torch.Tensor:
        """Difficulty of each caption, ``[B]`` int64 into ``DIFFICULTIES``."""
        objects, present = self.objects, self.present
        plain = (objects[..., _TEXTURE] == 0) & (objects[..., _LETTER] == 0) & (objects >= 0).all(-1)
        simple = (self.background[:, 1] >= 0) & (self.background[:, 1] < FILLS.index("rippled"))
        easy = (plain | ~present).all(1) & (present.sum(1) <= 2) & simple & (self.background[:, 0] >= 0)
        return torch.where(easy, 0, 1)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Random scenes and what is said of them.

    Attributes:
        scenes: All codes; nothing is open.
        said: The captions.
    """

    scenes: Scenes
    said: Scenes

    def __getitem__(self, index: slice | torch.Tensor) -> Drawn:
        return Drawn(self.scenes[index], self.said[index])


def draw(
    count: int, generator: torch.Generator, split: str = "train", moving: bool = False, difficulty: str | None = None
) -> Drawn:
    """Draw ``count`` random scenes whose captions are of one split; the objects of a scene differ in colour and place.

    Args:
        count: Number of scenes.
        generator: CPU generator, the only source of randomness.
        split: One of ``SPLITS``.
        moving: Scenes for clips.
        difficulty: One of ``DIFFICULTIES``; None mixes them, ``EASY`` of them easy.
    """
    wanted = SPLITS.index(split)
    found: list[Drawn] = []
    while sum(len(drawn.said) for drawn in found) < count:
        drawn = _draw_any(int(count * (1.2 if wanted == 0 else 22)) + 8, generator, moving, difficulty)
        right = drawn.said.splits() == wanted
        if difficulty:
            right &= drawn.said.difficulties() == DIFFICULTIES.index(difficulty)
        found.append(drawn[right])
    scenes, said = (_joined([getattr(drawn, name) for drawn in found]) for name in ("scenes", "said"))
    return Drawn(scenes, said)[:count]


def captions(count: int, seed: int, split: str = "test", moving: bool = False, difficulty: str | None = None) -> list[str]:
    """``count`` captions, see ``draw``; the same for the same seed."""
    return draw(count, torch.Generator().manual_seed(seed), split, moving, difficulty).said.captions()


def parse(text: str, moving: bool = False) -> Scenes:
    """Read one caption into a batch of one.

    Phrases are separated by commas; a phrase with the word ``background`` describes the background, every other one an
    object. Word order inside a phrase is free. Every word but the shape may be left out and is then open; a letter or a
    motion that is not named is not there.

    Args:
        text: The caption.
        moving: Whether words of motion are allowed.

    Raises:
        ValueError: An unknown word, a doubled attribute, a missing shape, no object, or more than ``MAX_OBJECTS``.
    """
    groups = {name: words for name, words in ATTRIBUTES.items() if moving or name not in ("motion", "pace")}
    objects: list[list[int]] = []
    background = [OPEN, OPEN]
    for phrase in text.lower().split(","):
        words = re.findall(r"[^\s.;]+", phrase)
        if "background" in words:
            background = _codes(words, BACKGROUND_ATTRIBUTES, phrase)
        elif words:
            codes = _codes(words, groups, phrase)
            codes += [0] * (len(ATTRIBUTES) - len(codes))
            codes = [0 if c < 0 and name in ("letter", "motion", "pace") else c for name, c in zip(_NAMES, codes, strict=True)]
            if codes[_SHAPE] < 0:
                raise ValueError(f"{phrase.strip()!r} needs exactly one of {', '.join(SHAPES)}; found none.")
            objects.append(codes)
    if not 1 <= len(objects) <= MAX_OBJECTS:
        raise ValueError(f"A caption names 1 to {MAX_OBJECTS} objects separated by commas, found {len(objects)}: {text!r}")
    objects += [[OPEN] * len(ATTRIBUTES)] * (MAX_OBJECTS - len(objects))
    return Scenes(torch.tensor([objects]), torch.tensor([background]))


def difficulty(text: str, moving: bool = False) -> str:
    """One of ``DIFFICULTIES`` for one caption."""
    return DIFFICULTIES[int(parse(text, moving).difficulties()[0])]


# Pictures -------------------------------------------------------------------------------------------------------------


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
    centres = torch.tensor(CENTRES)[codes[:, [_ROW, _COLUMN]]]
    direction = torch.tensor(list(MOTIONS.values()))[codes[:, _MOTION]]
    velocity = direction * torch.tensor(list(PACES.values()))[codes[:, _PACE], None]
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
    radius = torch.tensor(list(SIZES.values()))[codes[:, _SIZE]] * (1 + 0.05 * wobble[:, 2])
    shape = torch.broadcast_shapes(dy.shape, dx.shape)
    alpha = torch.empty(shape)
    ink = torch.zeros(shape)
    for index, name in enumerate(SHAPES):
        rows = (codes[:, _SHAPE] == index).nonzero()[:, 0]
        if len(rows):
            alpha[rows] = (0.5 - distance(name, dx[rows], dy[rows], radius[rows, None, None, None])).clamp(0, 1)
    for index, name in enumerate(TEXTURES):
        rows = (codes[:, _TEXTURE] == index).nonzero()[:, 0]
        if len(rows) and name != "plain":
            ink[rows] = _ink(name, dx[rows], dy[rows], numbers[rows])
    colour = torch.tensor(list(COLOURS.values()))[codes[:, _COLOUR]]
    paint = colour[:, None, :, None, None] * (1 - (1 - SHADE) * ink)[:, :, None]
    rows = (codes[:, _LETTER] > 0).nonzero()[:, 0]
    if len(rows):
        glyph = _glyph(codes[rows, _LETTER], dx[rows], dy[rows], radius[rows])
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


# Random scenes and words ----------------------------------------------------------------------------------------------


def _draw_any(count: int, generator: torch.Generator, moving: bool, difficulty: str | None) -> Drawn:
    def pick(weights: list[float], *shape: int) -> torch.Tensor:
        total = torch.tensor(weights).cumsum(0)
        drawn = torch.rand(shape, generator=generator) * total[-1]
        return torch.searchsorted(total, drawn, right=True).clamp(max=len(weights) - 1)

    def even(group: str, *shape: int) -> torch.Tensor:
        return pick([1.0] * len(ATTRIBUTES[group]), *shape)

    each = (count, MAX_OBJECTS)
    hard = torch.full((count,), difficulty == "hard") if difficulty else torch.rand(count, generator=generator) >= EASY
    per_object = hard[:, None].expand(each)
    number = torch.where(hard, pick([0, 3, 2] if moving else [0, 2, 3, 1], count), pick([1, 1], count)) + 1
    lettered = per_object & (not moving)
    places = torch.rand(count, 9, generator=generator).argsort(dim=1)[:, :MAX_OBJECTS]
    columns = {
        "size": torch.where(per_object, pick([1, 2], *each), even("size", *each)),
        "colour": torch.rand(count, len(COLOURS), generator=generator).argsort(dim=1)[:, :MAX_OBJECTS],
        "texture": torch.where(per_object, pick([1, 1, 1, 1], *each), 0),
        "shape": even("shape", *each),
        "row": places // 3,
        "column": places % 3,
        "letter": torch.where(lettered & (torch.rand(each, generator=generator) < 0.3), pick([0, *[1] * 8], *each), 0),
        "motion": torch.zeros(each, dtype=torch.long),
        "pace": torch.zeros(each, dtype=torch.long),
    }  # fmt: skip
    if moving:
        motion = torch.where(per_object, pick([1, 2, 2, 2, 2], *each), pick([0, 1, 1, 1, 1], *each))
        columns["motion"] = _inward(motion, columns["row"], columns["column"])
        columns["pace"] = torch.where(columns["motion"] > 0, even("pace", *each), 0)
    objects = torch.stack([columns[name] for name in _NAMES], dim=-1)
    objects = torch.where((torch.arange(MAX_OBJECTS) < number[:, None])[..., None], objects, OPEN)
    fill = torch.where(hard, pick([1, 2, 3, 3], count), pick([1, 1], count))
    background = torch.stack([pick([1.0] * len(BACKGROUNDS), count), fill], dim=-1)

    omitted = torch.rand(*each, 4, generator=generator) < torch.tensor([0.25, 0.2, 0.3, 0.2])
    omitted &= per_object[..., None]
    mask = torch.zeros(objects.shape, dtype=torch.bool)
    mask[..., [_SIZE, _COLOUR, _TEXTURE]] = omitted[..., :3]
    mask[..., [_ROW, _COLUMN]] = omitted[..., 3:]
    unsaid = (torch.rand(count, 2, generator=generator) < 0.15) & hard[:, None]
    said = Scenes(torch.where(mask, OPEN, objects), torch.where(unsaid, OPEN, background))
    return Drawn(Scenes(objects, background), said)


def _inward(motion: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Turn round the motions that would lead out of the picture."""
    for at, edge, outward, inward in (
        (column, 0, "leftward", "rightward"),
        (column, 2, "rightward", "leftward"),
        (row, 0, "upward", "downward"),
        (row, 2, "downward", "upward"),
    ):
        names = list(MOTIONS)
        motion = torch.where((at == edge) & (motion == names.index(outward)), names.index(inward), motion)
    return motion


def _joined(parts: list[Scenes]) -> Scenes:
    return Scenes(torch.cat([p.objects for p in parts]), torch.cat([p.background for p in parts]))


def _caption(objects: list[list[int]], background: list[int]) -> str:
    phrases = []
    for codes in objects:
        if codes[_SHAPE] >= 0:
            words = {name: group[c] for (name, group), c in zip(ATTRIBUTES.items(), codes, strict=True) if c >= 0}
            letter, motion, pace = words.pop("letter"), words.pop("motion"), words.pop("pace")
            marked = [] if letter in UNSAID else ["marked", letter]
            moves = [] if motion in UNSAID else ["moving", motion, pace]
            phrases.append(" ".join(["a", *words.values(), *marked, *moves]))
    named = [group[c] for group, c in zip(BACKGROUND_ATTRIBUTES.values(), background, strict=True) if c >= 0]
    if named:
        phrases.append(" ".join(["on a", *named, "background"]))
    return ", ".join(phrases)


def _codes(words: list[str], groups: dict[str, tuple[str, ...]], phrase: str) -> list[int]:
    known = {w for group in groups.values() for w in group} | FILLERS
    for word in words:
        if word not in known:
            listed = "; ".join(", ".join(group) for group in groups.values())
            raise ValueError(f"Unknown word {word!r} in {phrase.strip()!r}. Known words here: {listed}.")
    codes: list[int] = []
    for group in groups.values():
        named = [w for w in words if w in group]
        if len(named) > 1:
            raise ValueError(f"{phrase.strip()!r} needs exactly one of {', '.join(group)}; found {' and '.join(named)}.")
        codes.append(group.index(named[0]) if named else OPEN)
    return codes


def _mix(value: torch.Tensor) -> torch.Tensor:
    """Scramble non-negative int64 values into 0..2^31-1; products stay below 2^63."""
    for factor in (0x045D9F3B, 0x119DE1F3):
        value = value & 0x7FFFFFFF
        value = ((value ^ (value >> 15)) * factor) & 0x7FFFFFFF
    return value ^ (value >> 16)
