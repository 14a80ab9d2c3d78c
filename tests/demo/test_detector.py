"""The detector against renders whose content is known: what is there is seen, what is not is refused."""

import pytest
import torch

from demo import detector, scenes

SEEN = {("easy", False): 0.97, ("hard", False): 0.9, ("easy", True): 0.95, ("hard", True): 0.85}


@pytest.mark.parametrize("moving", [False, True], ids=["pictures", "clips"])
@pytest.mark.parametrize("difficulty", scenes.DIFFICULTIES)
def test_judge_accepts_renders_and_rejects_other_captions(difficulty, moving):
    generator = torch.Generator().manual_seed(2)
    drawn = scenes.draw(40, generator, "validation", moving, difficulty)
    pictures = scenes.render_clips(drawn.scenes, generator) if moving else scenes.render(drawn.scenes, generator)
    texts = drawn.said.captions()
    right = [detector.judge(p, t).right for p, t in zip(pictures, texts, strict=True)]
    assert sum(right) / len(right) >= SEEN[difficulty, moving]
    assert not any(detector.judge(p, t).right for p, t in zip(pictures, texts[1:] + texts[:1], strict=True))


RED = "a large red striped circle top left, on a white flat background"


def picture(text):
    return scenes.render(scenes.parse(text))[0]


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("a large red striped square top left", "shape"),
        ("a large red striped circle bottom left", "place"),
    ],
)
def test_judge_names_the_wrong_attribute(caption, wrong):
    (found,) = detector.judge(picture(RED), caption).objects
    assert [name for name, right in found.items() if not right] == [wrong]


def test_judge_an_object_of_another_colour_is_not_there():
    verdict = detector.judge(picture(RED), "a large blue striped circle top left")
    assert not any(verdict.objects[0].values())
    assert not verdict.nothing_else


def test_judge_words_left_open_are_right_whatever_is_there():
    assert detector.judge(picture(RED), "a circle").right
    assert detector.judge(picture(RED), "a circle top left").right
    assert not detector.judge(picture(RED), "a square").right


def test_judge_rejects_what_the_caption_does_not_name_and_another_background():
    two = picture("a large red plain circle top left, a small blue plain star bottom right, on a white flat background")
    verdict = detector.judge(two, "a large red plain circle top left")
    assert all(verdict.objects[0].values())
    assert not verdict.nothing_else
    assert not detector.judge(picture(RED), "a large red circle top left, on a navy background").background


@pytest.mark.parametrize("motion", ["leftward", "upward", "still"])
def test_judge_a_clip_that_moves_another_way_is_wrong(motion):
    text = "a large red plain square middle center moving {}, on a white flat background"
    clip = scenes.render_clips(scenes.parse(text.format("rightward fast"), True))[0]
    assert detector.judge(clip, text.format("rightward fast")).right
    (found,) = detector.judge(clip, text.format(motion)).objects
    assert not found["motion"]
    (slower,) = detector.judge(clip, text.format("rightward slowly")).objects
    assert not slower["motion"]
