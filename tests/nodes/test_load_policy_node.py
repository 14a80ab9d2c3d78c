"""BlockDanceLoadPolicy: lists the files of models/blockdance, loads one, and says what is wrong with the others."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from harness import STEPS, last_run, model_of, reused_steps
from tiny import CASES, sample

from blockdance_core.config import ConfigError
from blockdance_core.forecast import FORECASTS
from blockdance_core.host import paths
from blockdance_core.policy import Calibrated, SchedulePolicy, save
from blockdance_core.schedule import Reuse

pytestmark = pytest.mark.smoke

ROWS = tuple(Reuse(3, FORECASTS["delta"]) if letter == "r" else None for letter in "..cr.crr..")


def policy(**changes: Any) -> SchedulePolicy:
    one = Calibrated("euler", "simple", tuple(k / STEPS for k in range(STEPS + 1)), (ROWS,), (0.2,), (0.0,))
    return SchedulePolicy(**{"name": "tiny", "family": "SD3", "depth": 8, "entries": (one,), **changes})


@pytest.fixture
def loader(nodes: dict[str, Any], folder: Path) -> Any:
    return nodes["BlockDanceLoadPolicy"]


def options(loader: Any) -> list[str]:
    return list(loader.GET_SCHEMA().inputs[0].options)


def test_schema_is_the_api(loader: Any) -> None:
    schema = loader.GET_SCHEMA()
    assert schema.display_name == "Load BlockDance Policy"
    assert schema.category == "model/BlockDance"
    assert [(i.id, i.get_io_type()) for i in schema.inputs] == [("policy_name", "COMBO"), ("cut", "FLOAT")]
    assert schema.inputs[1].optional, "graphs that were saved before it was there"
    assert [(output.get_io_type(), output.display_name) for output in schema.outputs] == [("BLOCKDANCE_POLICY", "policy")]


def test_files_are_listed_anew_each_time_and_other_endings_are_not(loader: Any, folder: Path) -> None:
    assert options(loader) == []
    save(policy(), folder / "b.safetensors")
    save(policy(), folder / "sub" / "a.safetensors")
    (folder / "c.pt").write_bytes(b"")
    (folder / "d.txt").write_bytes(b"")
    assert options(loader) == ["b.safetensors", os.path.join("sub", "a.safetensors")]
    os.remove(folder / "b.safetensors")
    assert options(loader) == [os.path.join("sub", "a.safetensors")]


def test_without_a_file_the_message_says_where_they_belong(loader: Any, folder: Path) -> None:
    for name in ("", "none.safetensors"):
        message = loader.validate_inputs(name)
        assert "There is no policy file." in message
        assert str(folder) in message
    save(policy(), folder / "a.safetensors")
    assert loader.validate_inputs("a.safetensors") is True
    message = loader.validate_inputs("b.safetensors")
    assert "'b.safetensors'" in message
    assert "a.safetensors" in message


def test_name_from_another_node_is_not_known_yet_and_no_error(loader: Any, folder: Path) -> None:
    assert loader.validate_inputs(None) is True
    assert loader.fingerprint_inputs(None) == loader.fingerprint_inputs(None) == ""


@pytest.mark.parametrize("name", [
    "../secret.safetensors", "/etc/passwd", "..\\secret.safetensors", "a\0b", "sub/../../secret.safetensors",
])
def test_names_that_lead_elsewhere_are_refused(name: str, loader: Any, folder: Path) -> None:
    save(policy(), folder / "a.safetensors")
    save(policy(), folder.parent / "secret.safetensors")
    assert isinstance(loader.validate_inputs(name), str)
    with pytest.raises(FileNotFoundError):
        loader.execute(name)


def test_changed_file_has_another_fingerprint(loader: Any, folder: Path) -> None:
    file = folder / "a.safetensors"
    save(policy(), file)
    before = loader.fingerprint_inputs(policy_name=file.name)
    assert loader.fingerprint_inputs(policy_name=file.name) == before
    os.utime(file, ns=(0, 0))
    assert loader.fingerprint_inputs(policy_name=file.name) != before


def test_damaged_file_is_an_error_that_names_it(loader: Any, folder: Path) -> None:
    save(policy(), folder / "a.safetensors")
    (folder / "a.safetensors").write_bytes(b"not a policy")
    with pytest.raises(ConfigError, match=r"a\.safetensors"):
        loader.execute("a.safetensors")


def test_registering_keeps_the_paths_that_the_user_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {"blockdance": ([str(tmp_path)], set())})
    for _ in range(2):
        paths.register()
        own = os.path.join(folder_paths.models_dir, "blockdance")
        assert folder_paths.folder_names_and_paths["blockdance"] == ([str(tmp_path), own], {".safetensors"})


def test_loaded_policy_decides_and_the_page_is_told(
    nodes: dict[str, Any], loader: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(policy(), folder / "a.safetensors")
    loaded, = loader.execute("a.safetensors").result
    sent: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(sys.modules["blockdance_core.host.notify"], "send", lambda *event: sent.append(event))
    case = CASES["sd3"]
    accelerate = nodes["BlockDanceAccelerate"]
    model, = accelerate.execute(model_of(case), enabled=True, preset="paper", group_size=2, policy=loaded).result
    assert sent[0][1]["message"] == "follows the policy tiny"
    assert sent[0][1]["effective"]["policy"] == "tiny"
    assert sent[0][1]["effective"]["preset"] == "paper"
    sample(model, case, steps=STEPS)
    run = last_run(model)
    assert reused_steps(run) == [3, 6, 7]
    assert run["config"]["policy"] == "tiny"
    assert run["config"]["boundary_label"] == "4 of 8 blocks"


def test_cut_picks_the_schedule_in_place_of_n(nodes: dict[str, Any], loader: Any, folder: Path) -> None:
    fast = tuple(Reuse(7, FORECASTS["delta"]) if letter == "r" else None for letter in ".crrrcrrr.")
    one, = policy().entries
    one = dataclasses.replace(one, plans=(ROWS, fast), cuts=(0.2, 0.6), losses=(0.0, 0.1))
    save(policy(entries=(one,)), folder / "a.safetensors")
    case = CASES["sd3"]
    for cut, expected in ((0.0, [3, 6, 7]), (0.59, [3, 6, 7]), (0.6, [2, 3, 4, 6, 7, 8])):
        loaded, = loader.execute("a.safetensors", cut=cut).result
        model, = nodes["BlockDanceAccelerate"].execute(
            model_of(case), enabled=True, preset="auto", group_size=2, policy=loaded).result
        sample(model, case, steps=STEPS)
        assert reused_steps(last_run(model)) == expected


def test_policy_for_another_model_is_an_error_unless_it_is_off(nodes: dict[str, Any]) -> None:
    accelerate, model = nodes["BlockDanceAccelerate"], model_of(CASES["sd3"])
    for wrong in (policy(family="Flux"), policy(depth=24)):
        with pytest.raises(ConfigError, match=r"tiny was calibrated for .*this model is SD3 with 8 blocks"):
            accelerate.execute(model, enabled=True, preset="auto", group_size=2, policy=wrong)
        off, = accelerate.execute(model, enabled=False, preset="auto", group_size=2, policy=wrong).result
        full = sample(model, CASES["sd3"], steps=STEPS)
        assert torch.equal(sample(off, CASES["sd3"], steps=STEPS), full)
