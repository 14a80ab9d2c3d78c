"""BlockDanceAccelerate: MODEL -> MODEL."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from blockdance_core.config import CACHE_DEVICES, PRESETS, QUALITIES, RECOMMENDED, WINDOWS, Config
from blockdance_core.families import UnsupportedModelError
from blockdance_core.forecast import FORECASTS
from blockdance_core.host import notify
from blockdance_core.host.attach import attach, handle_of

from .load_policy import PolicyType
from .texts import described

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

log = logging.getLogger(__name__)


class BlockDanceAccelerate(io.ComfyNode):
    """Patches a clone of the model; place it after the loader or the last LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Ids and order of the inputs are API: saved widget values are positional, new widgets go last."""
        return described(io.Schema(
            node_id="BlockDanceAccelerate",
            display_name="BlockDance Accelerate",
            category="model/BlockDance",
            search_aliases=["cache", "teacache", "easycache", "speed up", "accelerate"],
            inputs=[
                io.Model.Input("model"),
                io.Boolean.Input("enabled", default=True),
                io.Combo.Input("preset", options=list(PRESETS), default=Config.preset),
                io.Int.Input("group_size", display_name="N", default=Config.group_size, min=1, max=64),
                io.Float.Input("start_percent", default=Config.start_percent, min=0.0, max=1.0, step=0.01, advanced=True),
                io.Float.Input("end_percent", default=Config.end_percent, min=0.0, max=1.0, step=0.01, advanced=True),
                io.Combo.Input("window", options=list(WINDOWS), default=Config.window, advanced=True),
                io.Int.Input("boundary", default=Config.boundary, min=RECOMMENDED, max=9999, advanced=True),
                io.Combo.Input("forecast", options=list(FORECASTS), default=Config.forecast, advanced=True),
                io.Combo.Input("cache_device", options=list(CACHE_DEVICES), default=Config.cache_device, advanced=True),
                PolicyType.Input("policy", optional=True),
                io.Combo.Input("quality", options=list(QUALITIES), default=Config.quality, optional=True),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        ))

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        enabled: bool,
        preset: str,
        group_size: int,
        start_percent: float = Config.start_percent,
        end_percent: float = Config.end_percent,
        window: str = Config.window,
        boundary: int = Config.boundary,
        forecast: str = Config.forecast,
        cache_device: str = Config.cache_device,
        policy: Any = None,
        quality: str = Config.quality,
    ) -> io.NodeOutput:
        """Returns the accelerated clone, or the model itself where it cannot be accelerated, and says so."""
        config = Config(
            enabled=enabled, preset=preset, group_size=group_size, start_percent=start_percent, end_percent=end_percent,
            window=window, boundary=boundary, forecast=forecast, cache_device=cache_device,
            policy=policy, quality=quality,
        )
        node_id = getattr(cls.hidden, "unique_id", None)
        prompt_id, _ = notify.executing()
        try:
            accelerated = attach(model, config, node_id)
        except UnsupportedModelError as error:
            message = f"{error} The model passes through unchanged."
            log.warning("BlockDance: %s", message)
            notify.send("status", {"node_id": node_id, "prompt_id": prompt_id, "supported": False, "message": message,
                                   "effective": None})
            return io.NodeOutput(model)
        handle = handle_of(accelerated)
        if handle is not None:
            effective = handle.effective
            message = (
                "off: every block is computed" if not config.active
                else f"follows the policy {effective.policy}" if effective.policy
                else f"skips {effective.boundary_label} wherever {quality} allows" if config.guard_alone
                else f"skips {effective.boundary_label}"
            )
            notify.send("status", {
                "node_id": node_id, "prompt_id": prompt_id, "supported": True, "message": message,
                "effective": effective.as_dict() | {"model_family": handle.family},
            })
        return io.NodeOutput(accelerated)
