"""Captioned scenes: the world the demo models are trained on, as a grammar. ``renderer`` draws them.

A scene is one to four objects on a background, for example
``a large red striped circle top left, a small blue square bottom right marked k, on a grey marbled background``. In a
clip there are at most three, without letters, and they move: ``a small green star top left moving rightward fast``.
Objects named later lie in front. Everything is a table of integers first (``Scenes``), so captions, token ids and
pictures of a whole batch come from the same codes. Only torch is imported.

What a caption leaves open is drawn at random: the words it omits, and always the exact places, the angle and phase of
textures, and the waves of a background. ``difficulty`` tells easy captions (at most two plain objects, nothing omitted)
from hard ones.
"""

from __future__ import annotations

import dataclasses
import enum
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
PACES = {"slowly": 4 / 3, "fast": 8 / 3}  # pixels a frame: half a token and a token of wan-mini in its three frames
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


class Column(enum.IntEnum):
    """Where an attribute stands in ``Scenes.objects``."""

    SIZE = 0
    COLOUR = 1
    TEXTURE = 2
    SHAPE = 3
    ROW = 4
    COLUMN = 5
    LETTER = 6
    MOTION = 7
    PACE = 8


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
        return self.objects[:, :, Column.SHAPE] >= 0

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
        plain = (objects[..., Column.TEXTURE] == 0) & (objects[..., Column.LETTER] == 0) & (objects >= 0).all(-1)
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


def captions(split: str, count: int, seed: int, moving: bool = False, difficulty: str | None = None) -> list[str]:
    """``count`` captions, see ``draw``; the same for the same seed."""
    return draw(count, torch.Generator().manual_seed(seed), split, moving, difficulty).said.captions()


def parse(text: str, moving: bool = False) -> Scenes:
    """Read one caption into a batch of one.

    Phrases are separated by commas; a phrase with the word ``background`` describes the background, every other one an
    object. Word order inside a phrase is free. Every word but the shape may be left out and is then open; a letter or a
    motion that is not named is not there.

    Args:
        text: The caption.
        moving: Whether it is that of a clip: objects may move, and have no letters.

    Raises:
        ValueError: An unknown word, a doubled attribute, a missing shape, a pace without a direction, ``marked`` without a
            letter, a second background, no object, or too many.
    """
    absent = ("letter",) if moving else ("motion", "pace")
    groups = {name: words for name, words in ATTRIBUTES.items() if name not in absent}
    objects: list[list[int]] = []
    backgrounds: list[list[int]] = []
    for phrase in text.lower().split(","):
        words = re.findall(r"[^\s.;]+", phrase)
        if "background" in words:
            backgrounds.append(list(_codes(words, BACKGROUND_ATTRIBUTES, phrase).values()))
        elif words:
            objects.append(_object(words, groups, phrase))
    most = MAX_OBJECTS - 1 if moving else MAX_OBJECTS
    if not 1 <= len(objects) <= most:
        raise ValueError(f"A caption names 1 to {most} objects separated by commas, found {len(objects)}: {text!r}")
    if len(backgrounds) > 1:
        raise ValueError(f"A caption names at most one background, found {len(backgrounds)}: {text!r}")
    objects += [[OPEN] * len(ATTRIBUTES)] * (MAX_OBJECTS - len(objects))
    return Scenes(torch.tensor([objects]), torch.tensor(backgrounds or [[OPEN] * len(BACKGROUND_ATTRIBUTES)]))


def difficulty(text: str, moving: bool = False) -> str:
    """One of ``DIFFICULTIES`` for one caption."""
    return DIFFICULTIES[int(parse(text, moving).difficulties()[0])]


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
    objects = torch.stack([columns[name] for name in ATTRIBUTES], dim=-1)
    objects = torch.where((torch.arange(MAX_OBJECTS) < number[:, None])[..., None], objects, OPEN)
    fill = torch.where(hard, pick([1, 2, 3, 3], count), pick([1, 1], count))
    background = torch.stack([pick([1.0] * len(BACKGROUNDS), count), fill], dim=-1)

    omitted = torch.rand(*each, 4, generator=generator) < torch.tensor([0.25, 0.2, 0.3, 0.2])
    omitted &= per_object[..., None]
    mask = torch.zeros(objects.shape, dtype=torch.bool)
    mask[..., [Column.SIZE, Column.COLOUR, Column.TEXTURE]] = omitted[..., :3]
    mask[..., [Column.ROW, Column.COLUMN]] = omitted[..., 3:]
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
        if codes[Column.SHAPE] >= 0:
            words = {name: group[c] for (name, group), c in zip(ATTRIBUTES.items(), codes, strict=True) if c >= 0}
            letter, motion, pace = words.pop("letter"), words.pop("motion"), words.pop("pace")
            marked = [] if letter in UNSAID else ["marked", letter]
            moves = [] if motion in UNSAID else ["moving", motion, pace]
            phrases.append(" ".join(["a", *words.values(), *marked, *moves]))
    named = [group[c] for group, c in zip(BACKGROUND_ATTRIBUTES.values(), background, strict=True) if c >= 0]
    if named:
        phrases.append(" ".join(["on a", *named, "background"]))
    return ", ".join(phrases)


def _object(words: list[str], groups: dict[str, tuple[str, ...]], phrase: str) -> list[int]:
    """The codes of one object, in the order of ``ATTRIBUTES``."""
    codes = _codes(words, groups, phrase)
    if codes["shape"] == OPEN:
        raise ValueError(f"{phrase.strip()!r} needs exactly one of {', '.join(SHAPES)}; found none.")
    if "marked" in words and codes.get("letter", OPEN) == OPEN:
        raise ValueError(f"{phrase.strip()!r} is marked with none of {', '.join(LETTERS[1:])}.")
    motion, pace = (codes.get(name, OPEN) for name in ("motion", "pace"))
    if motion <= 0 and (pace != OPEN or ("moving" in words and motion == OPEN)):
        raise ValueError(f"{phrase.strip()!r} needs a direction: one of {', '.join(list(MOTIONS)[1:])}.")
    for name in ("letter", "motion", "pace"):
        codes[name] = max(codes.get(name, OPEN), 0)
    return [codes[name] for name in ATTRIBUTES]


def _codes(words: list[str], groups: dict[str, tuple[str, ...]], phrase: str) -> dict[str, int]:
    """The code of each attribute that the words name, ``OPEN`` for the others."""
    known = {w for group in groups.values() for w in group} | FILLERS
    for word in words:
        if word not in known:
            listed = "; ".join(", ".join(group) for group in groups.values())
            raise ValueError(f"Unknown word {word!r} in {phrase.strip()!r}. Known words here: {listed}.")
    codes: dict[str, int] = {}
    for name, group in groups.items():
        named = [w for w in words if w in group]
        if len(named) > 1:
            raise ValueError(f"{phrase.strip()!r} needs exactly one of {', '.join(group)}; found {' and '.join(named)}.")
        codes[name] = group.index(named[0]) if named else OPEN
    return codes


def _mix(value: torch.Tensor) -> torch.Tensor:
    """Scramble non-negative int64 values into 0..2^31-1; products stay below 2^63."""
    for factor in (0x045D9F3B, 0x119DE1F3):
        value = value & 0x7FFFFFFF
        value = ((value ^ (value >> 15)) * factor) & 0x7FFFFFFF
    return value ^ (value >> 16)
