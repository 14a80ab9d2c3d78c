"""The training script: what Muon does to a matrix, the schedule, the losses, and that a run interrupted continues exactly."""

import argparse
import dataclasses
import json

import pytest
import torch

from demo import architectures, autoencoder, loader
from demo.train import autoencoder as autoencoder_training
from demo.train import card, diffusion, export, muon, precision, report

EVERY = pytest.mark.parametrize("name", architectures.ARCHITECTURES)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 64, 16), (2, 16, 64)])
def test_orthogonalise_brings_singular_values_near_one(shape):
    values = torch.linalg.svdvals(muon.orthogonalise(torch.randn(shape)).float())
    assert values.min() > 0.3
    assert values.max() < 1.4


@pytest.mark.parametrize("parts", [2, 3])
def test_muon_moves_a_fused_matrix_as_its_parts(parts):
    fused = torch.nn.Parameter(torch.zeros(parts * 16, 16))
    fused.grad = torch.randn(parts * 16, 16)
    apart = [torch.nn.Parameter(torch.zeros(16, 16)) for _ in range(parts)]
    for parameter, gradient in zip(apart, fused.grad.chunk(parts), strict=True):
        parameter.grad = gradient.clone()
    muon.Muon([fused]).step(0.1)
    muon.Muon(apart).step(0.1)
    assert torch.equal(fused, torch.cat(apart))


@pytest.mark.parametrize("there", [False, True])
def test_computes_in_bfloat16_only_where_the_hardware_does(there, monkeypatch):
    precision.compute_dtype.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": there})
    assert precision.compute_dtype() == (torch.bfloat16 if there else torch.float32)
    precision.compute_dtype.cache_clear()


def test_rate_warms_up_stays_and_falls_to_zero():
    rates = [diffusion.rate_at(step, 1000, 0.3) for step in (0, 49, 99, 500, 699, 850, 999)]
    assert rates == pytest.approx([0.01, 0.5, 1, 1, 1, 0.5, 1 / 300])


def test_attention_equals_the_fused_one():
    q, k, v = torch.randn(3, 2, 2, 7, 16)
    assert torch.allclose(diffusion.attention(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-6)


@EVERY
def test_a_new_model_predicts_nothing(name):
    architecture = architectures.ARCHITECTURES[name]
    trainee = diffusion.Trainee(architecture)
    tokens = torch.zeros(2, 5, 9, dtype=torch.long)
    with torch.no_grad():
        assert not trainee(torch.randn(2, *architecture.latent_shape), torch.tensor([3.0, 500.0]), tokens).any()


@EVERY
def test_losses_are_the_hosts_own_predictions_errors(name):
    """A model that answers with the truth in the host's convention has no error, at any of the host's noise levels."""
    architecture = architectures.ARCHITECTURES[name]
    network = diffusion.Trainee(architecture).model
    model = loader._model_patcher(architecture, {"rgb_factors": [], "rgb_bias": []}, network.state_dict())
    sampling = model.get_model_object("model_sampling")
    x0, noise = torch.randn(2, 3, *architecture.latent_shape)
    share = torch.tensor([0.1, 0.5, 0.9])

    class Truth(torch.nn.Module):
        def forward(self, x, timestep, tokens):
            sigma = sampling.sigma(timestep) if architecture.objective == "epsilon" else timestep / 1000
            assert torch.allclose(sampling.timestep(sigma).float(), timestep)
            sigma = sigma.view(-1, *[1] * (x0.ndim - 1))
            scaled = sampling.calculate_input(sigma, sampling.noise_scaling(sigma, noise, x0))
            assert torch.allclose(x, scaled, atol=1e-5)
            return noise if architecture.objective == "epsilon" else noise - x0

    assert diffusion.objective_of(architecture)(Truth(), (x0, None, noise, share)) == 0


@pytest.mark.parametrize("part", [0.0, 0.4, 1.0])
def test_epsilon_loss_weighs_as_the_velocity_error_whatever_part_is_missed(part):
    """An error d in the predicted noise - part * x0 is one of (1 + sigma) / (1 + part * sigma) * d in noise - x0."""
    loss = diffusion.objective_of(architectures.ARCHITECTURES["pixart-mini"])
    x0, noise = torch.randn(2, 8, 2, 36, 36)
    share = torch.full((8,), 0.6)
    found = loss(lambda x, timestep, tokens: noise - part * x0 + 0.1, (x0, None, noise, share), part=part)
    assert found.sqrt() == pytest.approx(0.1 * (1 + 1.5) / (1 + part * 1.5), rel=0.01)


def test_part_is_whole_first_then_falls_to_nothing():
    assert [diffusion.part_at(share, (0.2, 0.6)) for share in (0, 0.2, 0.4, 0.6, 1)] == pytest.approx([1, 1, 0.5, 0, 0])
    assert diffusion.part_at(0, (0.0, 0.0)) == 0


def test_brief_clips_come_first_then_every_other_step_then_no_more():
    assert "".join("wb"[diffusion.brief_at(step, 10, (0.25, 0.65))] for step in range(10)) == "bbbbwbwwww"
    assert not any(diffusion.brief_at(step, 10, (0.0, 0.0)) for step in range(10))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Start or continue a tiny run in `tmp_path`; returns its state."""
    small = {"num_blocks": 2, "depth": 2, "num_layers": 2}
    for name, architecture in architectures.ARCHITECTURES.items():
        config = {k: min(v, small[k]) if k in small else v for k, v in architecture.unet_config.items()}
        monkeypatch.setitem(architectures.ARCHITECTURES, name, dataclasses.replace(architecture, unet_config=config))
    torch.save(autoencoder.Autoencoder().state_dict(), tmp_path / "autoencoder.pt")
    record = {"psnr": 30.0, "batch": 32, "seed": 0, "hardware": "none", "phases": []}
    (tmp_path / "autoencoder.json").write_text(json.dumps(record), encoding="utf-8")

    def start(folder, every, name="sd3-mini", seed=0, further_from=None):
        out = tmp_path / folder
        out.mkdir(exist_ok=True)
        options = argparse.Namespace(
            name=name, out=out, autoencoder=tmp_path, seed=seed, every=every, workers=1, threads=1, compile=False,
            further_from=further_from, recipe=diffusion.Recipe(batch=4, steps=6),
        )  # fmt: skip
        state = diffusion.Run(options, 0)
        state.train(1)
        return state

    return start


@pytest.fixture
def training(monkeypatch):
    """The host in training, as the workers have it."""
    from comfy import model_management

    monkeypatch.setattr(model_management, "in_training", True)


@EVERY
def test_run_interrupted_continues_exactly(run, tmp_path, name, training):
    whole = run("whole", 6, name)
    stop = tmp_path / "parts" / "stop"
    stop.parent.mkdir()
    stop.touch()
    assert run("parts", 100, name).step == 1
    stop.unlink()
    parts = run("parts", 100, name)
    assert parts.step == whole.step == 6
    for ours, theirs in ((parts.parameters, whole.parameters), (parts.ema, whole.ema)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert not any(a.requires_grad for a in parts.ema)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_run_moves_every_parameter(run, name, dtype, training, monkeypatch):
    """None is cut off by zeros on both of its sides."""
    monkeypatch.setattr(precision, "compute_dtype", lambda: dtype)
    torch.manual_seed(0)
    before = dict(diffusion.Trainee(architectures.ARCHITECTURES[name]).named_parameters())
    state = run("moved", 6, name)
    assert {one.dtype for one in state.trainee.text.parameters()} == {muon.orthogonalise(torch.ones(1, 4, 4)).dtype} == {dtype}
    still = [n for n, p in zip(state.masters.names, state.parameters, strict=True) if torch.equal(p, before[n])]
    assert not [n for n in still if "context_block.attn.ln_q" not in n]  # the last block's is used by nobody


def test_run_of_another_seed_is_not_continued(run):
    run("run", 6)
    with pytest.raises(SystemExit, match="seed 0 then, 1 now"):
        run("run", 6, seed=1)


def test_epsilon_loss_takes_the_noise_levels_to_the_device_of_the_batch():
    sigmas = diffusion.objective_of(architectures.ARCHITECTURES["pixart-mini"]).keywords["sigmas"]
    batch = (torch.zeros(2, 2, 4, 4, device="meta"), None, *torch.zeros(2, 2, 2, 4, 4, device="meta")[:1])
    x0, noise, share = batch[0], torch.zeros(2, 2, 4, 4, device="meta"), torch.zeros(2, device="meta")
    loss = diffusion.epsilon_loss(lambda x, timestep, tokens: x, (x0, None, noise, share), sigmas)
    assert loss.device.type == "meta"


@EVERY
def test_export_of_a_run_loads_and_draws_in_the_host_and_has_a_card(run, tmp_path, name, training):
    run("run", 6, name)
    to = tmp_path / "models"
    arguments = [name, "--run", str(tmp_path / "run"), "--autoencoder", str(tmp_path), "--to", str(to)]
    export.main(arguments)
    demo = loader.load_demo(name, to)
    assert demo.metadata["training"]["samples"] == 24
    assert (to / f"{name}-loss.png").is_file()
    figures, judged = report.measure(demo, "validation", 2, 2, 0)
    assert 0 <= figures["hard"]["right"] <= 1
    assert figures["easy"]["half_the_steps"]["captions"] == 2
    assert report.sheet(judged).size[0] > 500
    (to / f"{name}-report.json").write_text(json.dumps(figures), encoding="utf-8")
    card.main([name, "--models", str(to)])
    assert f"{figures['hard']['right']:.1%}" in (to / f"{name}.md").read_text(encoding="utf-8")


@EVERY
def test_finished_model_is_trained_further_on_other_data(run, tmp_path, name, training, monkeypatch):
    run("run", 6, name)
    to, first = tmp_path / "models", tmp_path / "restored"
    export.main([name, "--run", str(tmp_path / "run"), "--autoencoder", str(tmp_path), "--to", str(to)])
    metadata, weights = loader.read(to / f"{name}.safetensors")
    (tmp_path / "further").mkdir()
    (tmp_path / "further" / "stop").touch()
    drawn = []
    data = diffusion.Data.__call__
    monkeypatch.setattr(diffusion.Data, "__call__", lambda self, step, *rest, **more: drawn.append(step) or data(
        self, step, *rest, **more))
    monkeypatch.setattr(diffusion, "rate_at", lambda *_: 0.0)
    state = run("further", 6, name, further_from=to / f"{name}.safetensors")
    assert (state.step, state.samples, set(drawn)) == (1, 24 + 4, {6, 0}), "0 is of the validation captions"
    prefixes = {"model": loader.MODEL_PREFIX, "text": loader.TEXT_PREFIX}
    for key, value in zip(state.masters.names, state.parameters, strict=True):
        part, rest = key.split(".", 1)
        assert torch.equal(value, weights[prefixes[part] + rest]), key
    (tmp_path / "further" / "stop").unlink()
    run("further", 6, name, further_from=to / f"{name}.safetensors")

    autoencoder_training.restore(to / "autoencoder.safetensors", first)
    export.main([name, "--run", str(tmp_path / "further"), "--autoencoder", str(first), "--to", str(to)])
    record = loader.load_demo(name, to).metadata["training"]
    assert (record["steps"], record["samples"], record["before"]) == (12, 48, metadata["training"])


def test_shipped_model_is_trained_further_from_a_copy_that_stays(tmp_path, monkeypatch):
    from demo.train import __main__ as program

    started = []
    for part in (export, report, card):
        monkeypatch.setattr(part, "main", lambda *_: None)
    monkeypatch.setattr(autoencoder_training, "main", lambda *_: pytest.fail("the shipped one is finished"))
    monkeypatch.setattr(diffusion, "_worker", None)
    monkeypatch.setattr(diffusion.torch.multiprocessing, "spawn", lambda _, given, **more: started.append(given[0]))
    for _ in range(2):
        assert program.main(["wan-mini", "--out", str(tmp_path), "--further", "70"]) == 0
        monkeypatch.setattr(program.shutil, "copyfile", lambda *_: pytest.fail("once"))
    for options in started:
        assert options.out == tmp_path / "wan-mini-70-further"
        assert options.further_from.read_bytes() == (loader.FOLDER / "wan-mini.safetensors").read_bytes()
        assert (options.recipe.steps, options.recipe.ease) == (70, (0.0, 0.0))
        assert not diffusion.brief_at(0, 70, options.recipe.opening)
    with pytest.raises(SystemExit):
        program.main(["wan-mini", "--out", str(tmp_path), "--further", "70", "--steps", "70"])


def test_export_with_another_autoencoder_than_the_runs_is_refused(run, tmp_path):
    run("run", 6)
    to = tmp_path / "models"
    export.main(["sd3-mini", "--run", str(tmp_path / "run"), "--autoencoder", str(tmp_path), "--to", str(to)])
    other = tmp_path / "other"
    other.mkdir()
    torch.save(autoencoder.Autoencoder().state_dict(), other / "autoencoder.pt")
    with pytest.raises(SystemExit, match="another autoencoder"):
        export.main(["sd3-mini", "--run", str(tmp_path / "run"), "--autoencoder", str(other), "--to", str(to)])
    assert loader.load_demo("sd3-mini", to)


def test_export_takes_no_autoencoder_away_from_other_models_but_replaces_a_model_with_its_own(run, tmp_path):
    run("run", 6)
    to = tmp_path / "models"
    arguments = ["sd3-mini", "--run", str(tmp_path / "run"), "--autoencoder", str(tmp_path), "--to", str(to)]
    export.main(arguments)
    torch.save(autoencoder.Autoencoder().state_dict(), tmp_path / "autoencoder.pt")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    run("run", 6)
    export.main(arguments)
    assert loader.load_demo("sd3-mini", to)
    before = (to / "autoencoder.safetensors").read_bytes()
    (to / "sd3-mini.safetensors").rename(to / "another.safetensors")
    torch.save(autoencoder.Autoencoder().state_dict(), tmp_path / "autoencoder.pt")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    run("run", 6)
    with pytest.raises(SystemExit, match=r"another.safetensors needs another autoencoder"):
        export.main(arguments)
    assert (to / "autoencoder.safetensors").read_bytes() == before


def test_fingerprint_names_what_encodes_and_leaves_the_decoder_free():
    torch.manual_seed(0)
    network = autoencoder.Autoencoder()
    before = network.fingerprint()
    torch.nn.init.normal_(network.decoder[0].weight)
    assert network.fingerprint() == before
    network.std.fill_(2)
    assert network.fingerprint() != before
