"""Run the real ComfyUI server with this pack in it, for dev.py and for the tests. Only the standard library is used."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
START_SECONDS = 240
LOG_LINES = 12


class ServerError(Exception):
    """The server cannot run; the message says why and what to do."""


@contextlib.contextmanager
def running(
    python: str | Path,
    host: Path,
    base: Path,
    *,
    port: int | None = None,
    arguments: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    models: Path | None = None,
    log: Path | None = None,
) -> Iterator[str]:
    """Start the host with this pack and its demo nodes, and stop it at the end.

    Args:
        python: The interpreter that has what the host needs.
        host: The ComfyUI folder.
        base: The host's base directory; whatever it writes goes there.
        port: The port on the loopback address; None takes a free one.
        arguments: Further arguments of the host's main.py; `--cpu` is added where torch finds no GPU.
        variables: The environment variables of the server; None hands on those of this process.
        models: A folder with the user's own models, read where given.
        log: Where the server's output goes; by default server.log in `base`.

    Yields:
        The address of the page.

    Raises:
        ServerError: The port is taken, or the server did not start or did not load the pack.
    """
    address = f"http://127.0.0.1:{take_port(port)}"
    log = log or base / "server.log"
    for name in ("custom_nodes", "user"):  # the host does not make these itself
        (base / name).mkdir(parents=True, exist_ok=True)
    paths = base / "paths.yaml"
    paths.write_text(extra_paths(models), encoding="utf-8")
    command = [str(python), str(REPO / "tests" / "host" / "launcher.py")]
    command += ["--listen", "127.0.0.1", "--port", address.rpartition(":")[2], "--disable-auto-launch"]
    command += ["--base-directory", str(base), "--extra-model-paths-config", str(paths)]
    command += ["--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}"]  # by default it lies in the host's folder
    command += ["--disable-api-nodes", "--disable-all-custom-nodes", "--whitelist-custom-nodes", REPO.name]
    command += [*([] if has_gpu(python) else ["--cpu"]), *arguments]
    own = {"COMFYUI_PATH": str(host), "BLOCKDANCE_DEMO": "1", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    inherited = os.environ if variables is None else variables
    apart: dict[str, Any] = {"start_new_session": True}  # Ctrl-C is for us; we stop the server in our own time
    if sys.platform == "win32":
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    with log.open("wb") as sink:
        child = subprocess.Popen(
            command,
            cwd=base,
            env={**inherited, **own},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            **apart,
        )
    try:
        _await_start(child, address, log)
        yield address
    finally:
        _stop(child)


def take_port(port: int | None) -> int:
    """The port asked for on the loopback address, if nobody has it; a free one for None."""
    with socket.socket() as probe:
        if sys.platform != "win32":  # there it would allow a port in use; here it spares the wait after a close
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port or 0))
        except (OSError, OverflowError) as error:
            advice = "name another with --port, or leave --port out to get a free one"
            raise ServerError(f"port {port} cannot be used ({error}): {advice}") from None
        return int(probe.getsockname()[1])


def extra_paths(models: Path | None) -> str:
    """The host's path file (YAML): the folder this pack lies in, and the user's own models."""
    lines = ["blockdance:", f"  custom_nodes: {json.dumps(str(REPO.parent))}"]
    if models is not None and models.is_dir():
        lines += [f"  {path.name}: {json.dumps(str(path))}" for path in sorted(models.iterdir()) if path.is_dir()]
    return "\n".join(lines) + "\n"


def has_gpu(python: str | Path) -> bool:
    """Whether the torch of an interpreter finds a GPU."""
    query = "import torch; print(torch.cuda.is_available() or torch.backends.mps.is_available())"
    done = subprocess.run([str(python), "-c", query], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ServerError(f"{python} cannot import torch ({reason}): repair that environment, or remove .dev and try again")
    return done.stdout.strip() == "True"


def log_excerpt(log: Path, pattern: str | None = None) -> str:
    """Lines of a log with its path: the last ones, or those that follow the first match of a pattern."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = max(0, len(lines) - LOG_LINES)
    first = last if pattern is None else next((i for i, line in enumerate(lines) if re.search(pattern, line)), last)
    return "\n".join([f"Its log, {log}, says:", *("    " + line for line in lines[first : first + LOG_LINES])])


def _await_start(child: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Wait until the server answers and knows the pack."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business on the loopback
    deadline = time.monotonic() + START_SECONDS
    known: dict[str, Any] | None = None
    while known is None:
        if child.poll() is not None:
            raise ServerError(f"ComfyUI ended with code {child.returncode} while starting. {log_excerpt(log)}")
        if time.monotonic() > deadline:
            raise ServerError(f"ComfyUI did not answer within {START_SECONDS} s. {log_excerpt(log)}")
        try:
            with opener.open(f"{address}/object_info/BlockDanceAccelerate", timeout=10) as answer:
                known = json.load(answer)
        except (OSError, ValueError):
            time.sleep(0.25)
    if not known:
        raise ServerError(f"ComfyUI runs but did not load this pack. {log_excerpt(log, 'Traceback|Cannot import')}")


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End the server: ask, then insist."""
    ways = [child.terminate, child.kill]
    if sys.platform != "win32":
        ways.insert(0, lambda: child.send_signal(signal.SIGINT))
    for end in ways:
        if child.poll() is None:
            end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=8)
