"""Nodes of the demo, registered only when the environment variable ``BLOCKDANCE_DEMO`` is 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import folder_paths
from comfy_api.latest import io

from .loader import MODELS, POLICIES

if TYPE_CHECKING:
    from .loader import DemoText

DemoTextType = io.Custom("BLOCKDANCE_DEMO_TEXT")
CATEGORY = "BlockDance/demo"


class BlockDanceDemoLoader(io.ComfyNode):
    """A demo model as MODEL, VAE and text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's interface."""
        return io.Schema(
            node_id="BlockDanceDemoLoader",
            display_name="Load BlockDance Demo Model",
            category=CATEGORY,
            description="Loads a small trained diffusion transformer that draws captioned scenes.",
            inputs=[io.Combo.Input("name", options=list(MODELS))],
            outputs=[io.Model.Output(), io.Vae.Output(), DemoTextType.Output(display_name="text_encoder")],
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        """MODEL, VAE and text encoder; a missing or damaged file is an error that names it."""
        from .loader import load_demo

        demo = load_demo(name)
        return io.NodeOutput(demo.model, demo.vae, demo.text)


class BlockDanceDemoCaption(io.ComfyNode):
    """A caption as CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's interface."""
        return io.Schema(
            node_id="BlockDanceDemoCaption",
            display_name="BlockDance Demo Caption",
            category=CATEGORY,
            description="One to four objects and a background, for example: a large red striped circle top left, "
            "a small blue plain square bottom right marked k, on a grey marbled background. What is left out is left to the "
            "model. Empty text is the unconditional caption.",
            inputs=[
                DemoTextType.Input("text_encoder"),
                io.String.Input("text", multiline=True),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, text_encoder: DemoText, text: str) -> io.NodeOutput:
        """CONDITIONING; a word outside the grammar is an error that names it."""
        return io.NodeOutput(text_encoder.encode(text))


class BlockDanceDemoLatent(io.ComfyNode):
    """An empty LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's interface."""
        return io.Schema(
            node_id="BlockDanceDemoLatent",
            display_name="Empty BlockDance Demo Latent",
            category=CATEGORY,
            description="An empty latent in the size of a demo model's pictures or clips.",
            inputs=[io.Model.Input("model"), io.Int.Input("batch_size", default=1, min=1, max=4096)],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, model: Any, batch_size: int) -> io.NodeOutput:
        """LATENT; a model that is none of ours is an error."""
        from .loader import empty_latent

        return io.NodeOutput({"samples": empty_latent(model, batch_size)})


def demo_nodes() -> list[type[io.ComfyNode]]:
    """The node classes to register. Adds the demo models' policies to what BlockDanceLoadPolicy lists."""
    folder_paths.add_model_folder_path("blockdance", str(POLICIES))
    return [BlockDanceDemoLoader, BlockDanceDemoCaption, BlockDanceDemoLatent]
