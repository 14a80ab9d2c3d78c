"""The detector against renders whose content is known: what is there is seen, what is not is refused."""

import pytest
import torch

from demo import detector, renderer, scenes

SEEN = 0.95  # share of real renders that are judged right


@pytest.mark.parametrize("moving", [False, True], ids=["pictures", "clips"])
@pytest.mark.parametrize("difficulty", scenes.DIFFICULTIES)
def test_judge_accepts_renders_and_rejects_other_captions(difficulty, moving):
    generator = torch.Generator().manual_seed(2)
    drawn = scenes.draw(40, generator, "validation", moving, difficulty)
    pictures = renderer.render_clips(drawn.scenes, generator) if moving else renderer.render(drawn.scenes, generator)
    texts = drawn.said.captions()
    right = [detector.judge(p, t).right for p, t in zip(pictures, texts, strict=True)]
    assert sum(right) / len(right) >= SEEN
    assert not any(detector.judge(p, t).right for p, t in zip(pictures, texts[1:] + texts[:1], strict=True))


RED = "a large red striped circle top left, on a white flat background"


def picture(text):
    return renderer.render(scenes.parse(text))[0]


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("a large red striped square top left", "shape"),
        ("a large red striped circle bottom left", "place"),
        ("a large blue striped circle top left", "colour"),
    ],
)
def test_judge_names_the_wrong_attribute(caption, wrong):
    (found,) = detector.judge(picture(RED), caption).objects
    assert [name for name, right in found.items() if not right] == [wrong]


def test_judge_names_what_is_missing_altogether():
    verdict = detector.judge(picture(RED), "a large red striped circle top left, a blue star")
    assert all(verdict.objects[0].values())
    assert not any(verdict.objects[1].values())


def test_judge_words_left_open_are_right_whatever_is_there():
    assert detector.judge(picture(RED), "a circle").right
    assert detector.judge(picture(RED), "a circle top left").right
    assert not detector.judge(picture(RED), "a square").right


def test_judge_either_half_of_a_place_may_be_left_open():
    for word, right in (("top", True), ("left", True), ("right", False), ("bottom", False)):
        assert detector.judge(picture(RED), f"a circle {word}").right == right, word


def test_judge_finds_the_assignment_that_makes_all_right():
    two = picture("a large red plain circle top left, a large blue plain circle bottom right, on a white flat background")
    assert detector.judge(two, "a circle, a circle top left").right
    assert detector.judge(two, "a circle, a circle bottom right").right
    assert not detector.judge(two, "a circle, a circle top right").right


def test_judge_rejects_a_second_object_of_the_same_colour():
    text = "a large red plain circle top left, a large red plain {}, on a white flat background"
    for other in ("star bottom right", "square middle right", "circle bottom center"):
        verdict = detector.judge(picture(text.format(other)), "a large red plain circle top left, on a white flat background")
        assert all(verdict.objects[0].values())
        assert not verdict.nothing_else


def test_judge_rejects_what_the_caption_does_not_name_and_another_background():
    two = picture("a large red plain circle top left, a small blue plain star bottom right, on a white flat background")
    verdict = detector.judge(two, "a large red plain circle top left")
    assert all(verdict.objects[0].values())
    assert not verdict.nothing_else
    assert not detector.judge(picture(RED), "a large red circle top left, on a navy background").background


@pytest.mark.parametrize("motion", ["leftward", "upward", "still"])
def test_judge_a_clip_that_moves_another_way_is_wrong(motion):
    text = "a large red plain square middle center moving {}, on a white flat background"
    clip = renderer.render_clips(scenes.parse(text.format("rightward fast"), True))[0]
    assert detector.judge(clip, text.format("rightward fast")).right
    (found,) = detector.judge(clip, text.format(motion)).objects
    assert not found["motion"]
    (slower,) = detector.judge(clip, text.format("rightward slowly")).objects
    assert not slower["motion"]


def broken_clips():
    """A clip that is right, and ones that show what it shows only in their first and last frame."""
    text = "a large red plain {} middle left moving rightward fast, on a white flat background"
    square, circle = (renderer.render_clips(scenes.parse(text.format(shape), True))[0] for shape in ("square", "circle"))
    star = renderer.render_clips(scenes.parse("a large blue plain star top right, on a white flat background", True))[0]
    noise = torch.rand(square.shape, generator=torch.Generator().manual_seed(0))
    ends = torch.zeros(scenes.FRAMES, 1, 1, 1, dtype=torch.bool)
    ends[[0, -1]] = True
    jumping = square[[0] * (scenes.FRAMES - 1) + [-1]]
    visited = square.clone()
    visited[-1] = torch.minimum(square[-1], star[-1])
    return text.format("square"), square, {
        "noise between": torch.where(ends, square, noise),
        "stands, then jumps": jumping,
        "turns into a circle": torch.cat([square[:1], circle[1:]]),
        "another object at the end": visited,
    }  # fmt: skip


def test_judge_a_clip_has_to_be_right_all_the_time():
    text, right, wrong = broken_clips()
    assert detector.judge(right, text).right
    for name, clip in wrong.items():
        assert not detector.judge(clip, text).right, name
