"""The real server: the demo workflow queued twice, interrupted, queued again; a tiny model queued hundreds of times."""

from __future__ import annotations

import copy
import io
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
from host import launcher, server
from PIL import Image

from blockdance_core.forecast import FORECASTS
from blockdance_core.host.search import letters
from blockdance_core.policy import Calibrated, SchedulePolicy, load, save
from blockdance_core.schedule import Reuse

pytestmark = pytest.mark.smoke

WORKFLOW = json.loads((Path(__file__).parents[2] / "demo" / "workflow_api.json").read_text(encoding="utf-8"))
SECONDS = 240
TINY: dict[str, Any] = {
    "1": {"class_type": "TinyModel", "inputs": {}},
    "2": {"class_type": "BlockDanceAccelerate", "inputs": {
        **WORKFLOW["2"]["inputs"], "preset": "custom", "window": "steps", "start_percent": 0.0, "end_percent": 1.0}},
    "3": {"class_type": "RepeatLatentBatch", "inputs": {"samples": ["1", 3], "amount": 16}},
    "4": {"class_type": "KSampler", "inputs": {
        **WORKFLOW["6"]["inputs"], "model": ["2", 0], "positive": ["1", 1], "negative": ["1", 2], "latent_image": ["3", 0]}},
    "5": {"class_type": "SaveLatent", "inputs": {"samples": ["4", 0], "filename_prefix": "tiny"}},
}


class Client:
    """The few calls of the server's HTTP interface that the tests need."""

    def __init__(self, address: str, base: Path) -> None:
        self.address, self.base = address, base
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str) -> Any:
        with self.opener.open(f"{self.address}{path}", timeout=30) as answer:
            body = answer.read()
        return json.loads(body) if body[:1] in b"{[" else body

    def post(self, path: str, data: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}{path}", json.dumps(data).encode(), headers)
        with self.opener.open(request, timeout=30) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def queue(self, seed: int, workflow: dict[str, Any] = WORKFLOW, **changes: Any) -> str:
        """Queue a workflow, by default that of the demo, with other values of its sampler or Accelerate node."""
        prompt = copy.deepcopy(workflow)
        for node in prompt.values():
            if node["class_type"] == "KSampler":
                node["inputs"]["seed"] = seed
            node["inputs"].update({name: value for name, value in changes.items() if name in node["inputs"]})
        return self.post("/prompt", {"prompt": prompt})["prompt_id"]

    def finished(self, prompt_id: str) -> dict[str, Any]:
        """The history entry of a prompt, once it is over."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.1)
        raise AssertionError(f"prompt {prompt_id} did not end within {SECONDS} s")

    def running(self, prompt_id: str) -> None:
        """Wait until a prompt has begun, and is in its sampler where that takes long."""
        deadline = time.monotonic() + SECONDS
        while not any(entry[1] == prompt_id for entry in self.get("/queue")["queue_running"]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(2)

    def latent(self, prompt_id: str) -> bytes:
        """The latent that a prompt with the tiny model saved."""
        entry = self.finished(prompt_id)
        assert entry["status"]["status_str"] == "success", entry["status"]
        (saved,) = entry["outputs"]["5"]["latents"]
        path = self.base / "output" / saved["subfolder"] / saved["filename"]
        return safetensors.torch.load_file(path)["latent_tensor"].numpy().tobytes()

    def result(self, prompt_id: str) -> tuple[bytes, dict[str, Any]]:
        """The first saved picture (decoded pixels) and the report of a prompt that must succeed."""
        entry = self.finished(prompt_id)
        assert entry["status"]["status_str"] == "success", entry["status"]
        outputs = {WORKFLOW[node]["class_type"]: output for node, output in entry["outputs"].items()}
        image = outputs["SaveImage"]["images"][0]
        png = self.get(f"/view?filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}")
        return pixels(png), json.loads(outputs["BlockDanceReport"]["text"][0])


def pixels(png: bytes) -> bytes:
    """The decoded picture, without the metadata that names the seed."""

    return Image.open(io.BytesIO(png)).convert("RGB").tobytes()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    base, tests = tmp_path_factory.mktemp("server"), Path(__file__).parents[1]
    source = tests / "browser" / "tiny_nodes.py"
    nodes = base / "custom_nodes" / source.name
    nodes.parent.mkdir()
    nodes.write_text(source.read_text(encoding="utf-8").replace('"@TESTS@"', repr(str(tests))), encoding="utf-8")
    arguments = ["--whitelist-custom-nodes", server.REPO.name, nodes.name]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # more wait for each other on a busy machine
    with server.running(
        sys.executable, launcher.host_path(), base, arguments=arguments, variables=one_thread
    ) as address:
        yield Client(address, base)


def test_queued_twice_second_run_is_as_fast_and_as_faithful_as_a_fresh_one(client: Client) -> None:
    settings = {"steps": 12, "preset": "paper", "group_size": 2}
    first, report_first = client.result(client.queue(1, **settings))
    second, report_second = client.result(client.queue(2, **settings))
    client.post("/free", {"unload_models": True, "free_memory": True})
    fresh, report_fresh = client.result(client.queue(2, **settings))
    assert first != second
    assert second == fresh
    assert report_first["decisions"] == report_second["decisions"] == report_fresh["decisions"]
    assert "reuse" in report_second["decisions"]
    assert report_second["fallbacks"] == {}
    assert len(report_second["runs"]) == 1  # this prompt's run only, though the MODEL was cached between the prompts


def test_disabled_on_the_server_reports_a_full_run(client: Client) -> None:
    _, report = client.result(client.queue(3, steps=8, enabled=False))
    assert report["decisions"] == ["compute"] * 8
    assert report["steps"] == 8
    assert all(ms > 0 for ms in report["dit_ms"])


def test_interrupted_in_mid_run_the_next_run_is_unharmed(client: Client) -> None:
    settings = {"steps": 12, "preset": "paper", "group_size": 2}
    before, _ = client.result(client.queue(5, **settings))
    running = client.queue(6, **{**settings, "steps": 2000})
    client.running(running)
    client.post("/interrupt", {"prompt_id": running})
    assert client.finished(running)["status"]["status_str"] == "error"
    client.post("/free", {"unload_models": False, "free_memory": True})
    after, report = client.result(client.queue(5, **settings))
    assert after == before
    assert report["completed"] is True


def test_bad_values_on_the_server_name_the_node_and_the_range(client: Client) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        client.queue(1, group_size=0)
    assert "group_size" in refused.value.read().decode()
    entry = client.finished(client.queue(1, preset="custom", start_percent=0.9, end_percent=0.5))
    assert entry["status"]["status_str"] == "error"
    assert "start_percent = 0.9" in json.dumps(entry["status"])
    entry = client.finished(client.queue(1, preset="custom", boundary=99))
    assert "the range is 0 to" in json.dumps(entry["status"])


def test_policy_file_is_listed_loaded_and_loaded_again_when_it_changes(client: Client) -> None:
    prompt = copy.deepcopy(TINY)
    prompt["2"]["inputs"]["policy"] = ["6", 0]
    prompt["6"] = {"class_type": "BlockDanceLoadPolicy", "inputs": {"policy_name": "tiny.safetensors"}}
    folder = client.base / "models" / "blockdance"
    with pytest.raises(urllib.error.HTTPError) as refused:
        client.queue(1, prompt)
    assert str(folder) in json.loads(refused.value.read())["node_errors"]["6"]["errors"][0]["details"]

    def saved(letters: str, family: str = "SD3") -> None:
        rows = tuple(Reuse(5, FORECASTS["hold"]) if letter == "r" else None for letter in letters)
        one = Calibrated("euler", "simple", tuple(k / 10 for k in range(11)), (rows,), (0.2,), (0.0,))
        save(SchedulePolicy("tiny", family, 8, (one,)), folder / "tiny.safetensors")

    saved("..........")
    listed = client.get("/object_info/BlockDanceLoadPolicy")["BlockDanceLoadPolicy"]["input"]["required"]["policy_name"]
    assert "tiny.safetensors" in json.dumps(listed)
    assert "sd3-mini.safetensors" in json.dumps(listed), "the policies of the demo models are listed too"
    settings = {"steps": 10, "sampler_name": "euler", "scheduler": "simple"}
    full = client.latent(client.queue(1, TINY, enabled=False, **settings))
    assert client.latent(client.queue(1, prompt, **settings)) == full
    saved("...rr..rr.")
    reused = client.latent(client.queue(1, prompt, **settings))
    assert reused != full
    assert client.latent(client.queue(1, prompt, enabled=False, **settings)) == full
    saved("...rr..rr.", "Flux")
    entry = client.finished(client.queue(1, prompt, **settings))
    assert "calibrated for Flux with 8 blocks; this model is SD3" in json.dumps(entry["status"])
    (folder / "tiny.safetensors").write_bytes(b"garbage")
    entry = client.finished(client.queue(1, prompt, **settings))
    assert "Cannot use the policy file" in json.dumps(entry["status"])


def test_profiled_calibrated_and_used_in_one_graph_then_interrupted(client: Client) -> None:
    prompt = copy.deepcopy(TINY)
    prompt["3"]["inputs"]["amount"] = 1
    sampling = {"steps": 8, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    prompt["4"]["inputs"].update(sampling)
    for number, before in (("6", None), ("7", "6")):
        prompt[number] = {"class_type": "BlockDanceProfile", "inputs": {
            **prompt["4"]["inputs"], **sampling, "model": ["1", 0], "seed": int(number), "boundaries": "",
            **({"profile": [before, 0]} if before else {})}}
    prompt["8"] = {"class_type": "BlockDanceCalibrate", "inputs": {
        "profile": ["7", 0], "policy_name": "found", "cut": 0.1, "fidelity": 0.0, "effort": 0}}
    prompt["2"]["inputs"]["policy"] = ["8", 0]
    entry = client.finished(client.queue(1, prompt))
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert {"5", "6", "7", "8"} <= set(entry["outputs"])
    report = json.loads(entry["outputs"]["8"]["text"][0])
    policy = load(client.base / "models" / "blockdance" / "found.safetensors")
    assert report["path"].endswith("found.safetensors")
    assert [row["plan"] for row in report["levels"]] == [letters(plan) for plan in policy.entries[0].plans]
    assert json.loads(entry["outputs"]["7"]["text"][0])["prompts"] == 2

    prompt["8"]["inputs"]["policy_name"] = "../found"
    with pytest.raises(urllib.error.HTTPError) as refused:
        client.queue(1, prompt)
    assert "is no file name" in refused.value.read().decode()

    plain = client.latent(client.queue(1, TINY, enabled=False, steps=4))
    long = {name: prompt[name] for name in ("1", "3", "6", "8")}
    long["6"]["inputs"]["steps"] = 60
    long["8"]["inputs"].update({"profile": ["6", 0], "policy_name": "long"})
    running = client.queue(1, long)
    client.running(running)
    client.post("/interrupt", {"prompt_id": running})
    entry = client.finished(running)
    assert "execution_interrupted" in json.dumps(entry["status"])
    client.post("/free", {"unload_models": False, "free_memory": True})
    assert client.latent(client.queue(1, TINY, enabled=False, steps=4)) == plain


def test_cancelled_while_others_wait_the_others_are_unharmed(client: Client) -> None:
    before = [client.latent(client.queue(seed, TINY, steps=8)) for seed in (1, 2)]
    long, first, dropped, second = (
        client.queue(seed, TINY, steps=steps) for seed, steps in ((3, 10000), (1, 8), (4, 10000), (2, 8)))
    client.running(long)
    client.post("/queue", {"delete": [dropped]})
    client.post("/interrupt", {"prompt_id": long})
    messages = dict(client.finished(long)["status"]["messages"])
    assert messages["execution_interrupted"]["node_type"] == "KSampler"
    assert [client.latent(first), client.latent(second)] == before
    assert client.get(f"/history/{dropped}") == {}


def test_two_hundred_runs_in_a_row_need_no_more_memory_and_change_nothing(client: Client) -> None:
    """A leak of the features of one run, 0.4 MB, would show as 60 MB."""
    (process,) = (one for one in psutil.process_iter(["cmdline"])
                  if {"--port", client.address.rpartition(":")[2]} <= set(one.info["cmdline"] or ()))
    first, used = b"", []
    for seeds in (range(50), range(50, 200)):
        prompts = [client.queue(seed, TINY, steps=4) for seed in seeds]
        latents = [client.latent(prompt) for prompt in prompts]
        assert len(set(latents)) == len(latents)
        used.append(process.memory_info().rss)
        first = first or latents[0]
    assert used[1] - used[0] < 20e6
    for unload, forget in ((True, False), (True, True), (False, False)):
        client.post("/free", {"unload_models": unload, "free_memory": forget})
        time.sleep(1)  # done by the thread that also takes the next prompt
        assert client.latent(client.queue(0, TINY, steps=4)) == first
        assert client.latent(client.queue(1, TINY, steps=4)) != first
