"""Captioned scenes drawn by arithmetic: the world the demo models are trained on.

A scene is one to three objects on a background, for example
``a large red striped circle top left, a small blue plain square bottom right, on a grey background``.
Objects named later lie in front. Everything is a table of integers first (``Scenes``), so captions, token ids and
pictures of a whole batch come from the same codes; the renderer evaluates signed distances with one-pixel
antialiasing. Only torch is imported.
"""

from __future__ import annotations

import dataclasses
import re

import torch

SIZE = 64
MAX_OBJECTS = 3
SIZES = {"small": 8.5, "large": 13.5}  # radius in pixels
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
CENTRES = (15.0, 32.0, 49.0)  # pixels, for rows and columns alike
BACKGROUNDS = {
    "white": (0.96, 0.96, 0.96),
    "grey": (0.55, 0.55, 0.57),
    "black": (0.06, 0.06, 0.07),
    "beige": (0.90, 0.83, 0.70),
    "navy": (0.10, 0.13, 0.33),
}
FILLS = ("flat", "gradient")

ATTRIBUTES: tuple[tuple[str, ...], ...] = (tuple(SIZES), tuple(COLOURS), TEXTURES, SHAPES, ROWS, COLUMNS)
BACKGROUND_ATTRIBUTES: tuple[tuple[str, ...], ...] = (tuple(BACKGROUNDS), FILLS)
PAD = "<pad>"
VOCABULARY: tuple[str, ...] = (PAD, *(w for group in ATTRIBUTES + BACKGROUND_ATTRIBUTES for w in group))
FILLERS = frozenset(["a", "an", "the", "at", "in", "on", "of", "with", "and", "background"])
TOKENS = MAX_OBJECTS * len(ATTRIBUTES) + len(BACKGROUND_ATTRIBUTES)
SPLITS = ("train", "validation", "test")

_ID = {word: i for i, word in enumerate(VOCABULARY)}
_DEFAULTS = ("large", None, "plain", None, "middle", "center")
_TEXTURE_PERIOD = {"striped": 6.0, "dotted": 7.0, "checkered": 9.0}  # pixels
_SHADE = 0.42  # second colour of a texture, as a share of the first


@dataclasses.dataclass(frozen=True)
class Scenes:
    """A batch of scenes as codes into ``ATTRIBUTES`` and ``BACKGROUND_ATTRIBUTES``.

    Attributes:
        objects: ``[B, MAX_OBJECTS, 6]`` int64, columns in the order of ``ATTRIBUTES``; -1 where there is no object.
        background: ``[B, 2]`` int64, colour and fill.
    """

    objects: torch.Tensor
    background: torch.Tensor

    def __len__(self) -> int:
        return self.background.shape[0]

    def __getitem__(self, index: slice | torch.Tensor) -> Scenes:
        return Scenes(self.objects[index], self.background[index])

    def tokens(self) -> torch.Tensor:
        """Token ids ``[B, TOKENS]`` int64; every attribute has its own place, absent objects are pad."""
        columns = [self.objects[:, k, a] for k in range(MAX_OBJECTS) for a in range(len(ATTRIBUTES))]
        columns += [self.background[:, a] for a in range(len(BACKGROUND_ATTRIBUTES))]
        words = [group for _ in range(MAX_OBJECTS) for group in ATTRIBUTES] + list(BACKGROUND_ATTRIBUTES)
        return torch.stack([torch.where(c < 0, 0, c + _ID[g[0]]) for c, g in zip(columns, words, strict=True)], dim=1)

    def captions(self) -> list[str]:
        """The scenes in words; ``parse`` of a caption gives its scene back."""
        return [_caption(o, b) for o, b in zip(self.objects.tolist(), self.background.tolist(), strict=True)]

    def splits(self) -> torch.Tensor:
        """Split of each scene, ``[B]`` int64 into ``SPLITS``: 90 / 5 / 5 %, whatever the order of its objects."""
        weights = torch.tensor([1, 2, 16, 64, 512, 1536])
        present = self.objects[:, :, 0] >= 0
        mixed = _mix((self.objects * weights).sum(-1) + 1)
        total = (mixed * present).sum(1) + _mix(self.background[:, 0] * 2 + self.background[:, 1] + 9001)
        bucket = _mix(total) % 20
        return torch.where(bucket == 0, 2, torch.where(bucket == 1, 1, 0))


def draw(count: int, generator: torch.Generator, split: str = "train") -> Scenes:
    """Draw ``count`` random scenes of one split; no two objects of a scene share a place.

    Args:
        count: Number of scenes.
        generator: CPU generator, the only source of randomness.
        split: One of ``SPLITS``.
    """
    wanted = SPLITS.index(split)
    found: list[Scenes] = []
    while sum(len(s) for s in found) < count:
        scenes = _draw_any(int(count * (1.2 if wanted == 0 else 22)) + 8, generator)
        found.append(scenes[scenes.splits() == wanted])
    objects = torch.cat([s.objects for s in found])[:count]
    return Scenes(objects, torch.cat([s.background for s in found])[:count])


def captions(count: int, seed: int, split: str = "test") -> list[str]:
    """``count`` captions of one split, the same for the same seed."""
    return draw(count, torch.Generator().manual_seed(seed), split).captions()


def parse(text: str) -> Scenes:
    """Read one caption into a batch of one scene.

    Phrases are separated by commas; a phrase with the word ``background`` describes the background, every other one an
    object. Word order inside a phrase is free. Size, texture, place and background may be left out (large, plain,
    middle center, flat white); colour and shape may not.

    Raises:
        ValueError: An unknown word, a missing or doubled attribute, no object, or more than ``MAX_OBJECTS``.
    """
    objects: list[list[int]] = []
    background = [0, 0]
    for phrase in text.lower().split(","):
        words = re.findall(r"[^\s.;]+", phrase)
        if "background" in words:
            background = _attributes(words, BACKGROUND_ATTRIBUTES, (None, "flat"), phrase)
        elif words:
            objects.append(_attributes(words, ATTRIBUTES, _DEFAULTS, phrase))
    if not 1 <= len(objects) <= MAX_OBJECTS:
        raise ValueError(f"A caption names 1 to {MAX_OBJECTS} objects separated by commas, found {len(objects)}: {text!r}")
    objects += [[-1] * len(ATTRIBUTES)] * (MAX_OBJECTS - len(objects))
    return Scenes(torch.tensor([objects]), torch.tensor([background]))


def render(scenes: Scenes, generator: torch.Generator | None = None, jitter: float = 2.0) -> torch.Tensor:
    """Draw the scenes.

    Args:
        scenes: Batch of B scenes.
        generator: Source of the jitter of places (pixels) and sizes (5 %); None draws without jitter.
        jitter: Largest displacement of an object in pixels, inclusive.

    Returns:
        ``[B, 3, SIZE, SIZE]`` float32 in 0..1.
    """
    batch = len(scenes)
    objects = scenes.objects.flatten(0, 1)
    present = objects[:, 0] >= 0
    codes = objects.clamp(min=0)
    wobble = torch.zeros(batch * MAX_OBJECTS, 3)
    if generator is not None:
        wobble = torch.rand(wobble.shape, generator=generator) * 2 - 1
    centres = torch.tensor(CENTRES)
    axis = torch.arange(SIZE) + 0.5
    dy = axis[None, :, None] - (centres[codes[:, 4]] + jitter * wobble[:, 0])[:, None, None]
    dx = axis[None, None, :] - (centres[codes[:, 5]] + jitter * wobble[:, 1])[:, None, None]
    radius = torch.tensor(list(SIZES.values()))[codes[:, 0]] * (1 + 0.05 * wobble[:, 2])

    alpha = torch.zeros(len(codes), SIZE, SIZE)
    shading = torch.ones(len(codes), SIZE, SIZE)
    for index, name in enumerate(SHAPES):
        rows = (present & (codes[:, 3] == index)).nonzero()[:, 0]
        alpha[rows] = (0.5 - distance(name, dx[rows], dy[rows], radius[rows, None, None])).clamp(0, 1)
    for index, name in enumerate(TEXTURES):
        rows = (present & (codes[:, 2] == index)).nonzero()[:, 0]
        shading[rows] = shade(name, dx[rows], dy[rows])

    colour = torch.tensor(list(COLOURS.values()))[codes[:, 1], :, None, None]
    paint = (colour * shading[:, None]).unflatten(0, (batch, MAX_OBJECTS))
    alpha = alpha.unflatten(0, (batch, MAX_OBJECTS))[:, :, None]
    picture = _background(scenes.background)
    for k in range(MAX_OBJECTS):
        picture = torch.lerp(picture, paint[:, k], alpha[:, k])
    return picture


def _draw_any(count: int, generator: torch.Generator) -> Scenes:
    def pick(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    places = torch.rand(count, 9, generator=generator).argsort(dim=1)[:, :MAX_OBJECTS]
    columns = [pick(len(group), count, MAX_OBJECTS) for group in ATTRIBUTES[:4]]
    objects = torch.stack([*columns, places // 3, places % 3], dim=-1)
    number = torch.tensor([1, 2, 2, 2, 3, 3, 3])[pick(7, count)]
    objects = torch.where((torch.arange(MAX_OBJECTS) < number[:, None])[..., None], objects, -1)
    return Scenes(objects, torch.stack([pick(len(group), count) for group in BACKGROUND_ATTRIBUTES], dim=-1))


def _caption(objects: list[list[int]], background: list[int]) -> str:
    phrases = []
    for codes in objects:
        if codes[0] >= 0:
            words = [group[c] for group, c in zip(ATTRIBUTES, codes, strict=True)]
            phrases.append(" ".join(["a", *words]))
    gradient = " gradient" if background[1] else ""
    return ", ".join([*phrases, f"on a {BACKGROUND_ATTRIBUTES[0][background[0]]}{gradient} background"])


def _attributes(
    words: list[str], groups: tuple[tuple[str, ...], ...], defaults: tuple[str | None, ...], phrase: str
) -> list[int]:
    codes: list[int] = []
    known = {w for group in groups for w in group} | FILLERS
    for word in words:
        if word not in known:
            listed = "; ".join(", ".join(group) for group in groups)
            raise ValueError(f"Unknown word {word!r} in {phrase.strip()!r}. Known words here: {listed}.")
    for group, default in zip(groups, defaults, strict=True):
        named = [w for w in words if w in group] or ([default] if default else [])
        if len(named) != 1:
            found = "none" if not named else " and ".join(named)
            raise ValueError(f"{phrase.strip()!r} needs exactly one of {', '.join(group)}; found {found}.")
        codes.append(group.index(named[0]))
    return codes


def _mix(value: torch.Tensor) -> torch.Tensor:
    """Scramble non-negative int64 values into 0..2^31-1; products stay below 2^63."""
    for factor in (0x045D9F3B, 0x119DE1F3):
        value = value & 0x7FFFFFFF
        value = ((value ^ (value >> 15)) * factor) & 0x7FFFFFFF
    return value ^ (value >> 16)


def _background(codes: torch.Tensor) -> torch.Tensor:
    colour = torch.tensor(list(BACKGROUNDS.values()))[codes[:, 0], :, None, None]
    down = torch.linspace(0.35, -0.35, SIZE)[None, None, :, None] * codes[:, 1, None, None, None]
    goal = (down > 0).float()
    return torch.lerp(colour, goal, down.abs()).expand(-1, -1, -1, SIZE)


def distance(shape: str, dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Signed distance in pixels (exact or a lower bound), negative inside; ``dx``, ``dy`` broadcast to ``[N, H, W]``."""
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


def shade(texture: str, dx: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Brightness of a textured object, ``[N, H, W]`` or broadcastable; the pattern is fixed to the object's centre."""
    if texture == "plain":
        return torch.ones_like(dx[:, :1, :1])
    period = _TEXTURE_PERIOD[texture]
    turn = 2 * torch.pi / period
    if texture == "striped":
        ink = (0.5 + (dy * turn).sin() / turn).clamp(0, 1)
    elif texture == "checkered":
        ink = (0.5 + (dx * turn).sin() * (dy * turn).sin() * 1.5 / turn).clamp(0, 1)
    else:
        cell_x, cell_y = (torch.remainder(d + period / 2, period) - period / 2 for d in (dx, dy))
        ink = (0.5 + 2.2 - (cell_x.square() + cell_y.square()).sqrt()).clamp(0, 1)
    return 1 - (1 - _SHADE) * ink
