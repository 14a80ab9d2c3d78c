"""BlockDanceReport: what happened in the runs of a MODEL."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io, ui

from blockdance_core.host import notify
from blockdance_core.host.attach import handle_of
from blockdance_core.plots import timeline
from blockdance_core.report import report

from .texts import described

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class BlockDanceReport(io.ComfyNode):
    """Reads the log of finished runs; the latent only makes it wait for the sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Ids and order are API."""
        return described(io.Schema(
            node_id="BlockDanceReport",
            display_name="BlockDance Report",
            category="model/BlockDance",
            is_output_node=True,
            inputs=[
                io.Model.Input("model"),
                io.Latent.Input("latent"),
            ],
            outputs=[
                io.Latent.Output(display_name="latent"),
                io.Image.Output(display_name="timeline"),
                io.String.Output(display_name="report"),
            ],
        ))

    @classmethod
    def execute(cls, model: ModelPatcher, latent: dict[str, Any]) -> io.NodeOutput:
        """Returns the latent, the step timeline [1, H, W, 3] and the report as JSON."""
        handle = handle_of(model)
        runs = handle.runs(notify.executing()[0]) if handle is not None else []
        result = report(runs, "not sampled yet" if handle is not None else "this model is not accelerated by BlockDance")
        text = json.dumps(result, allow_nan=False)
        return io.NodeOutput(latent, torch.from_numpy(timeline(result))[None], text, ui=ui.PreviewText(text))
