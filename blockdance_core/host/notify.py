"""Messages to the page and the console. Without a running server they go to the log only."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)


def send(event: str, data: dict[str, Any]) -> None:
    """Send `blockdance.<event>` to the page that queued the prompt; to every open page if none did."""
    server = _server()
    if server is not None:
        server.send_sync(f"blockdance.{event}", data, server.client_id)


def progress_text(text: str, node_id: str | None) -> None:
    """Show a line under the node that is executing, such as the sampler."""
    server = _server()
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id, server.client_id)


def progress_bar() -> Callable[[int, int], None]:
    """The progress bar of the node that is executing: told how many of how many are done, it raises on an interrupt."""
    from comfy.utils import ProgressBar

    bar = ProgressBar(1)
    return bar.update_absolute


def picture_bar() -> Callable[[int, int, Callable[[], Image | None]], None]:
    """The same with a picture, which is made and sent at most once a second."""
    from comfy.utils import ProgressBar

    bar, sent = ProgressBar(1), 0.0

    def show(done: int, of: int, picture: Callable[[], Image | None]) -> None:
        nonlocal sent
        image = picture() if time.monotonic() - sent > 1 else None
        sent = time.monotonic() if image is not None else sent
        bar.update_absolute(done, of, None if image is None else ("JPEG", image, None))

    return show


def executing() -> tuple[str | None, str | None]:
    """(prompt id, node id) of the node that the host executes in this context; (None, None) outside of the server."""
    utils = sys.modules.get("comfy_execution.utils")
    context = utils.get_executing_context() if utils is not None else None
    return (context.prompt_id, context.node_id) if context is not None else (None, None)


def _server() -> Any:
    module = sys.modules.get("server")
    return getattr(getattr(module, "PromptServer", None), "instance", None)
