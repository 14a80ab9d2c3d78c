"""Rewards: what they are worth by hand, what they decode, and what they say when something does not fit."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import comfy.clip_vision
import comfy.sd
import pytest
import torch
from comfy import sd1_clip, sdxl_clip
from comfy.nested_tensor import NestedTensor
from comfy.text_encoders import sd3_clip
from PIL import Image
from torch import Tensor

from blockdance_core.host import rewards
from blockdance_core.host.rewards import ClipScore, Combined, Fidelity, FromFunction, ImageReward, Similarity, by_name
from blockdance_core.metrics import ssim

WIDTH = 32
TEXTS = ("a red fox", "")


class Decoder:
    """Latents [B, 3, ...] in 0..1 are the pictures; counts how often it decodes."""

    def __init__(self) -> None:
        self.calls = 0

    def decode(self, latents: Tensor) -> Tensor:
        self.calls += 1
        return latents.movedim(1, -1)


def two(shape: tuple[int, ...] = (2, 3, 16, 16)) -> tuple[Tensor, Tensor]:
    """Results and the full run's, 0..1."""
    full = torch.rand(shape)
    return (full + 0.1 * torch.randn(shape)).clamp(0, 1), full


def initialised(model: Any) -> Any:
    """The host leaves weights as they happen to lie in memory."""
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model


def clip_of(model: Any, tokenizer: Any, widths: dict[str, int], **params: Any) -> Any:
    """A tiny CLIP of the host."""
    config = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    options = {f"{name}_model_config": {**config, "hidden_size": width} for name, width in widths.items()}
    clip = comfy.sd.CLIP(SimpleNamespace(params=params, clip=model, tokenizer=tokenizer), model_options=options)
    initialised(clip.cond_stage_model)
    return clip


def small_clip() -> Any:
    """CLIP-L, as of SD1."""
    return clip_of(sd1_clip.SD1ClipModel, sd1_clip.SD1Tokenizer, {"clip_l": WIDTH})


def vision(model_type: str = "clip_vision_model", **more: Any) -> Any:
    """A tiny CLIP vision model of the host."""
    config = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8,
        "hidden_act": "quick_gelu", "patch_size": 4, "num_channels": 3, "model_type": model_type, **more,
    }
    with tempfile.TemporaryDirectory() as folder:  # older hosts want a file
        path = Path(folder, "config.json")
        path.write_text(json.dumps(config), encoding="utf-8")
        model = comfy.clip_vision.ClipVisionModel(str(path))
    initialised(model.model)
    return model


def cosine(one: Tensor, other: Tensor) -> Tensor:
    one, other = one.double(), other.double()
    return (one * other).sum(-1) / one.norm(dim=-1) / other.norm(dim=-1)


def test_fidelity_is_one_where_nothing_changed_and_half_at_a_tenth_of_the_variance() -> None:
    full = torch.tensor([[0.0, 2.0], [0.0, 2.0], [0.0, 2.0]]).view(3, 1, 1, 2)  # the variance is 2
    shift = torch.tensor([0.0, 0.2**0.5, 1.8**0.5]).view(3, 1, 1, 1)
    quality = Fidelity()(full + shift, full, ("", "", ""))
    assert quality.dtype is torch.float64
    torch.testing.assert_close(quality, torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 4, 3, 8, 8), (2, 4, 30)])
def test_fidelity_falls_with_noise(shape: tuple[int, ...]) -> None:
    full, noise = torch.randn(shape), torch.randn(shape)
    found = torch.stack([Fidelity()(full + level * noise, full, TEXTS) for level in (0, 0.01, 0.1, 1, 100)])
    assert (found.diff(dim=0) < 0).all()
    assert (found > 0).all()


def test_fidelity_of_what_is_lost_is_nought_and_of_a_constant_that_did_not_change_one() -> None:
    full = torch.randn(5, 4, 8, 8)
    full[3:] = 1.0
    results = full.clone()
    results[0, 0, 0, 0] = torch.nan
    results[1, 0, 0, 0] = torch.inf
    results[4] = 2.0
    assert Fidelity()(results, full, [""] * 5).tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]


def test_what_rewards_return_can_be_in_a_loss_although_the_host_is_asked_in_inference_mode() -> None:
    results, full = two()
    modes: list[bool] = []

    def judge(pictures: Tensor, texts: Any) -> Tensor:
        modes.append(torch.is_inference_mode_enabled())
        return pictures.mean((1, 2, 3))

    quality = FromFunction(judge, Decoder(), "mine")(results, full, TEXTS)
    assert modes == [True]
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (weight * quality).sum().backward()
    torch.testing.assert_close(weight.grad, quality)


def test_similarity_is_ssim_of_the_pictures() -> None:
    results, full = two()
    expected = ssim(results.movedim(1, -1), full.movedim(1, -1))
    torch.testing.assert_close(Similarity(Decoder())(results, full, TEXTS), expected)
    torch.testing.assert_close(Similarity(Decoder())(full, full.clone(), TEXTS), torch.ones(2, dtype=torch.float64))


def test_similarity_of_a_clip_is_the_mean_of_its_frames() -> None:
    results, full = two((2, 3, 5, 16, 16))
    expected = sum(ssim(results[:, :, k].movedim(1, -1), full[:, :, k].movedim(1, -1)) for k in range(5)) / 5
    torch.testing.assert_close(Similarity(Decoder())(results, full, TEXTS), expected)


def test_of_nested_latents_the_pictures_count() -> None:
    results, full = two((2, 3, 5, 16, 16))
    pair = NestedTensor([results, torch.randn(2, 8, 30)]), NestedTensor([full, torch.randn(2, 8, 30)])
    for reward in (Fidelity(), Similarity(Decoder())):
        torch.testing.assert_close(reward(*pair, TEXTS), reward(results, full, TEXTS))


def test_clip_score_is_the_cosine_of_projected_embeddings() -> None:
    clip, clip_vision = small_clip(), vision(projection_dim=WIDTH)
    results, full = two()
    reward = ClipScore(Decoder(), clip, clip_vision)
    quality = reward(results, full, TEXTS)
    images = clip_vision.encode_image(results.movedim(1, -1)).image_embeds
    pooled = torch.cat([clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)[1] for text in TEXTS])
    projected = pooled @ clip.cond_stage_model.clip_l.transformer.text_projection.weight.float().T
    torch.testing.assert_close(quality, cosine(images, projected), rtol=1e-4, atol=1e-5)
    assert (quality - cosine(images, pooled)).abs().max() > 1e-3  # what an SD1 CLIP gives by itself
    assert clip.cond_stage_model.encode_token_weights(clip.tokenize("fox"))[1].shape == (1, WIDTH)  # the given one is as it was
    assert isinstance(clip.cond_stage_model, sd1_clip.SD1ClipModel)


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
@pytest.mark.parametrize("fitting", ["clip_l", "clip_g"])
def test_clip_score_takes_the_text_encoder_that_fits(kind: str, fitting: str) -> None:
    widths = {"clip_l": 16, "clip_g": 24}
    if kind == "sdxl":
        clip = clip_of(sdxl_clip.SDXLClipModel, sdxl_clip.SDXLTokenizer, widths)
    else:
        clip = clip_of(sd3_clip.SD3ClipModel, sdxl_clip.SDXLTokenizer, widths, t5=False)
        clip.tokenizer.t5xxl = None
        plain = clip.tokenizer.tokenize_with_weights
        clip.tokenizer.tokenize_with_weights = lambda *args, **kwargs: {**plain(*args, **kwargs), "t5xxl": []}
    clip_vision = vision(projection_dim=widths[fitting])
    results, full = two()
    quality = ClipScore(Decoder(), clip, clip_vision)(results, full, TEXTS)
    encoder = getattr(clip.cond_stage_model, fitting)
    encoder.reset_clip_options()
    encoder.set_clip_options({"projected_pooled": True})
    texts = torch.cat([encoder.encode_token_weights(clip.tokenize(text)[fitting[-1]])[1] for text in TEXTS])
    images = clip_vision.encode_image(results.movedim(1, -1)).image_embeds
    torch.testing.assert_close(quality, cosine(images, texts), rtol=1e-4, atol=1e-5)


def test_clip_score_of_a_clip_is_the_mean_of_eight_frames() -> None:
    results, full = two((2, 3, 15, 16, 16))
    reward = ClipScore(Decoder(), small_clip(), vision(projection_dim=WIDTH))
    expected = sum(reward(results[:, :, k], full[:, :, k], TEXTS) for k in range(0, 15, 2)) / 8
    torch.testing.assert_close(reward(results, full, TEXTS), expected, rtol=1e-4, atol=1e-5)


def test_clip_score_reads_each_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = small_clip()
    reward = ClipScore(Decoder(), clip, vision(projection_dim=WIDTH))
    read: list[str] = []
    tokenize = reward.clip.tokenize
    monkeypatch.setattr(reward.clip, "tokenize", lambda text: (read.append(text), tokenize(text))[1])
    for _ in range(2):
        reward(*two((3, 3, 16, 16)), ("a fox", "a goose", "a fox"))
    assert read == ["a fox", "a goose"]


def test_clip_score_says_which_models_fit() -> None:
    with pytest.raises(ValueError, match=r"embeddings of width 24, and the CLIP has clip_l with width 32\. .*CLIP-ViT-L-14"):
        ClipScore(Decoder(), small_clip(), vision(projection_dim=24))
    with pytest.raises(ValueError, match=r"siglip_vision_model\) has no projection .*CLIP-ViT-bigG-14"):
        ClipScore(Decoder(), small_clip(), vision("siglip_vision_model"))
    bare = SimpleNamespace(cond_stage_model=torch.nn.Module())
    with pytest.raises(ValueError, match=r"width 32, and the CLIP has no CLIP text encoder\. "):
        ClipScore(Decoder(), bare, vision(projection_dim=WIDTH))


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_clip_score_refuses_a_text_encoder_whose_projection_was_not_loaded(value: float) -> None:
    clip = small_clip()
    clip.cond_stage_model.clip_l.transformer.text_projection.weight.data.fill_(value)
    with pytest.raises(ValueError, match=r"clip_l has no text projection: text_projection\.weight was missing"):
        ClipScore(Decoder(), clip, vision(projection_dim=WIDTH))


class Scorer:
    """Mean of a picture in -0.5..0.5 plus the length of the prompt; for one picture a bare number, as the package gives."""

    def score(self, prompt: str, images: list[Image.Image]) -> Any:
        assert all(image.mode == "RGB" and image.size == (20, 16) for image in images)
        means = [sum(image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))) / 765 for image in images]
        scores = [mean - 0.5 + len(prompt) for mean in means]
        return scores if len(scores) > 1 else scores[0]


@pytest.mark.parametrize("frames", [None, 3])
def test_image_reward_is_the_logistic_function_of_its_score(monkeypatch: pytest.MonkeyPatch, frames: int | None) -> None:
    loaded: list[tuple[str, str]] = []
    package = ModuleType("ImageReward")
    package.load = lambda name, device: (loaded.append((name, device)), Scorer())[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    reward = ImageReward(Decoder())
    assert loaded == []
    results, full = two((2, 3, 16, 20) if frames is None else (2, 3, frames, 16, 20))
    quality = reward(results, full, ("", "yes"))
    means = results.double().mean((1, -2, -1)).view(2, -1)
    expected = (means - 0.5 + torch.tensor([[0], [3]])).sigmoid().mean(1)
    torch.testing.assert_close(quality, expected, rtol=0, atol=3e-3)  # 8 bits
    reward(results, full, ("", "yes"))
    assert loaded == [("ImageReward-v1.0", "cpu")]


def test_image_reward_without_its_weights_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    package = ModuleType("ImageReward")
    package.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    with pytest.raises(RuntimeError, match=r"cannot load its weights, 1\.8 GB .*: no network"):
        ImageReward(Decoder())(*two((2, 3, 16, 20)), ("", "yes"))


def test_image_reward_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(ImportError, match=r"pip install image-reward git\+https://github\.com/openai/CLIP\.git"):
        by_name("image-reward", vae := Decoder())
    assert vae.calls == 0


def test_a_function_gets_pictures_with_their_prompts() -> None:
    seen: list[tuple[tuple[int, ...], list[str]]] = []

    def judge(pictures: Tensor, texts: list[str]) -> list[float]:
        seen.append((tuple(pictures.shape), texts))
        return [float(picture.mean()) for picture in pictures]

    reward = FromFunction(judge, Decoder(), "bright")
    results, full = two()
    torch.testing.assert_close(reward(results, full, TEXTS).float(), results.mean((1, 2, 3)))
    clips, full = two((2, 3, 22, 16, 16))
    torch.testing.assert_close(reward(clips, full, TEXTS).float(), clips[:, :, ::3].mean((1, 2, 3, 4)))
    assert seen == [((2, 16, 16, 3), ["a red fox", ""]), ((16, 16, 16, 3), ["a red fox"] * 8 + [""] * 8)]


@pytest.mark.parametrize(("returned", "message"), [
    ([1.0], "The reward mine returned 1 numbers for 2 pictures, 1 of them finite"),
    ([1.0, float("nan")], "The reward mine returned 2 numbers for 2 pictures, 1 of them finite"),
])
def test_a_function_must_return_a_finite_number_for_each_picture(returned: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FromFunction(lambda pictures, texts: returned, Decoder(), "mine")(*two(), TEXTS)


def test_pictures_that_are_not_finite_are_black() -> None:
    results, full = two()
    results[0] = torch.nan
    assert FromFunction(lambda pictures, texts: pictures.amax((1, 2, 3)), Decoder(), "brightest")(results, full, TEXTS)[0] == 0


def test_combined_is_the_weighted_mean_and_decodes_once() -> None:
    class Mine:
        """A reward of somebody else."""

        name = "mine"

        def __call__(self, results: Tensor, full: Tensor, texts: Any) -> Tensor:
            return torch.tensor([0.25, 0.75])

    vae = Decoder()
    results, full = two()
    bright = FromFunction(lambda pictures, texts: pictures.mean((1, 2, 3)), vae, "bright")
    parts = [(0.5, Fidelity()), (1.5, Similarity(vae)), (1, bright), (1, Mine())]
    reward = Combined(parts)
    assert reward.name == "0.5 fidelity + 1.5 ssim + 1 bright + 1 mine"
    quality = reward(results, full, TEXTS)
    assert vae.calls == 2  # the results and the full run's
    expected = sum(weight * one(results, full, TEXTS).double() for weight, one in parts) / 4
    torch.testing.assert_close(quality, expected)
    vae.calls = 0
    Combined([(1, bright), (2, bright)])(results, full, TEXTS)
    assert vae.calls == 1  # nobody asked for the full run's


def test_combined_decodes_for_each_vae() -> None:
    vaes = Decoder(), Decoder()
    Combined([(1, Similarity(vae)) for vae in vaes])(*two(), TEXTS)
    assert [vae.calls for vae in vaes] == [2, 2]


def test_combined_wants_rewards_and_weights() -> None:
    with pytest.raises(ValueError, match="expected at least one reward, got none"):
        Combined([])
    for weight in (0, -1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"The weight of fidelity is .*: expected a positive, finite number"):
            Combined([(weight, Fidelity())])


def test_what_does_not_fit_together_is_named() -> None:
    results, full = two()
    with pytest.raises(ValueError, match=r"the full run's shape \(1, 3, 16, 16\), got \(2, 3, 16, 16\)"):
        Fidelity()(results, full[:1], TEXTS)
    with pytest.raises(ValueError, match="one text for each of 2 results, got 1"):
        Fidelity()(results, full, ("fox",))
    for wrong in (torch.zeros(2, 100, 2), torch.zeros(1, 16, 16, 3)):
        with pytest.raises(ValueError, match=r"The VAE decoded latents \(2, 3, 16, 16\) to .*Connect the VAE of the model"):
            Similarity(SimpleNamespace(decode=lambda latents, wrong=wrong: wrong))(results, full, TEXTS)


@pytest.mark.parametrize(("text", "name"), [
    ("fidelity", "fidelity"),
    (" Fidelity ", "fidelity"),
    ("0.3 ssim", "ssim"),
    ("clip", "clip"),
    ("fidelity + 0.5 clip", "1 fidelity + 0.5 clip"),
    ("0.7 fidelity + 0.3 ssim", "0.7 fidelity + 0.3 ssim"),
    ("0.7*fidelity+.3 * ssim", "0.7 fidelity + 0.3 ssim"),
    ("1e-1 ssim + 2 clip + fidelity", "0.1 ssim + 2 clip + 1 fidelity"),
])
def test_rewards_are_found_by_name(text: str, name: str) -> None:
    reward = by_name(text, Decoder(), small_clip() if "clip" in text else None, vision(projection_dim=WIDTH))
    assert reward.name == name
    quality = reward(*two(), TEXTS)
    assert quality.shape == (2,)
    assert by_name(name, Decoder(), small_clip(), vision(projection_dim=WIDTH)).name == name


def test_every_known_name_is_the_name_of_its_reward() -> None:
    found = [kind.name for kind in (Fidelity, Similarity, ClipScore, ImageReward)]
    assert found == list(rewards._KNOWN)


@pytest.mark.parametrize(("text", "message"), [
    ("beauty", r"Unknown reward 'beauty'\. Known: fidelity, ssim, clip, image-reward"),
    ("", r"Unknown reward ''\. Known: fidelity"),
    ("fidelity +", r"Unknown reward ''\. Known: fidelity"),
    ("0.5", r"Unknown reward '0\.5'"),
    ("fidelity ssim", r"The reward 'fidelity ssim' has no number in front of ssim: expected terms such as 0\.5 ssim"),
    ("fidelity - 0.5 ssim", r"has no number in front of ssim"),
    ("0 ssim", r"The weight of ssim is 0: expected a positive, finite number"),
    ("fidelity + -1 ssim", r"The weight of ssim is -1"),
    ("nan fidelity", r"The weight of fidelity is nan"),
    ("inf fidelity", r"The weight of fidelity is inf"),
    ("ssim", r"^ssim needs a VAE: connect a VAE\.$"),
    ("clip", r"^clip needs a VAE, a CLIP and a CLIP vision model: connect a VAE, a CLIP and a CLIP vision model\.$"),
    ("fidelity + image-reward", r"^image-reward needs a VAE: connect a VAE\.$"),
])
def test_what_cannot_be_found_by_name_is_explained(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_name(text)


def test_only_what_is_missing_is_to_be_connected() -> None:
    with pytest.raises(ValueError, match=r"a VAE, a CLIP and a CLIP vision model: connect a CLIP and a CLIP vision model\."):
        by_name("clip", Decoder())
