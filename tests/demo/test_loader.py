"""sd3-mini through the host: its class, its size, and whether the pictures show what the captions say."""

import pytest
import torch

from demo import detector, loader, scenes

CAPTIONS = (
    "a large red plain circle top left, a small blue plain square bottom right, on a grey background",
    "a large green plain square middle center, on a white background",
    "a large yellow plain triangle bottom left, a large purple plain ring top right, on a black background",
    "a large cyan striped circle middle left, a large orange plain star middle right, on a navy background",
)


@pytest.fixture(scope="module")
def demo():
    return loader.load_demo()


@pytest.fixture(scope="module")
def pictures(demo):
    """One picture for each of CAPTIONS, `[B, 64, 64, 3]`: 30 Euler steps with guidance 3."""
    import comfy.sample

    latent = loader.empty_latent(demo, len(CAPTIONS))
    noise = comfy.sample.prepare_noise(latent, 1)
    positive, negative = demo.encode(CAPTIONS), demo.encode("")
    samples = comfy.sample.sample(
        demo.model, noise, 30, 3.0, "euler", "simple", positive, negative, latent, disable_pbar=True, seed=1
    )
    return demo.vae.decode(samples)


def test_load_demo_builds_the_hosts_own_classes(demo):
    import comfy.model_base
    import comfy.sd
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    model = demo
    assert type(model.model.model) is comfy.model_base.SD3
    assert type(model.model.model.diffusion_model) is OpenAISignatureMMDITWrapper
    assert len(model.model.model.diffusion_model.joint_blocks) >= 16
    assert type(model.vae) is comfy.sd.VAE
    assert (loader.FOLDER / "sd3-mini.safetensors").stat().st_size <= 20e6
    assert {"steps", "samples", "seed", "hardware"} <= model.metadata["training"].keys()


def test_load_demo_unknown_missing_or_damaged_is_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"Unknown demo model 'sd4'.*sd3-mini"):
        loader.load_demo("sd4")
    monkeypatch.setattr(loader, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"sd3-mini.safetensors"):
        loader.load_demo()
    (tmp_path / "sd3-mini.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match="damaged"):
        loader.load_demo()


def test_encode_shapes_and_unknown_word(demo):
    ((context, extra),) = demo.encode(CAPTIONS)
    assert context.shape == (len(CAPTIONS), scenes.TOKENS, 128)
    assert extra["pooled_output"].shape == (len(CAPTIONS), 128)
    assert not torch.equal(demo.encode("")[0][0], demo.encode(CAPTIONS[0])[0][0])
    with pytest.raises(ValueError, match="Unknown word 'dog'"):
        demo.encode("a large red dog top left")


def test_sampled_pictures_have_the_named_colours_at_the_named_places(pictures):
    assert pictures.shape == (len(CAPTIONS), 64, 64, 3)
    for image, caption in zip(pictures, CAPTIONS, strict=True):
        for _, colour, texture, shape, row, column in scenes.parse(caption).objects[0].tolist():
            if colour >= 0 and scenes.TEXTURES[texture] == "plain" and scenes.SHAPES[shape] != "ring":
                y, x = (int(scenes.CENTRES[i]) for i in (row, column))
                seen = image[y - 1 : y + 3, x - 1 : x + 3].mean((0, 1))
                near = (torch.tensor(list(scenes.COLOURS.values())) - seen).square().sum(1).argmin()
                assert near == colour, caption


def test_sampled_pictures_show_what_the_captions_say(pictures):
    verdicts = [detector.judge(image.permute(2, 0, 1), c) for image, c in zip(pictures, CAPTIONS, strict=True)]
    wrong = [(c, v) for c, v in zip(CAPTIONS, verdicts, strict=True) if not v.right]
    assert not wrong


def test_vae_round_trip_through_the_hosts_nodes(demo):
    from nodes import VAEDecode, VAEEncode

    generator = torch.Generator().manual_seed(3)
    image = scenes.render(scenes.draw(4, generator), generator).permute(0, 2, 3, 1)
    (latent,) = VAEEncode().encode(demo.vae, image)
    assert latent["samples"].shape == (4, 8, 16, 16)
    (decoded,) = VAEDecode().decode(demo.vae, latent)
    assert 10 * torch.log10(1 / (decoded - image).square().mean()) > 29


def test_hosts_empty_latent_fits_the_model(demo):
    import comfy.sample

    from nodes import EmptyLatentImage

    (latent,) = EmptyLatentImage().generate(64, 64, 2)
    fixed = comfy.sample.fix_empty_latent_channels(demo.model, latent["samples"], latent.get("downscale_ratio_spacial"), None)
    assert fixed.shape == loader.empty_latent(demo, 2).shape


def test_previews_use_fitted_rgb_factors(demo):
    latent_format = demo.model.get_model_object("latent_format")
    assert torch.tensor(latent_format.latent_rgb_factors).shape == (8, 3)
    assert len(latent_format.latent_rgb_factors_bias) == 3


def test_nodes_are_thin_over_the_loader(demo):
    from demo import nodes

    schemas = {node.define_schema().node_id: node for node in nodes.demo_nodes()}
    assert set(schemas) == {"BlockDanceDemoLoader", "BlockDanceDemoCaption"}
    model, vae, text = schemas["BlockDanceDemoLoader"].execute("sd3-mini").result
    (conditioning,) = schemas["BlockDanceDemoCaption"].execute(text, CAPTIONS[0]).result
    assert torch.equal(conditioning[0][0], demo.encode(CAPTIONS[0])[0][0])
    assert type(model) is type(demo.model)
    assert type(vae) is type(demo.vae)


def test_demo_nodes_declare_every_option():
    from demo import nodes

    (name,) = nodes.BlockDanceDemoLoader.define_schema().inputs
    assert list(name.options) == list(loader.MODELS)
