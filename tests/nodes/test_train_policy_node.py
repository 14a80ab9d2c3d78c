"""BlockDanceTrainPolicy: trains on a profile and on further prompts, saves what it learnt, and goes on after a stop."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from harness import last_run, model_of
from PIL import Image
from tiny import CASES, sample

from blockdance_core.config import ConfigError
from blockdance_core.host import training
from blockdance_core.host.training import further, parse_tradeoffs
from blockdance_core.policy import AdaptivePolicy, load

CASE = CASES["sd3"]
STEPS = 10


class Clip:
    """A text encoder: every text has an embedding of its own."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def tokenize(self, text: str) -> str:
        self.read.append(text)
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> Any:
        return CASE.conds(model_of(CASE), 1, len(tokens))[0]


@pytest.fixture(scope="module")
def measured(nodes: dict[str, Any]) -> Any:
    """A profile of two prompts of two samples, with plain costs: what a tiny model saves is not to be measured."""
    model = model_of(CASE)
    positive, negative = CASE.conds(model)
    found, _ = nodes["BlockDanceProfile"].execute(
        model, positive, negative, {"samples": CASE.latent(2)}, 1, STEPS, 3.0, "euler", "simple", 1.0, "5").result
    first, = found.prompts
    other = dataclasses.replace(first, positive=CASE.conds(model, 1, 5)[0], seed=2)
    return dataclasses.replace(
        found, prompts=(first, other), profile=dataclasses.replace(found.profile, costs=(0.25,)))


@pytest.fixture
def node(nodes: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))  # for the picture of the curve
    return nodes["BlockDanceTrainPolicy"]


def inputs(measured: Any, **changes: Any) -> dict[str, Any]:
    return {
        "profile": measured, "policy_name": "looks", "choices": "schedules", "start": 0.3, "tradeoffs": "0.02, 8",
        "reward": "fidelity", "epochs": 2, "seed": 0, **changes}


def test_schema_is_the_api(node: Any) -> None:
    schema = node.GET_SCHEMA()
    assert (schema.display_name, schema.category, schema.is_output_node) == (
        "BlockDance Train Policy", "model/BlockDance", True)
    assert [(i.id, i.get_io_type(), bool(i.optional)) for i in schema.inputs] == [
        ("profile", "BLOCKDANCE_PROFILE", False), ("policy", "BLOCKDANCE_POLICY", True), ("policy_name", "STRING", False),
        ("choices", "COMBO", False), ("start", "FLOAT", False), ("tradeoffs", "STRING", False), ("reward", "STRING", False),
        ("epochs", "INT", False), ("seed", "INT", False), ("prompts", "STRING", False), ("clip", "CLIP", True),
        ("vae", "VAE", True), ("clip_vision", "CLIP_VISION", True),
    ]
    defaults = {i.id: i.default for i in schema.inputs if hasattr(i, "default")}
    assert defaults["choices"] == "schedules"
    assert parse_tradeoffs(defaults["tradeoffs"]) == (1.0, 2.0, 4.0, 8.0, 16.0)
    assert node.validate_inputs(defaults["policy_name"], defaults["tradeoffs"]) is True
    assert [(output.get_io_type(), output.display_name) for output in schema.outputs] == [
        ("BLOCKDANCE_POLICY", "policy"), ("STRING", "report"), ("IMAGE", "curve")]


def test_policy_is_trained_as_the_server_runs_nodes_then_loaded_and_followed(
    node: Any, nodes: dict[str, Any], folder: Path, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "measured_costs", None)  # the profile has them
    with torch.inference_mode():
        output = node.execute(**inputs(measured))
    policy, text, curve = output.result
    assert sorted(os.listdir(folder)) == ["looks.png", "looks.safetensors"]
    assert isinstance(policy, AdaptivePolicy)
    assert (policy.name, policy.base.family, policy.start) == ("looks", "SD3", 3)
    report = json.loads(text)
    assert (report["pictures"], report["passes"], report["reward"]) == (4, 2, "fidelity")
    assert report["settings"]["tradeoffs"] == [0.02, 8.0]
    assert report["costs"] == {"5": 0.25}
    assert (curve.shape, curve.dtype) == ((1, 300, 960, 3), torch.float32)
    assert 0 <= curve.min() < curve.max() <= 1
    saved = np.asarray(Image.open(folder / "looks.png"), dtype=np.float32) / 255
    assert np.array_equal(curve[0].numpy(), saved)
    assert output.ui is not None
    loaded, = nodes["BlockDanceLoadPolicy"].execute("looks.safetensors").result
    assert loaded.record == report
    for group_size, level in ((1, None), (64, -1)):
        model, = nodes["BlockDanceAccelerate"].execute(
            model_of(CASE), enabled=True, preset="auto", group_size=group_size, policy=loaded).result
        sample(model, CASE, steps=STEPS, batch=2)
        run = last_run(model)
        assert run["warnings"] == []
        assert (run["adaptive"] is None) == (level is None)
        assert level is None or run["adaptive"]["step"] == 3
        assert level is None or len(run["adaptive"]["decisions"]) == 2


def test_calibrated_schedules_are_chosen_from(node: Any, nodes: dict[str, Any], measured: Any) -> None:
    calibrated, _ = nodes["BlockDanceCalibrate"].execute(measured, "schedules", 0.25, 0.0, 0).result
    policy, text, _ = node.execute(**inputs(measured, policy=calibrated, start=0.2)).result
    assert [entry.plans for entry in policy.base.entries] == [entry.plans for entry in calibrated.entries]
    assert json.loads(text)["options"] == [2]
    assert load(Path(folder_paths.get_folder_paths("blockdance")[0]) / "schedules.safetensors") == calibrated


def test_every_step_may_be_decided(node: Any, measured: Any) -> None:
    policy, _, _ = node.execute(**inputs(measured, choices="steps", start=0.6)).result
    assert [segment.start for segment in policy.segments] == [6, 7, 8, 9]


def test_further_prompts_are_sampled_like_the_first_with_seeds_of_their_own(
    node: Any, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    original = training.Pictures.__init__

    def spied(self: Any, model: Any, prompts: Any, texts: Any, *rest: Any) -> None:
        given.extend(zip(prompts, texts, strict=True))
        original(self, model, prompts, texts, *rest)

    monkeypatch.setattr(training.Pictures, "__init__", spied)
    clip = Clip()
    _, text, _ = node.execute(**inputs(measured, prompts="a fox\n\n  two dogs \n", clip=clip)).result
    assert clip.read == ["a fox", "two dogs"]
    assert json.loads(text)["prompts"] == [[1, 2, 3.0], [2, 2, 3.0], [2, 1, 3.0], [3, 1, 3.0]]
    assert [texts for _, texts in given] == [["", ""], ["", ""], ["a fox"], ["two dogs"]]
    fox = given[2][0]
    assert (fox.steps, fox.sampler, fox.scheduler, fox.negative) == (STEPS, "euler", "simple", measured.prompts[0].negative)
    assert torch.equal(fox.latent, measured.prompts[0].latent[:1])


def test_seeds_and_masks_of_further_prompts_fit_one_sample(measured: Any) -> None:
    like = dataclasses.replace(measured.prompts[0], seed=2**64 - 1, noise_mask=torch.ones(2, 1, 8, 8), batch_index=[0, 1])
    (one, other), texts = further(like, "a\nb", Clip())
    assert (one.seed, other.seed, texts) == (0, 1, ["a", "b"])
    assert (one.noise_mask.shape, one.batch_index) == ((1, 1, 8, 8), None)
    assert further(like, " \n", None) == ([], [])


def test_further_prompts_have_the_numbers_of_the_first(measured: Any) -> None:
    """As FluxGuidance sets one."""
    ((tokens, more), *_) = measured.prompts[0].positive
    like = dataclasses.replace(measured.prompts[0], positive=[[tokens, {**more, "guidance": 2.5}]])
    ((one,), _) = further(like, "a", Clip())
    assert [values["guidance"] for _, values in one.positive] == [2.5]


def test_further_prompts_need_a_text_encoder(node: Any, measured: Any) -> None:
    with pytest.raises(ValueError, match="prompts need a text encoder: connect clip, or leave them empty"):
        node.execute(**inputs(measured, prompts="a fox"))


@pytest.mark.parametrize(("name", "tradeoffs", "message"), [
    ("../a", "1", "policy_name '../a' is no file name"), ("", "1", "policy_name"),
    ("a", "", "tradeoffs '' are no list of numbers"), ("a", "1; 2", "tradeoffs '1; 2'"), ("a", "fast", "such as 1, 2, 4"),
    ("a", "-1", "from 0 on"), ("a", "1, nan", "nan"), ("a", "inf", "inf"),
])
def test_bad_names_and_tradeoffs_are_refused(node: Any, name: str, tradeoffs: str, message: str) -> None:
    assert message in node.validate_inputs(name, tradeoffs)


@pytest.mark.parametrize("text", ["1, 2,4", " 1 2  4 ", "1,2,4,"])
def test_good_tradeoffs_are_numbers_with_commas(node: Any, text: str) -> None:
    assert node.validate_inputs("a", text) is True
    assert parse_tradeoffs(text) == (1.0, 2.0, 4.0)


def test_adaptive_policy_as_a_base_is_refused(node: Any, measured: Any, folder: Path) -> None:
    policy, _, _ = node.execute(**inputs(measured, epochs=1)).result
    with pytest.raises(ValueError, match="is an adaptive one itself: give calibrated schedules, or none"):
        node.execute(**inputs(measured, policy_name="other", policy=policy))
    assert not (folder / "other.safetensors").exists()


@pytest.mark.parametrize(("changes", "message"), [
    ({"reward": "beauty"}, "Unknown reward 'beauty'"), ({"reward": "ssim"}, "connect a VAE"),
    ({"start": 0.9}, "leaves no step"), ({"choices": "both"}, "expected one of"), ({"policy_name": "a/b"}, "policy_name"),
])
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    node: Any, measured: Any, folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        node.execute(**inputs(measured, **changes))
    assert not folder.exists()


def test_one_prompt_is_too_few(node: Any, measured: Any) -> None:
    with pytest.raises(ConfigError, match="1 prompt is too few"):
        node.execute(**inputs(dataclasses.replace(measured, prompts=measured.prompts[:1])))


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_stopped_by_the_user_and_queued_again_it_goes_on(
    at: int, node: Any, folder: Path, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _, _ = node.execute(**inputs(measured, policy_name="whole")).result
    told: list[Any] = []

    def hook(value: Any, total: Any, preview: Any, **_: Any) -> None:
        told.append((value, total, preview))
        if len(told) == at:  # as the server's own hook does, see hijack_progress in the host's main.py
            comfy.model_management.interrupt_current_processing()
            comfy.model_management.throw_exception_if_processing_interrupted()

    with monkeypatch.context() as patch:
        patch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            node.execute(**inputs(measured))
    files = set(os.listdir(folder)) - {"whole.png", "whole.safetensors"}
    assert files == (set() if at <= 2 else {"looks.safetensors.training"}), "two full runs come first"
    policy, text, _ = node.execute(**inputs(measured)).result
    assert sorted(os.listdir(folder)) == ["looks.png", "looks.safetensors", "whole.png", "whole.safetensors"]
    assert (policy.cuts, policy.segments) == (whole.cuts, whole.segments)
    for one, other in zip(policy.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(one, other)
    assert json.loads(text)["passes"] == 2


def test_bar_runs_to_the_end_and_shows_the_curve(node: Any, measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *given, **_: told.append(given))
    node.execute(**inputs(measured))
    assert [given[:2] for given in told] == [(1, 2), (2, 2), (10, 20), (20, 20), (1, 2), (2, 2)]
    shown = [given[2] for given in told if given[2] is not None]
    assert shown, "at the first pass there is a curve to show"
    kind, image, _ = shown[0]
    assert (kind, image.size) == ("JPEG", (960, 300))
