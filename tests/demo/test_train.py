"""The training script: what Muon does to a matrix, the schedule, and that an interrupted run continues exactly."""

import argparse
import json

import pytest
import torch

from demo import autoencoder
from demo.train import muon, sd3_mini


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 64, 16), (2, 16, 64)])
def test_orthogonalise_brings_singular_values_near_one(shape):
    values = torch.linalg.svdvals(muon.orthogonalise(torch.randn(shape)))
    assert values.min() > 0.3
    assert values.max() < 1.4


def test_muon_moves_a_fused_qkv_matrix_as_three():
    fused = torch.nn.Parameter(torch.zeros(48, 16))
    fused.grad = torch.randn(48, 16)
    apart = [torch.nn.Parameter(torch.zeros(16, 16)) for _ in range(3)]
    for parameter, gradient in zip(apart, fused.grad.chunk(3), strict=True):
        parameter.grad = gradient.clone()
    muon.Muon([fused]).step(0.1)
    muon.Muon(apart).step(0.1)
    assert torch.equal(fused, torch.cat(apart))


def test_rate_warms_up_stays_and_falls_to_zero():
    rates = [sd3_mini.rate_at(step, 1000, 0.3) for step in (0, 49, 99, 500, 699, 850, 999)]
    assert rates == pytest.approx([0.01, 0.5, 1, 1, 1, 0.5, 1 / 300])


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Start or continue a tiny run in `tmp_path`; returns its parameters and averaged weights."""
    monkeypatch.setattr(sd3_mini, "BATCH", 4)
    monkeypatch.setitem(sd3_mini.UNET_CONFIG, "num_blocks", 2)
    torch.save(autoencoder.Autoencoder().state_dict(), tmp_path / "autoencoder.pt")
    statistics = {"mean": [0.0] * autoencoder.LATENT_CHANNELS, "std": [1.0] * autoencoder.LATENT_CHANNELS}
    (tmp_path / "autoencoder.json").write_text(json.dumps(statistics), encoding="utf-8")

    def start(name, every):
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        options = argparse.Namespace(
            out=out, autoencoder=tmp_path, steps=6, decay=0.3, seed=0, every=every, workers=1, threads=1, compile=False
        )
        state = sd3_mini.Run(options, 0)
        state.train(1)
        return state

    return start


def test_run_interrupted_continues_exactly(run, tmp_path):
    whole = run("whole", every=6)
    stop = tmp_path / "parts" / "stop"
    stop.parent.mkdir()
    stop.touch()
    assert run("parts", every=100).step == 1
    stop.unlink()
    parts = run("parts", every=100)
    assert parts.step == whole.step == 6
    for ours, theirs in ((parts.parameters, whole.parameters), (parts.ema, whole.ema)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_run_keeps_no_graph_in_the_averaged_weights(run):
    assert not any(value.requires_grad for value in run("graph", every=6).ema)
