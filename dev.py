#!/usr/bin/env python3
"""Try, serve, test and measure BlockDance in a real ComfyUI; needs nothing but Python and a network.

``python dev.py demo | serve | test | bench | calibrate | train-policy | train-demo | host-path``. The first call makes an
environment in .dev/ (or in BLOCKDANCE_DEV_DIR): a virtual environment, and the host, which is the ComfyUI named by
COMFYUI_PATH, or the one this folder lies in, or else a pinned release taken from PyPI. Only the standard library is imported
here; whatever needs torch runs in the environment.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import NoReturn

REPO = Path(__file__).resolve().parent
PYTHON_MIN = (3, 11)
PARALLEL = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadgroup")  # pytest-xdist; groups: tests/conftest.py
sys.path.append(str(REPO / "tests"))

from host import environment, server  # noqa: E402
from host.environment import Environment, SetupError, say  # noqa: E402


def demo(env: Environment, args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run the demo workflow with and without BlockDance; print a table, write pictures and numbers."""
    out = (args.out or environment.dev_folder() / "out").absolute()
    outputs = ["--out", str(out)]
    out.mkdir(parents=True, exist_ok=True)
    if args.json:
        args.json.absolute().parent.mkdir(parents=True, exist_ok=True)
        outputs += ["--json", str(args.json.absolute())]
    log = env.folder / "server.log"
    # nested, not in parentheses: an old Python must be able to read this file, to be told that it is too old
    with tempfile.TemporaryDirectory(prefix="run-", dir=env.folder, ignore_cleanup_errors=True) as base:  # noqa: SIM117
        with page(env, Path(base), args.port, log) as address:
            code = run_program(module(env, "demo.run", address, *outputs, *rest), env)
            if code:
                say(f"the demo did not finish; the server's log is {log}")
            elif args.keep_open:
                wait_at(address)
            return code


def serve(env: Environment, args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Start ComfyUI with the pack and its demo nodes for work by hand; what is made there is kept."""
    with page(env, env.folder / "serve", args.port, env.folder / "serve.log", rest) as address:
        wait_at(address)
    return 0


def test(env: Environment, args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run ruff, mypy and all tests (another host: its smoke part), or pytest alone with the arguments given."""
    os.chdir(REPO)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes: a second thread in each costs more than it gives
    python = str(env.python)
    checks: list[list[str]] = []
    if not rest:
        checks = [[python, "-m", "ruff", "check"], [python, "-m", "mypy"]]
        version = env.version()
        if version != environment.DEFAULT:
            rest = ["-m", "smoke"]
            say(f"ComfyUI {version or env.host} is not {environment.DEFAULT}: running the smoke part; `tests` runs all")
        rest = [*rest, *PARALLEL]
    # not `python -m pytest`, which puts this folder first on the path, where nodes/ hides the host's nodes.py
    checks.append([str(env.script("pytest")), *rest])
    codes = [run_program(check, env) for check in checks]
    return codes[-1] or max(codes)


def bench(env: Environment, args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Measure every method against full runs, in one process."""
    return run_program(module(env, "demo.bench", *rest), env)


def calibrate(env: Environment, args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Find the best schedules for a demo model and keep them in a policy file."""
    return run_program(module(env, "demo.calibrate", *rest), env)


def train_policy(env: Environment, args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Train an adaptive policy for a demo model, or go on where an earlier call ended."""
    return run_program(module(env, "demo.train_policy", *rest), env)


def train_demo(env: Environment, args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Train a demo model from nothing, or go on where an earlier call ended."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process for each core
    out = (args.out or environment.dev_folder() / "train").absolute()
    trial = ["--steps", args.steps] if args.steps else []
    return run_program(module(env, "demo.train", args.name, "--out", str(out), *trial, *rest), env)


def host_path(env: Environment, args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Print the folder of the host."""
    print(env.host)
    return 0


def page(env: Environment, base: Path, port: int | None, log: Path, rest: Sequence[str] = ()) -> AbstractContextManager[str]:
    """Run the server; models of the user's own ComfyUI are readable in it, and nothing of theirs is written."""
    say(f"starting ComfyUI {env.release or env.host} (log: {log})")
    models = None if env.release else env.host / "models"
    return server.running(
        env.python, env.host, base, port=port, arguments=rest, variables=env.variables(), models=models, log=log
    )


def wait_at(address: str) -> None:
    """Leave the page open until Ctrl-C."""
    say(f"ComfyUI with BlockDance is at {address} - press Ctrl-C to end it")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)


def module(env: Environment, name: str, *arguments: str) -> list[str]:
    """The command for a module of ours; this folder comes last on the path, as its nodes/ hides the host's nodes.py."""
    code = (
        "import runpy, sys; sys.path[:] = [p for p in sys.path if p] + [sys.argv.pop(1)]; "
        "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
    )
    return [str(env.python), "-c", code, str(REPO), name, *arguments]


def run_program(command: Sequence[str], env: Environment) -> int:
    """Run a program of the environment to its end and return its exit code; Ctrl-C reaches it before us."""
    child = subprocess.Popen(command, env=env.variables())
    try:
        return child.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=20)
        raise
    finally:
        if child.poll() is None:
            child.terminate()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="dev.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    usage = "demo | serve | test | bench | calibrate | train-policy | train-demo | host-path"
    commands = top.add_subparsers(dest="command", required=True, metavar=usage)
    receivers = {
        demo: "demo/run.py",
        serve: "ComfyUI",
        test: "pytest",
        bench: "demo/bench",
        calibrate: "demo/calibrate.py",
        train_policy: "demo/train_policy.py",
        train_demo: "demo/train",
        host_path: None,
    }
    for function, receiver in receivers.items():
        about = (function.__doc__ or "").splitlines()[0]
        more = f"Further arguments go to {receiver}." if receiver else None
        name = function.__name__.replace("_", "-")
        one = commands.add_parser(name, help=about, description=about, epilog=more, allow_abbrev=False)
        one.set_defaults(function=function, receiver=receiver)
        one.add_argument("--host", metavar="RELEASE", help=f"the ComfyUI release: {', '.join(environment.HOSTS)}")
        if function in (demo, serve):
            one.add_argument("--port", type=int, help="the port of the page (default: a free one)")
        if function is demo:
            one.add_argument("--keep-open", action="store_true", help="leave the page open until Ctrl-C")
            one.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there")
            one.add_argument("--out", type=Path, metavar="FOLDER", help="where the pictures go (default: .dev/out)")
        if function is train_demo:
            one.add_argument("name", choices=("sd3-mini", "pixart-mini", "wan-mini"), help="%(choices)s")
            one.add_argument("--out", type=Path, metavar="FOLDER", help="where the runs are kept (default: .dev/train)")
            one.add_argument("--steps", metavar="N", help="a trial of N steps, in a folder of its own")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    if rest and args.receiver is None:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), leave)
    try:
        check_python()
        if getattr(args, "port", None) is not None:
            server.take_port(args.port)  # before the minutes an environment takes
        env = environment.choose(args.host)
        environment.prepare(env)
        return int(args.function(env, args, rest))
    except KeyboardInterrupt:
        return 130
    except (SetupError, server.ServerError, OSError) as error:
        if os.environ.get("BLOCKDANCE_DEBUG"):
            raise
        print(f"dev.py: error: {explain(error)}", file=sys.stderr)
        return 1


def check_python() -> None:
    """Refuse a Python that is too old for the host."""
    if sys.version_info < PYTHON_MIN:
        found, needed = (".".join(map(str, version[:3])) for version in (sys.version_info, PYTHON_MIN))
        raise SetupError(f"this is Python {found} and {needed} or newer is needed: run dev.py with a newer Python")


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """On a signal, end in order, so that the server ends too."""
    raise SystemExit(128 + number)


def explain(error: Exception) -> str:
    """What happened and what to do, in one line."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error.filename or environment.dev_folder()}): free some space and run this again"
    if isinstance(error, OSError):
        return f"{error} (BLOCKDANCE_DEBUG=1 shows where)"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
