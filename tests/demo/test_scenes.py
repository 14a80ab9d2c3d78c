"""The grammar, its splits and the renderer: deterministic, disjoint, and things where the caption puts them."""

import pytest
import torch

from demo import detector, scenes


def test_captions_same_seed_are_the_same_and_parse_back():
    texts = scenes.captions(50, seed=4, split="train")
    assert texts == scenes.captions(50, seed=4, split="train")
    assert texts != scenes.captions(50, seed=5, split="train")
    for text in texts:
        assert scenes.parse(text).captions() == [text]


def test_splits_are_disjoint_whatever_the_order_of_the_objects():
    drawn = scenes.draw(300, torch.Generator().manual_seed(0), "test")
    assert (drawn.splits() == 2).all()
    shuffled = scenes.Scenes(drawn.objects.flip(1), drawn.background)
    assert (shuffled.splits() == 2).all()
    texts = {split: set(scenes.captions(300, 1, split)) for split in scenes.SPLITS}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]


def test_tokens_every_attribute_has_its_own_place():
    tokens = scenes.parse("a small blue plain square bottom right, on a navy gradient background").tokens()[0]
    words = [scenes.VOCABULARY[i] for i in tokens]
    assert words[:6] == ["small", "blue", "plain", "square", "bottom", "right"]
    assert set(words[6:18]) == {scenes.PAD}
    assert words[18:] == ["navy", "gradient"]


def test_parse_free_word_order_and_defaults():
    full = "a large red plain circle middle center, on a white background"
    assert scenes.parse("circle, red".replace(",", "")).captions() == [full]
    assert scenes.parse("Top left: a star".replace(":", "") + " in green").captions()[0].startswith("a large green plain star")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a large mauve plain circle top left", "Unknown word 'mauve'.*red, orange"),
        ("a large red blue circle top left", "exactly one of red.*red and blue"),
        ("a large red thing top left", "Unknown word 'thing'"),
        ("a large red top left", "exactly one of circle.*found none"),
        ("on a white background", "1 to 3 objects.*found 0"),
        ("red circle, red circle, red circle, red circle", "found 4"),
    ],
)
def test_parse_outside_the_grammar_names_the_word(text, message):
    with pytest.raises(ValueError, match=message):
        scenes.parse(text)


def test_render_puts_colours_at_their_places():
    scene = scenes.parse("a large red plain circle top left, a small blue plain square bottom right, on a grey background")
    picture = scenes.render(scene)[0]
    assert picture.shape == (3, scenes.SIZE, scenes.SIZE)
    assert torch.allclose(picture[:, 15, 15], torch.tensor(scenes.COLOURS["red"]))
    assert torch.allclose(picture[:, 49, 49], torch.tensor(scenes.COLOURS["blue"]))
    assert torch.allclose(picture[:, 32, 32], torch.tensor(scenes.BACKGROUNDS["grey"]))


def test_render_later_objects_lie_in_front():
    front = "a large {} plain square middle left, a large {} plain square middle center"
    for first, second in (("red", "blue"), ("blue", "red")):
        picture = scenes.render(scenes.parse(front.format(first, second)))[0]
        assert torch.allclose(picture[:, 32, 24], torch.tensor(scenes.COLOURS[second]))


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_distance_is_negative_inside_and_bounded_by_the_radius(shape):
    axis = torch.arange(scenes.SIZE) - 31.5
    distance = scenes.distance(shape, axis[None, None, :], axis[None, :, None], torch.tensor(12.0))[0]
    inside = distance < 0
    assert inside.any()
    reach = (axis[None, :] ** 2 + axis[:, None] ** 2).sqrt()[inside].max()
    assert 10 < reach < 16


def test_detector_accepts_renders_and_rejects_other_captions():
    generator = torch.Generator().manual_seed(2)
    drawn = scenes.draw(12, generator, "test")
    pictures, texts = scenes.render(drawn, generator), drawn.captions()
    assert all(detector.judge(p, t).right for p, t in zip(pictures, texts, strict=True))
    assert not any(detector.judge(p, t).right for p, t in zip(pictures, texts[1:] + texts[:1], strict=True))


def test_detector_names_the_wrong_attribute():
    picture = scenes.render(scenes.parse("a large red striped circle top left"))[0]
    found = detector.judge(picture, "a large red striped square top left")
    assert found.objects == ({"size": True, "colour": True, "texture": True, "shape": False},)
    nothing = detector.judge(picture, "a large red striped circle bottom right")
    assert not any(nothing.objects[0].values())


def test_detector_rejects_what_the_caption_does_not_name():
    picture = scenes.render(scenes.parse("a large red striped circle top left, a small blue plain star bottom right"))[0]
    verdict = detector.judge(picture, "a large red striped circle top left")
    assert all(verdict.objects[0].values())
    assert not verdict.background
