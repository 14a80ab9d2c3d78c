"""`dev.py train-policy` from end to end, and the command line for models of one's own."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.latent_formats
import pytest
import torch
from PIL import Image

from blockdance_core.host import processes, training
from blockdance_core.host import train_policy as command
from blockdance_core.host.pictures import Pictures
from blockdance_core.host.training import PUBLISHED, Design
from blockdance_core.policy import AdaptivePolicy, load
from blockdance_core.policy.training import Settings
from demo import train_policy
from demo.loader import POLICIES

SMALL = ["--steps", "20", "--prompts", "4", "--batch", "2", "--epochs", "2", "--tradeoffs", "1", "8", "--threads", "1"]


@pytest.fixture(autouse=True)
def level(caplog: pytest.LogCaptureFixture) -> None:
    """The programs set the root's level; this puts it back."""
    caplog.set_level(logging.WARNING)


# The demo's


def test_a_small_training_is_stopped_resumed_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "policies" / "looks.safetensors"
    arguments = [*SMALL, "--out", str(out)]
    outcomes, count = Pictures._outcomes, 0

    def interrupted(self: Pictures, *given: Any) -> Any:
        nonlocal count
        count += 1
        if self.rollouts > 10:
            raise KeyboardInterrupt
        return outcomes(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Pictures, "_outcomes", interrupted)
        patch.setattr(training, "measured_costs", lambda model, prompt, boundaries: dict.fromkeys(boundaries, 0.4))
        with pytest.raises(KeyboardInterrupt):
            train_policy.main(arguments)
    assert os.listdir(out.parent) == ["looks.safetensors.training"]
    assert train_policy.main(arguments) == 0
    assert sorted(os.listdir(out.parent)) == ["looks.png", "looks.safetensors"]
    assert Image.open(out.with_suffix(".png")).size == (960, 300)

    policy = load(out)
    assert isinstance(policy, AdaptivePolicy)
    record = policy.record
    base = load(POLICIES / "sd3-mini.safetensors")
    assert policy.base.entries == base.entries
    assert (policy.entry.steps, policy.start, len(policy.cuts)) == (20, 2, 2)
    assert record["costs"] == dict.fromkeys(record["costs"], 0.4), "as before the interruption"
    assert (record["model"], record["split"], record["captions"], record["pictures"]) == ("sd3-mini", "train", 4, 4)
    assert record["command"].startswith("python dev.py train-policy --steps 20 --prompts 4")
    assert record["passes"] == 2
    printed = capsys.readouterr()
    assert "held-out pictures: 2, after pass" in printed.out
    assert f"{record['cost']['rollouts']:.0f} rollouts" in printed.out
    assert [line.split()[1] for line in printed.out.splitlines() if line.startswith("  lambda")] == ["8", "1"]
    assert "the same schedule for all" in printed.out
    assert all(f"{what}: 100%" in printed.err for what in ("full runs", "pictures", "passes"))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--steps", "19"], "no schedule for 19 steps"), (["--start", "0.95"], "leaves no step"),
    (["--reward", "beauty"], "Unknown reward"), (["--choices", "steps", "--boundaries", "99"], "boundaries holds '99'"),
    (["--tradeoffs", "-1"], "tradeoffs"), (["--prompts", "2"], "1 prompt is too few"),
])
def test_what_does_not_fit_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        train_policy.main([*SMALL, *arguments, "--out", str(tmp_path / "a.safetensors")])
    assert os.listdir(tmp_path) == []


def test_defaults_are_those_of_design_and_settings() -> None:
    options = train_policy.parser().parse_args([])
    assert (options.model, options.prompts, options.batch, options.reward, options.out) == ("sd3-mini", 96, 4, "fidelity", None)
    assert command.chosen(options, 16) == (Design(), Settings())
    with pytest.raises(SystemExit):
        train_policy.parser().parse_args(["--model", "flux"])


# What every training can be told


def chosen(*arguments: str, depth: int = 28) -> tuple[Design, Settings]:
    return command.chosen(train_policy.parser().parse_args(arguments), depth)


def test_published_is_the_method_as_published_and_what_is_named_still_counts() -> None:
    assert chosen("--published") == PUBLISHED
    design, settings = chosen("--published", "--start", "0.25", "--tradeoffs", "1", "4", "--epochs", "7", "--maps", "3")
    assert (design.choices, design.start, design.maps, design.width) == ("steps", 0.25, 3, 1472)
    assert (settings.tradeoffs, settings.epochs, settings.rate, settings.baseline) == ((1.0, 4.0), 7, 1e-5, False)


def test_options_reach_design_and_settings() -> None:
    design, settings = chosen(
        "--choices", "steps", "--forecast", "hold", "--boundaries", "0.5, 20", "--width", "32", "--depth", "1", "--heads", "2",
        "--no-sharing", "--no-baseline", "--patience", "3", "--group", "5", "--rate", "0.01", "--held-out", "0.5",
        "--seed", "9")
    assert design == Design(
        choices="steps", forecast="hold", boundaries=(13, 20), width=32, depth=1, heads=2, share=False)
    assert settings == Settings(patience=3, group=5, rate=0.01, held_out=0.5, baseline=False, seed=9)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--boundaries", "29"], "boundaries holds '29'"), (["--rate", "2"], "rate = 2.0"), (["--held-out", "1"], "held_out"),
    (["--epochs", "0"], "epochs"), (["--group", "1"], "group of one"),
])
def test_values_out_of_range_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chosen(*arguments)


def test_bars_are_one_for_each_part_of_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"held_out": [0.5, 1.0]}, {"held_out": [0.75, 1.0]}]
    with command.console() as show:
        for k in range(3):
            show("pictures", k + 1, 3, [])
        show("passes", 1, 2, rows)
    said = capsys.readouterr().err
    assert (said.count("pictures: 0it"), said.count("passes: 0it")) == (1, 1), "each is made once"
    assert "pictures: 100%" in said
    assert "+0.2500 +0.0000" in said


def test_processes_of_one_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if value:
            monkeypatch.setenv("WORLD_SIZE", value)
        with processes.processes():
            assert (processes.world(), processes.rank(), processes.mine([3, 4])) == (1, 0, [3, 4])


@pytest.mark.parametrize(("rank", "visible", "expected"), [
    (None, None, None), (None, "2,3", "2,3"), ("1", None, "1"), ("1", "2,3", "3"), ("0", "GPU-a,GPU-b", "GPU-a"),
])
def test_each_process_gets_a_gpu_of_its_own(
    rank: str | None, visible: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LOCAL_RANK", rank), ("CUDA_VISIBLE_DEVICES", visible)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    processes.select_gpu()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == expected
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(("gpu", "expected"), [(False, ["--cpu"]), (True, [])])
def test_host_is_told_where_there_is_no_gpu(gpu: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert processes.device_arguments() == expected


# Models of one's own


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a fox\n\n  two dogs \n", encoding="utf-8")
    return path


@pytest.fixture
def run(lines: Path, tmp_path: Path) -> Callable[..., int]:
    return lambda *arguments: command.main(["--prompts", str(lines), "--out", str(tmp_path / "a.safetensors"), *arguments])


def test_script_explains_itself_in_any_folder_and_refuses_what_is_missing(tmp_path: Path) -> None:
    script = [sys.executable, str(Path(command.__file__))]
    shown = subprocess.run([*script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "--checkpoint" in shown.stdout
    assert "--published" in shown.stdout
    refused = subprocess.run([*script, "--steps", "9"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 2
    assert "--prompts, --out" in refused.stderr


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "Name a --checkpoint or a --diffusion-model"),
    (["--checkpoint", "gone.safetensors"], "There is no file gone.safetensors, neither here nor among ComfyUI's checkpoints"),
    (["--diffusion-model", "gone.safetensors"], "among ComfyUI's diffusion_models"),
])
def test_files_that_are_missing_are_named(arguments: list[str], message: str, run: Callable[..., int]) -> None:
    with pytest.raises(SystemExit, match=f"train_policy: .*{message}"):
        run(*arguments)


def test_prompts_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"train_policy: .*gone\.txt"):
        command.main(["--prompts", str(tmp_path / "gone.txt"), "--out", str(tmp_path / "a.safetensors")])


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "no text encoder in that file: name it with --clip"),
    (["--clip", "l.safetensors", "--clip-type", "sd9"], "--clip-type sd9 is unknown"),
    (["--clip", "gone.safetensors"], "no file gone.safetensors, neither here nor among ComfyUI's text_encoders"),
])
def test_text_encoder_is_asked_for(
    arguments: list[str], message: str, run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.safetensors"
    model.touch()
    monkeypatch.setattr("comfy.sd.load_diffusion_model", lambda path: SimpleNamespace(path=path))
    with pytest.raises(SystemExit, match=message):
        run("--diffusion-model", str(model), *arguments)


class Text:
    """A text encoder that gives what it is told to read."""

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> Any:
        return [[tokens, {}]]


@pytest.mark.parametrize(("form", "size", "expected"), [
    (comfy.latent_formats.SD3, "1024x768", (1, 16, 96, 128)), (comfy.latent_formats.SD3, "512X512x1", (1, 16, 64, 64)),
    (comfy.latent_formats.Wan21, "832x480x81", (1, 16, 21, 60, 104)),
    (comfy.latent_formats.LTXV, "768x512x97", (1, 128, 13, 16, 24)),
])
def test_size_is_that_of_the_latent_that_the_model_wants(
    form: Any, size: str, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = command._parser().parse_args(["--prompts", "a", "--out", "b", "--size", size, "--negative", "blurry"])
    monkeypatch.setattr("comfy.sample.fix_empty_latent_channels", lambda model, latent, **_: latent)
    model = SimpleNamespace(get_model_object=lambda name: form())
    prompt = command._prompt(options, model, Text(), "a fox", 5)
    assert prompt.latent.shape == expected
    assert (prompt.positive, prompt.negative) == ([["a fox", {}]], [["blurry", {}]])
    assert (prompt.seed, prompt.steps, prompt.cfg, prompt.sampler, prompt.scheduler) == (5, 30, 5.0, "euler", "simple")


@pytest.mark.parametrize("size", ["1024", "axb", "1x2x3x4", ""])
def test_size_that_is_none_is_refused(size: str) -> None:
    options = command._parser().parse_args(["--prompts", "a", "--out", "b", "--size", size])
    with pytest.raises(ValueError, match="is no size: expected such as 1024x1024, or 832x480x81"):
        command._prompt(options, None, Text(), "a fox", 5)


def test_model_of_ones_own_is_trained_with_a_seed_for_each_prompt(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from harness import model_of
    from tiny import CASES

    case = CASES["sd3"]
    model = model_of(case)

    class Clip(Text):
        def encode_from_tokens_scheduled(self, tokens: str) -> Any:
            return case.conds(model, 1, len(tokens))[0]

    monkeypatch.setattr(command, "_loaded", lambda options: (model, Clip(), None, None))
    monkeypatch.setattr(training, "measured_costs", lambda model, prompt, boundaries: dict.fromkeys(boundaries, 0.5))
    small = ["--checkpoint", "own", "--steps", "10", "--size", "64x64", "--epochs", "1", "--tradeoffs", "2"]
    assert run(*small, "--seed", "7") == 0
    policy = load(tmp_path / "a.safetensors")
    assert policy.record["prompts"] == [[7, 1, 5.0], [8, 1, 5.0]]
    assert (policy.record["files"], policy.record["size"]) == (["own"], "64x64")
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "a.safetensors")
    with pytest.raises(SystemExit, match="train_policy: The policy a is an adaptive one itself: give calibrated"):
        run(*small, "--policy", str(tmp_path / "a.safetensors"))
    with pytest.raises(SystemExit, match="train_policy: 8 steps are too few"):
        run(*small, "--steps", "8")
