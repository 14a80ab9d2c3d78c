"""`dev.py calibrate` from end to end, and on from where it ended."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockdance_core.calibration import Profile
from blockdance_core.host import profiling
from blockdance_core.policy import load
from demo import calibrate
from demo.loader import POLICIES

SMALL = ["--steps", "8", "--prompts", "2", "--checks", "2", "--proofs", "1", "--threads", "1"]


def run(*arguments: str) -> None:
    assert calibrate.main([*SMALL, *arguments]) == 0


def test_a_small_calibration_is_kept_resumed_and_extended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)  # the program sets the root's level; this puts it back
    monkeypatch.setattr(profiling, "LAGS", (1, 2))
    monkeypatch.setattr(calibrate, "BATCH", 1)
    out = tmp_path / "policies" / "a.safetensors"
    profile = out.with_name("a.safetensors.euler-8.npz")
    measure, measured = profiling.measure, []

    def measure_once(*arguments: Any, **more: Any) -> Profile:
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(measure(*arguments, **more))
        return measured[-1]

    monkeypatch.setattr(profiling, "measure", measure_once)
    with pytest.raises(KeyboardInterrupt):
        run("--out", str(out))
    assert calibrate.load_profile(profile)[1]["batches"] == 1

    measured.append(None)  # one more is allowed
    monkeypatch.setattr("blockdance_core.host.calibrate.best_schedules", lambda *_, **__: [])
    with pytest.raises(SystemExit, match="No schedule"):
        run("--out", str(out))
    assert len(measured) == 3
    assert os.listdir(out.parent) == [profile.name]
    before, settings = calibrate.load_profile(profile)
    assert before.errors.shape[0] == settings["batches"] == 2
    assert (settings["prompts"], settings["split"], settings["boundaries"]) == (2, "train", [16])
    rollouts = settings["cost"]["rollouts"]

    monkeypatch.undo()
    monkeypatch.setattr(calibrate, "BATCH", 1)
    monkeypatch.setattr("blockdance_core.host.profiling.measure", None)  # the profile is there already
    run("--out", str(out), "--effort", "1")
    assert os.listdir(out.parent) == [out.name]
    policy = load(out)
    record = policy.record["calibrations"][policy.entries[0].key]
    assert policy.entries[0].steps == 8
    assert (record["costs"], record["effort"]) == ([round(before.costs[0], 4)], 1)
    assert record["cost"]["rollouts"] > rollouts > 2
    assert record["command"].startswith("python dev.py calibrate --steps 8")
    assert {"cost", "levels", "versions", "cfg", "scheduler", "seed"} <= record.keys()
    printed = capsys.readouterr()
    assert f"{record['cost']['rollouts']} rollouts" in printed.out
    assert record["levels"][0]["plan"] in printed.out
    assert "profile" in printed.err

    run("--out", str(out), "--effort", "1")
    assert "already in" in capsys.readouterr().out
    with pytest.raises(TypeError):
        run("--out", str(out), "--effort", "1", "--again")

    cuts = policy.entries[0].cuts
    monkeypatch.undo()
    monkeypatch.setattr(calibrate, "BATCH", 1)
    monkeypatch.setattr(profiling, "LAGS", (1, 2))
    added = ["--out", str(out), "--cut", str(cuts[-1]), "--add", "--prompts", "1", "--checks", "1", "--proofs", "0"]
    run(*added)
    assert load(out).entries[0].cuts == (*cuts[:-1], pytest.approx(cuts[-1], abs=0.01)), "the times of blocks are measured anew"
    both = load(out).record["calibrations"][policy.entries[0].key]
    assert {**both, "added": None} == {**record, "added": None}
    assert [one["cut"] for one in both["added"]] == [cuts[-1]]
    capsys.readouterr()
    run(*added)
    assert "already in" in capsys.readouterr().out


def test_profile_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    arrays = np.ones((2, 2, 2, 2, 2)), np.full((3, 2, 2, 2, 2), np.nan), np.ones((3, 3))
    one = Profile((5, 7), (0.5, 0.25), (1, 2), (1.0, 0.5), *arrays)
    path = tmp_path / "new" / "a.npz"
    calibrate.save_profile(one, path, {"sampler": "euler", "prompts": 8})
    found, kept = calibrate.load_profile(path)
    assert kept == {"sampler": "euler", "prompts": 8}
    assert [file.name for file in path.parent.iterdir()] == ["a.npz"]
    for field in dataclasses.fields(Profile):
        before, after = getattr(one, field.name), getattr(found, field.name)
        same: Any = np.array_equal(before, after, equal_nan=True) if isinstance(before, np.ndarray) else before == after
        assert same, field.name


def test_profile_of_another_version_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, settings="{}", forecasts=[1.0])
    assert calibrate._resumed(path, {}, None, []) is None


@pytest.mark.parametrize(("arguments", "message"), [
    (["--sampler", "nope"], "no sampler 'nope'. Known: euler,"),
    (["--scheduler", "nope"], "no scheduler 'nope'. Known: simple,"),
    (["--boundaries", "99"], "boundaries holds '99'"), (["--steps", "2"], "2 steps is too short"),
    (["--out", str(POLICIES / "pixart-mini.safetensors")], "was calibrated for PixArt with 28"),
    (["--out", str(POLICIES / "sd3-mini-ada.safetensors")], "holds a decision network"),
])
def test_what_cannot_be_calibrated_is_refused_at_once(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        run("--out", str(tmp_path / "a.safetensors"), *arguments)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--prompts", "0"], ["--checks", "-1"]])
def test_too_few_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        calibrate.parser().parse_args(arguments)
    assert "expected 1 or more" in capsys.readouterr().err


def test_no_proofs_are_no_captions() -> None:
    assert calibrate._prompts(None, calibrate.parser().parse_args(["--proofs", "0"]), "proofs") == []


def test_captions_of_all_parts_are_of_the_train_split_and_differ() -> None:
    from demo import scenes
    from demo.prompts import texts

    profile, checks, proofs = (texts("sd3-mini", "train", 8, seed) for seed in calibrate._SEEDS.values())
    assert len({*profile, *checks, *proofs}) == 24
    assert {scenes.difficulty(text) for text in profile} == {"easy", "hard"}
