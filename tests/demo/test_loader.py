"""The demo models through the host: its classes, their sizes, and whether pictures and clips show what captions say."""

import pytest
import torch

from demo import architectures, autoencoder, loader, renderer, scenes
from demo.train import report

SEED = 4


@pytest.fixture(scope="module", params=loader.MODELS)
def name(request):
    """Every model that is shipped."""
    return request.param


@pytest.fixture(scope="module")
def demo(name):
    return loader.load_demo(name)


def test_load_demo_builds_the_hosts_own_classes(demo, name):
    import comfy.model_base
    import comfy.sd

    architecture = architectures.ARCHITECTURES[name]
    bases = {"sd3-mini": comfy.model_base.SD3, "pixart-mini": comfy.model_base.PixArt, "wan-mini": comfy.model_base.WAN21}
    assert type(demo.model.model) is bases[name]
    assert type(demo.model.model.diffusion_model) is architecture.network()
    assert type(demo.vae) is comfy.sd.VAE
    assert {"steps", "samples", "seconds", "seed", "hardware"} <= demo.metadata["training"].keys()


def test_models_are_as_deep_and_as_small_as_promised():
    from blockdance_core import families

    least = {"sd3-mini": 16, "pixart-mini": 28, "wan-mini": 16}
    for name in loader.MODELS:
        assert len(families.find(loader.load_demo(name).model.model.diffusion_model).blocks) >= least[name]
    sizes = [path.stat().st_size for path in loader.FOLDER.glob("*.safetensors")]
    assert len(sizes) == len(loader.MODELS) + 1
    assert max(sizes) <= 20e6
    assert sum(sizes) <= 45e6


def test_models_predict_what_their_hosts_class_predicts(demo, name):
    from comfy import model_sampling

    kind = model_sampling.EPS if architectures.ARCHITECTURES[name].objective == "epsilon" else model_sampling.CONST
    assert isinstance(demo.model.get_model_object("model_sampling"), kind)


def test_load_demo_unknown_missing_or_damaged_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown demo model 'sd4'.*sd3-mini"):
        loader.load_demo("sd4")
    with pytest.raises(FileNotFoundError, match=r"sd3-mini.safetensors"):
        loader.load_demo("sd3-mini", tmp_path)
    (tmp_path / "sd3-mini.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match="damaged"):
        loader.load_demo("sd3-mini", tmp_path)


def test_encode_shapes_and_unknown_word(demo, name):
    texts = loader.captions(name, "test", 3, 0)
    ((context, extra),) = demo.encode(texts)
    assert context.shape == (3, scenes.PHRASES, 128)
    assert extra["pooled_output"].shape == (3, 128)
    assert not torch.equal(demo.encode("")[0][0], demo.encode(texts[0])[0][0])
    with pytest.raises(ValueError, match="Unknown word 'dog'"):
        demo.encode("a large red dog top left")


def test_encode_words_of_motion_belong_to_clips_only(demo, name):
    if architectures.ARCHITECTURES[name].moving:
        demo.encode("a red circle moving upward")
    else:
        with pytest.raises(ValueError, match="Unknown word 'upward'"):
            demo.encode("a red circle moving upward")


def test_sampled_easy_captions_come_out_right(demo, name):
    """A smoke test of weights, text encoder, VAE and sampler together; the card has the real figures."""
    texts = loader.captions(name, "validation", 8, SEED, "easy")
    verdicts = report.judge(report.sample(demo, texts, SEED, steps=20), texts)
    judged = [right for verdict in verdicts for found in verdict.objects for right in found.values()]
    assert sum(judged) >= 0.85 * len(judged), list(zip(texts, verdicts, strict=True))
    assert all(verdict.background for verdict in verdicts)


@pytest.mark.parametrize(
    ("sampler", "scheduler"), [("ddim", "ddim_uniform"), ("dpmpp_2m", "karras"), ("euler_ancestral", "normal")]
)
def test_models_work_with_other_samplers(demo, name, sampler, scheduler):
    texts = loader.captions(name, "validation", 4, SEED, "easy")
    pictures = report.sample(demo, texts, SEED, sampler=sampler, scheduler=scheduler, steps=20)
    found = [one for verdict in report.judge(pictures, texts) for one in verdict.objects]
    assert sum(one["colour"] and one["place"] for one in found) / len(found) > 0.8


def test_vae_round_trip_through_the_hosts_nodes(demo, name):
    from nodes import VAEDecode, VAEEncode

    architecture = architectures.ARCHITECTURES[name]
    generator = torch.Generator().manual_seed(3)
    drawn = scenes.draw(1 if architecture.moving else 4, generator, moving=architecture.moving).scenes
    frames = renderer.render_clips(drawn, generator, scenes.FRAMES if architecture.moving else 1, architecture.size)
    image = frames.flatten(0, 1).movedim(1, -1)
    (latent,) = VAEEncode().encode(demo.vae, image)
    assert latent["samples"].shape[1:] == architecture.latent_shape
    (decoded,) = VAEDecode().decode(demo.vae, latent)
    assert decoded.shape == image.shape
    assert 10 * torch.log10(1 / (decoded - image).square().mean()) > 26


def test_pack_and_unpack_are_inverse(name):
    architecture = architectures.ARCHITECTURES[name]
    latents = torch.randn(2, scenes.FRAMES if architecture.moving else 1, 8, 16, 16)
    assert torch.equal(architecture.unpack(architecture.pack(latents)), latents)
    assert architecture.pack(latents).shape[1] == architecture.channels


def test_previews_use_fitted_rgb_factors(demo, name):
    latent_format = demo.model.get_model_object("latent_format")
    assert torch.tensor(latent_format.latent_rgb_factors).shape == (architectures.ARCHITECTURES[name].channels, 3)
    assert len(latent_format.latent_rgb_factors_bias) == 3


def test_nodes_are_thin_over_the_loader(demo, name):
    from demo import nodes

    known = {node.define_schema().node_id: node for node in nodes.demo_nodes()}
    assert set(known) == {"BlockDanceDemoLoader", "BlockDanceDemoCaption", "BlockDanceDemoLatent"}
    model, vae, text = known["BlockDanceDemoLoader"].execute(name).result
    (conditioning,) = known["BlockDanceDemoCaption"].execute(text, "a red circle").result
    assert torch.equal(conditioning[0][0], demo.encode("a red circle")[0][0])
    (latent,) = known["BlockDanceDemoLatent"].execute(model, 2).result
    assert latent["samples"].shape == (2, *architectures.ARCHITECTURES[name].latent_shape)
    assert type(model) is type(demo.model)
    assert type(vae) is type(demo.vae)


def test_empty_latent_of_another_model_is_refused():
    class Other:
        def get_model_object(self, name):
            return object()

    with pytest.raises(ValueError, match="no BlockDance demo model"):
        loader.empty_latent(Other())


def test_demo_nodes_declare_every_option():
    from demo import nodes

    (name,) = nodes.BlockDanceDemoLoader.define_schema().inputs
    assert list(name.options) == list(loader.MODELS)


@pytest.mark.parametrize("kind", architectures.ARCHITECTURES)
@torch.inference_mode()  # as the host runs its nodes
def test_vae_takes_other_sizes_lengths_and_tiles(kind):
    """With an untrained autoencoder: shapes only, for every architecture."""
    from nodes import VAEDecodeTiled, VAEEncodeTiled

    architecture = architectures.ARCHITECTURES[kind]
    vae = loader._vae(architecture, autoencoder.Autoencoder().state_dict())
    pixels = torch.rand(5 if architecture.moving else 2, 70, 90, 3)
    latent = vae.encode(pixels)
    height, width = (side // 4 * (4 // architecture.downscale) for side in (70, 90))
    assert latent.shape == (*((1, 8, 5) if architecture.moving else (2, architecture.channels)), height, width)
    assert vae.decode(latent).numel() == len(pixels) * 68 * 88 * 3
    odd = latent[..., :-1, :-1]
    assert vae.decode(odd).shape[-3:-1] == tuple(side * architecture.downscale for side in odd.shape[-2:])

    pixels = torch.rand(9 if architecture.moving else 1, 128, 128, 3)
    (tiled,) = VAEEncodeTiled().encode(vae, pixels, 64, 16)
    assert tiled["samples"].shape == vae.encode(pixels).shape
    (picture,) = VAEDecodeTiled().decode(vae, tiled, 64, 16)
    assert picture.shape == pixels.shape
