"""The demo workflow on the real server: queued twice, interrupted, queued again."""

from __future__ import annotations

import copy
import io
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host import launcher, server
from PIL import Image

pytestmark = pytest.mark.smoke

WORKFLOW = json.loads((Path(__file__).parents[2] / "demo" / "workflow_api.json").read_text(encoding="utf-8"))
SECONDS = 240


class Client:
    """The few calls of the server's HTTP interface that the tests need."""

    def __init__(self, address: str) -> None:
        self.address = address
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

    def queue(self, seed: int, **changes: Any) -> str:
        """Queue the demo workflow with other values of its sampler or Accelerate node."""
        prompt = copy.deepcopy(WORKFLOW)
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
    with server.running(sys.executable, launcher.host_path(), tmp_path_factory.mktemp("server")) as address:
        yield Client(address)


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
    deadline = time.monotonic() + SECONDS
    while not any(entry[1] == running for entry in client.get("/queue")["queue_running"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(2)
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
