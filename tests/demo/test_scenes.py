"""The grammar, its splits and the renderer: deterministic, disjoint, and things where the caption puts them."""

import pytest
import torch

from demo import renderer, scenes

BOTH = pytest.mark.parametrize("moving", [False, True], ids=["pictures", "clips"])


def code(group, word):
    return scenes.ATTRIBUTES[group].index(word)


@BOTH
def test_captions_same_seed_are_the_same_and_parse_back(moving):
    texts = scenes.captions("train", 80, 4, moving)
    assert texts == scenes.captions("train", 80, 4, moving)
    assert texts != scenes.captions("train", 80, 5, moving)
    for text in texts:
        assert scenes.parse(text, moving).captions() == [text]


@BOTH
def test_splits_are_disjoint_whatever_the_order_of_the_objects(moving):
    drawn = scenes.draw(300, torch.Generator().manual_seed(0), "test", moving)
    assert (drawn.said.splits() == 2).all()
    shuffled = scenes.Scenes(drawn.said.objects.flip(1), drawn.said.background)
    assert (shuffled.splits() == 2).all()
    texts = {split: set(scenes.captions(split, 300, 1, moving)) for split in scenes.SPLITS}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]


def test_splits_hold_the_shares_they_promise():
    drawn = scenes._draw_any(20_000, torch.Generator().manual_seed(3), False, None)
    shares = drawn.said.splits().bincount() / 20_000
    assert shares.tolist() == pytest.approx([0.9, 0.05, 0.05], abs=0.01)


@BOTH
@pytest.mark.parametrize("difficulty", scenes.DIFFICULTIES)
def test_draw_gives_the_difficulty_asked_for_and_text_alone_tells_it(difficulty, moving):
    texts = scenes.captions("validation", 60, 2, moving, difficulty)
    assert {scenes.difficulty(text, moving) for text in texts} == {difficulty}


def test_hard_captions_hold_what_makes_them_hard_and_easy_ones_none_of_it():
    hard = " ".join(scenes.captions("validation", 200, 0, False, "hard"))
    easy = " ".join(scenes.captions("validation", 200, 0, False, "easy"))
    for word in ("striped", "dotted", "checkered", "rippled", "marbled", "marked"):
        assert word in hard
        assert word not in easy
    said = scenes.draw(400, torch.Generator().manual_seed(0), "validation", False, "hard").said
    present = said.objects[said.present]
    for column in (0, 1, 2, 4):  # size, colour, texture, row
        assert 0.1 < (present[:, column] == scenes.OPEN).float().mean() < 0.4


@BOTH
def test_draw_objects_of_a_scene_differ_in_colour_and_place_and_nothing_is_open(moving):
    drawn = scenes.draw(200, torch.Generator().manual_seed(1), moving=moving).scenes
    for objects in drawn.objects:
        present = objects[objects[:, 3] >= 0]
        assert (present >= 0).all()
        assert len(set(present[:, 1].tolist())) == len(present)
        assert len({tuple(place) for place in present[:, 4:6].tolist()}) == len(present)


def test_tokens_a_phrase_a_row_and_nothing_where_a_word_is_open():
    tokens = scenes.parse("a small blue square marked k, on a navy background").tokens()[0]
    words = [[scenes.VOCABULARY[i] for i in row] for row in tokens.tolist()]
    pad = scenes.PAD
    assert words[0] == ["small", "blue", pad, "square", pad, pad, "k", "still", "slowly"]
    assert {word for row in words[1:4] for word in row} == {pad}
    assert words[4] == ["navy", *[pad] * 8]


def test_parse_free_word_order_and_words_left_open():
    assert scenes.parse("circle red").captions() == ["a red circle"]
    assert scenes.parse("Top left: a star".replace(":", "") + " in green").captions() == ["a green star top left"]
    assert scenes.parse("star moving upward fast", True).captions() == ["a star moving upward fast"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a large mauve plain circle top left", "Unknown word 'mauve'.*red, orange"),
        ("a large red blue circle top left", "exactly one of red.*red and blue"),
        ("a large red thing top left", "Unknown word 'thing'"),
        ("a large red top left", "exactly one of circle.*found none"),
        ("on a white background", "1 to 4 objects.*found 0"),
        (", ".join(["red circle"] * 5), "found 5"),
        ("a red circle moving upward", "Unknown word 'upward'"),
        ("a red circle marked", "marked with none of c, e"),
        ("a red circle, on a white background, on a black background", "at most one background, found 2"),
    ],
)
def test_parse_outside_the_grammar_names_the_word(text, message):
    with pytest.raises(ValueError, match=message):
        scenes.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a red circle moving fast", "needs a direction: one of leftward"),
        ("a red circle still fast", "needs a direction"),
        ("a red circle slowly", "needs a direction"),
        ("a red circle marked k", "Unknown word 'k'"),
        (", ".join(["red circle"] * 4), "1 to 3 objects.*found 4"),
    ],
)
def test_parse_of_clips_outside_the_grammar_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        scenes.parse(text, True)


@pytest.mark.parametrize("size", [64, 72])
def test_render_puts_colours_at_their_places(size):
    scene = scenes.parse("a large red plain circle top left, a small blue plain square bottom right, on a grey flat background")
    picture = renderer.render(scene, size=size)[0]
    assert picture.shape == (3, size, size)
    first, last, middle = (at + (size - 64) // 2 for at in (16, 48, 32))
    assert torch.allclose(picture[:, first, first], torch.tensor(scenes.COLOURS["red"]))
    assert torch.allclose(picture[:, last, last], torch.tensor(scenes.COLOURS["blue"]))
    assert torch.allclose(picture[:, middle, middle], torch.tensor(scenes.BACKGROUNDS["grey"][0]))


def test_render_later_objects_lie_in_front():
    front = "a large {} plain square middle left, a large {} plain square middle center, on a white flat background"
    for first, second in (("red", "blue"), ("blue", "red")):
        picture = renderer.render(scenes.parse(front.format(first, second)))[0]
        assert torch.allclose(picture[:, 32, 24], torch.tensor(scenes.COLOURS[second]))


@pytest.mark.parametrize("letter", scenes.LETTERS[1:])
def test_render_letters_differ_from_each_other_and_from_none(letter):
    def drawn(mark):
        return renderer.render(scenes.parse(f"a large red plain square middle center {mark}, on a white flat background"))

    others = [drawn("")] + [drawn(f"marked {other}") for other in scenes.LETTERS[1:] if other != letter]
    assert all((drawn(f"marked {letter}") - other).abs().sum() > 10 for other in others)


@pytest.mark.parametrize("word", ["striped", "dotted", "checkered"])
def test_render_textures_turn_and_shift_from_one_drawing_to_the_next(word):
    scene = scenes.parse(f"a large red {word} square middle center, on a white flat background")
    generator = torch.Generator().manual_seed(0)
    inside = [renderer.render(scene, generator)[0, 0, 26:38, 26:38] for _ in range(2)]
    red, dark = scenes.COLOURS["red"][0], scenes.COLOURS["red"][0] * renderer.SHADE
    assert not torch.equal(*inside)
    for patch in inside:
        assert patch.max() == pytest.approx(red, abs=0.05)
        assert patch.min() == pytest.approx(dark, abs=0.05)


@pytest.mark.parametrize("fill", ["rippled", "marbled"])
def test_render_backgrounds_mix_both_tones_anew_each_time(fill):
    scene = scenes.parse(f"a small red plain circle top left, on a beige {fill} background")
    generator = torch.Generator().manual_seed(0)
    first, second = (renderer.render(scene, generator)[0, :, 40:] for _ in range(2))
    assert (first - second).abs().mean() > 0.05
    for tone in scenes.BACKGROUNDS["beige"]:
        near = (first - torch.tensor(tone)[:, None, None]).abs().amax(0) < 0.02
        assert near.float().mean() > 0.1


@pytest.mark.parametrize(("motion", "direction"), list(scenes.MOTIONS.items())[1:])
@pytest.mark.parametrize(("pace", "pixels"), scenes.PACES.items())
def test_render_clips_objects_move_as_told(motion, direction, pace, pixels):
    text = f"a small red plain square middle center moving {motion} {pace}, on a white flat background"
    clip = renderer.render_clips(scenes.parse(text, True))[0]
    assert clip.shape == (scenes.FRAMES, 3, scenes.SIZE, scenes.SIZE)
    red = 1 - clip[:, 1] / 0.96  # green is missing where the square is
    axis = torch.arange(scenes.SIZE) + 0.5
    total = red.clamp(0, 1).sum((1, 2))
    centre = torch.stack([(red.sum(2) @ axis) / total, (red.sum(1) @ axis) / total], dim=1)
    steps = centre[:7].diff(dim=0)  # later the fast ones touch the edge
    assert torch.allclose(steps, torch.tensor(direction) * pixels, atol=0.4)


def test_render_clips_without_motion_stand_still():
    clip = renderer.render_clips(scenes.parse("a small red dotted square middle center, on a white flat background", True))[0]
    assert torch.equal(clip, clip[:1].expand_as(clip))


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_distance_is_negative_inside_and_bounded_by_the_radius(shape):
    axis = torch.arange(scenes.SIZE) - 31.5
    distance = renderer.distance(shape, axis[None, None, :], axis[None, :, None], torch.tensor(12.0))[0]
    inside = distance < 0
    assert inside.any()
    reach = (axis[None, :] ** 2 + axis[:, None] ** 2).sqrt()[inside].max()
    assert 10 < reach < 16
