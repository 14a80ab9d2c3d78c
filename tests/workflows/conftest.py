"""The real server with stand-ins for the model files that the example workflows name."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from host import launcher, server

sys.path.append(str(Path(__file__).parent))
from saved import SavedWorkflow

WORKFLOWS = sorted((server.REPO / "workflows").glob("*.json"))
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Host:
    """What the tests ask of the server."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.definitions: dict[str, Any] = self.get("/object_info")

    def read(self, path: str) -> tuple[bytes, str]:
        """The content at a path and its type."""
        with _opener.open(self.address + path, timeout=60) as answer:
            return answer.read(), answer.headers.get_content_type()

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return json.loads(self.read(path)[0])

    def post(self, path: str, data: Any) -> tuple[int, Any]:
        """Status and JSON answer of a POST, whether it is refused or not."""
        request = urllib.request.Request(
            self.address + path, json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with _opener.open(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as refusal:
            with refusal:
                return refusal.code, json.loads(refusal.read())

    def validate(self, prompt: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Queue a prompt, which the host validates first, and take it off the queue again.

        Where the host has begun to execute it, the first loader fails on an empty file, at once.
        """
        answer = self.post("/prompt", {"prompt": prompt})
        self.post("/queue", {"clear": True})
        return answer


@pytest.fixture(scope="package")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A server in whose model folders lie empty files of the names that the workflows ask for."""
    base = tmp_path_factory.mktemp("host")
    for path in WORKFLOWS:
        for folder, name in SavedWorkflow(path).models():
            file = base / "models" / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    with server.running(sys.executable, launcher.host_path(), base, arguments=["--cpu"]) as address:
        yield Host(address)


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request: pytest.FixtureRequest) -> SavedWorkflow:
    """Each example workflow in turn."""
    return SavedWorkflow(request.param)
