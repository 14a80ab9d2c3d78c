"""Compare runs of the demo workflow with and without BlockDance on a ComfyUI that is already up.

``python dev.py demo`` starts that server and calls this. Each round takes another caption and seed and runs the
workflow once in full and once with every setting, so that neighbours in time are compared; DiT times are medians over
the rounds, fidelity is a mean over all pictures.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import dataclasses
import io
import json
import math
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import av
import numpy as np
import torch
from PIL import Image, ImageDraw

from blockdance_core import metrics
from demo import scenes
from demo.architectures import ARCHITECTURES
from demo.loader import MODELS

WORKFLOW = Path(__file__).with_name("workflow_api.json")
GROUP_SIZES = (2, 3, 4)
BATCH = 4
ROUNDS = 4
_SLOWER = 0.1  # no setting takes so much longer than the full run by itself
SECONDS = 30.0  # no round is begun that would end later than this
TILE, MARGIN = 128, 110  # pixels in the grid: a picture's side, and the place for a row's name
SCHEDULE = ("start_percent", "end_percent", "window", "boundary")  # inputs that say which steps reuse what

Prompt = dict[str, dict[str, Any]]
Progress = Callable[[int, int], None]


class DemoError(Exception):
    """The comparison cannot be made; the message says why."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One column of BlockDanceAccelerate's inputs that is compared. Group size 1 is the full run."""

    group_size: int = 1
    forecast: str = "hold"

    def __str__(self) -> str:
        return "full" if self.group_size == 1 else f"N={self.group_size} {self.forecast}"

    def inputs(self, schedule: Mapping[str, Any]) -> dict[str, Any]:
        """The node's inputs: the paper preset for `hold`, else its schedule with another forecast."""
        if self.group_size == 1:
            return {"enabled": False}
        common = {"enabled": True, "group_size": self.group_size}
        if self.forecast == "hold":
            return {**common, "preset": "paper"}
        return {**common, "preset": "custom", "forecast": self.forecast, **schedule}


FULL = Setting()
SETTINGS = [Setting(n, forecast) for forecast in ("hold", "taylor") for n in GROUP_SIZES]


@dataclasses.dataclass(frozen=True)
class Run:
    """What one queued workflow gave: its report and its pictures ``[B, H, W, C]``, float32 in 0..1."""

    report: dict[str, Any]
    images: torch.Tensor

    @property
    def dit_ms(self) -> float:
        """The time in the diffusion transformer, in ms."""
        return sum(ms or 0.0 for ms in self.report["dit_ms"])


Round = dict[Setting, Run]


class Client:
    """A connection to the server: one prompt at a time."""

    def __init__(self, address: str, session: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse[Any]) -> None:
        self.address = address
        self.session = session
        self.socket = socket

    async def knows(self, node: str) -> bool:
        """Whether the server has a node of this id."""
        async with self.session.get(f"{self.address}/object_info/{node}") as answer:
            return bool(await answer.json())

    async def run(self, prompt: Prompt, client_id: str, progress: Progress) -> dict[str, Any]:
        """Queue a prompt, wait for its end and return its outputs by node id."""
        async with self.session.post(f"{self.address}/prompt", json={"prompt": prompt, "client_id": client_id}) as answer:
            accepted = await answer.json()
            if answer.status != 200:
                raise DemoError(f"ComfyUI refused the workflow: {_refusal(accepted)}")
        prompt_id = accepted["prompt_id"]
        async for message in self.socket:
            if message.type is not aiohttp.WSMsgType.TEXT:  # previews are binary
                continue
            event = json.loads(message.data)
            data = event.get("data", {})
            if data.get("prompt_id") != prompt_id:
                continue
            if event["type"] == "progress":
                progress(data["value"], data["max"])
            elif event["type"] == "execution_error":
                raise DemoError(f"{data['node_type']} failed: {data['exception_message'].strip()}")
            elif event["type"] == "execution_interrupted":
                raise DemoError("the run was interrupted in ComfyUI")
            elif event["type"] == "executing" and data["node"] is None:
                break
        else:
            raise DemoError("ComfyUI closed the connection in mid-run")
        async with self.session.get(f"{self.address}/history/{prompt_id}") as answer:
            outputs: dict[str, Any] = (await answer.json())[prompt_id]["outputs"]
            return outputs

    async def fetch(self, file: Mapping[str, str]) -> bytes:
        """The content of an output file."""
        async with self.session.get(f"{self.address}/view", params=dict(file)) as answer:
            answer.raise_for_status()
            return await answer.read()


def _refusal(answer: Mapping[str, Any]) -> str:
    """The server's reasons for refusing a prompt."""
    faults = [
        f"{node['class_type']}: {error['message']} ({error['details']})"
        for node in (answer.get("node_errors") or {}).values()
        for error in node["errors"]
    ]
    return "; ".join(faults) or str(answer.get("error", answer))


# The workflow ---------------------------------------------------------------------------------------------------------


def nodes_of(prompt: Prompt, class_type: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The nodes of one class, as (id, node)."""
    return ((key, node) for key, node in prompt.items() if node["class_type"] == class_type)


def only(prompt: Prompt, class_type: str) -> tuple[str, dict[str, Any]]:
    """The one node of a class."""
    found = list(nodes_of(prompt, class_type))
    if len(found) != 1:
        raise DemoError(f"{WORKFLOW.name} holds {len(found)} {class_type} nodes; the demo needs exactly one")
    return found[0]


def variant(prompt: Prompt, accelerate: Mapping[str, Any], everywhere: Mapping[str, Any], caption: str) -> Prompt:
    """A copy of the workflow with other inputs.

    Args:
        prompt: The workflow in API form.
        accelerate: Inputs of BlockDanceAccelerate.
        everywhere: Inputs to set, by name, wherever a node has one that is not linked.
        caption: The text of every caption node whose text is not empty (an empty one is the negative).
    """
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        inputs = node["inputs"]
        inputs.update({k: v for k, v in everywhere.items() if k in inputs and not isinstance(inputs[k], list)})
        if node["class_type"] == "BlockDanceDemoCaption" and inputs["text"]:
            inputs["text"] = caption
    only(prompt, "BlockDanceAccelerate")[1]["inputs"].update(accelerate)
    return prompt


def save_floats(prompt: Prompt) -> Prompt:
    """Have the pictures saved as float32 EXR in place of 8-bit PNG, by the host's SaveImageAdvanced."""
    prompt = copy.deepcopy(prompt)
    node = only(prompt, "SaveImage")[1]
    node["class_type"] = "SaveImageAdvanced"
    node["inputs"].update(
        {"format": "exr", "format.bit_depth": "32-bit float", "format.input_color_space": "linear"}  # linear: as it is
    )
    return prompt


def decode(name: str, content: bytes) -> torch.Tensor:
    """A saved picture as ``[H, W, C]`` float32 in 0..1."""
    if not name.endswith(".exr"):
        return torch.from_numpy(np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), dtype=np.float32) / 255)
    codec = av.CodecContext.create("exr", "r")
    frames = [*codec.decode(av.Packet(content)), *codec.decode(None)]
    return torch.from_numpy(frames[0].to_ndarray(format="gbrpf32le")).clamp(0, 1)


# The comparison -------------------------------------------------------------------------------------------------------


def with_model(prompt: Prompt, model: str) -> Prompt:
    """The workflow with another demo model, sampled as its card says."""
    prompt = copy.deepcopy(prompt)
    only(prompt, "BlockDanceDemoLoader")[1]["inputs"]["name"] = model
    how = ARCHITECTURES[model].sampling
    only(prompt, "KSampler")[1]["inputs"].update(
        {"sampler_name": how["sampler"], **{key: how[key] for key in ("scheduler", "cfg", "steps")}}
    )
    return prompt


async def compare(address: str, model: str, rounds: int, seconds: float) -> tuple[list[Round], bool]:
    """Run all settings round by round until the rounds or the seconds are used up.

    Args:
        address: Where the server is.
        model: The demo model.
        rounds: How many at most.
        seconds: How long.

    Returns:
        The rounds, at least one, and whether their pictures are exact floats (else 8-bit).
    """
    prompt = with_model(json.loads(WORKFLOW.read_text(encoding="utf-8")), model)
    client_id = uuid.uuid4().hex
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{address}/ws", params={"clientId": client_id}, max_msg_size=0) as socket,
    ):
        client = Client(address, session, socket)
        floats = await client.knows("SaveImageAdvanced")
        prompt = save_floats(prompt) if floats else prompt
        saver = next(key for key, node in prompt.items() if node["class_type"].startswith("SaveImage"))
        reporter = only(prompt, "BlockDanceReport")[0]

        async def once(label: str, setting: Setting, caption: str, schedule: Mapping[str, Any], **inputs: int) -> Run:
            changed = variant(prompt, setting.inputs(schedule), {"batch_size": BATCH, **inputs}, caption)
            outputs = await client.run(changed, client_id, _progress(f"{label}, {setting}"))
            report = json.loads(outputs[reporter]["text"][0])
            files = outputs[saver]["images"]
            pictures = [decode(file["filename"], await client.fetch(file)) for file in files]
            return Run(report, torch.stack(pictures))

        captions = scenes.captions("validation", rounds, 0, ARCHITECTURES[model].moving, "hard")
        await once("warming up", FULL, captions[0], {}, seed=0, noise_seed=0, steps=2)
        done: list[Round] = []
        schedules: dict[int, dict[str, Any]] = {}
        start = time.monotonic()
        for index, caption in enumerate(captions):
            runs: Round = {}
            for setting in [FULL, *SETTINGS] if index % 2 == 0 else [*SETTINGS, FULL]:
                schedule = schedules.get(setting.group_size, {})
                label = f"round {index + 1}"
                run = await once(label, setting, caption, schedule, seed=index + 1, noise_seed=index + 1)
                if setting.forecast == "hold":
                    config = run.report.get("config") or {}
                    schedules[setting.group_size] = {key: config[key] for key in SCHEDULE if key in config}
                runs[setting] = run
            done.append(runs)
            spent = time.monotonic() - start
            if spent + spent / len(done) > seconds:
                break
        print(file=sys.stderr)
        return done, floats


def _progress(label: str) -> Progress:
    """Show a run's progress: a line that moves on a terminal, else a line a run."""
    moving = sys.stderr.isatty()
    if not moving:
        print(label, file=sys.stderr, flush=True)

    def show(value: int, maximum: int) -> None:
        if moving:
            print(f"\r{label}: step {value} of {maximum}".ljust(60), end="", file=sys.stderr, flush=True)

    return show


def summarise(rounds: Sequence[Round], floats: bool) -> dict[str, Any]:
    """The numbers of `--json`: the full run, and each setting against it.

    Identical pictures have an infinite PSNR, which no mean can hold: they are left out, and null stands where all are.
    """
    full_ms = statistics.median(runs[FULL].dit_ms for runs in rounds)
    if not full_ms > 0:
        raise DemoError("the report of the full run holds no DiT time, so there is nothing to compare with")
    runs = []
    for setting in SETTINGS:
        mine = [runs[setting] for runs in rounds]
        pairs = [(runs[setting].images, runs[FULL].images) for runs in rounds]
        dit_ms = statistics.median(run.dit_ms for run in mine)
        decibel = torch.cat([metrics.psnr(a, b) for a, b in pairs])
        psnr = decibel[decibel.isfinite()].mean().item()  # NaN where all are identical
        runs.append(
            {
                "group_size": setting.group_size,
                "forecast": setting.forecast,
                "steps": mine[0].report["steps"],
                "reused_steps": mine[0].report["reused_steps"],
                "dit_ms": round(dit_ms, 3),
                "cut": round(1 - dit_ms / full_ms, 4),
                "ssim": round(torch.cat([metrics.ssim(a, b) for a, b in pairs]).mean().item(), 6),
                "psnr": round(psnr, 3) if math.isfinite(psnr) else None,
            }
        )
    baseline = {
        "steps": rounds[0][FULL].report["steps"],
        "dit_ms": round(full_ms, 3),
        "rounds": len(rounds),
        "pictures": sum(len(runs[FULL].images) for runs in rounds),
        "pictures_as": "float32" if floats else "8-bit",
    }
    return {"baseline": baseline, "runs": runs}


def table(summary: Mapping[str, Any]) -> str:
    """The summary as text."""
    full = summary["baseline"]
    rows = [("group size", "forecast", "steps", "reused", "DiT time", "cut", "SSIM", "PSNR")]
    rows += [("full run", "-", str(full["steps"]), "0", f"{full['dit_ms'] / 1000:.2f} s", "-", "-", "-")]
    for run in summary["runs"]:
        psnr = "identical" if run["psnr"] is None else f"{run['psnr']:.1f} dB"
        numbers = (f"{run['dit_ms'] / 1000:.2f} s", f"{run['cut']:.1%}", f"{run['ssim']:.4f}", psnr)
        rows.append((str(run["group_size"]), run["forecast"], str(run["steps"]), str(run["reused_steps"]), *numbers))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    frames = ARCHITECTURES[summary.get("model", "sd3-mini")].frames
    things = "pictures" if frames == 1 else f"frames, {frames} a clip"
    notes = [
        f"DiT time of a batch of {full['pictures'] // full['rounds'] // frames}, median of {full['rounds']} round(s); "
        f"SSIM and PSNR against the full run, mean of {full['pictures']} {things} ({full['pictures_as']})."
    ]
    if any(not -_SLOWER <= run["cut"] <= run["reused_steps"] / run["steps"] for run in summary["runs"]):
        notes.append(
            "Some cuts exceed the share of reused steps, or are far below 0: the machine was busy, repeat this later."
        )
    return "\n".join([*lines, *notes])


def grid(rounds: Sequence[Round], columns: int = 8) -> Image.Image:
    """A row of pictures for every setting, the full run on top, a column for each picture."""
    rows = [(str(s), torch.cat([runs[s].images for runs in rounds])) for s in (FULL, *SETTINGS)]
    step = max(1, len(rows[0][1]) // columns)
    rows = [(name, images[::step][:columns]) for name, images in rows]
    sheet = Image.new("RGB", (MARGIN + TILE * len(rows[0][1]), TILE * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (name, images) in enumerate(rows):
        pen.text((8, y * TILE + TILE // 2 - 6), name, fill="black")
        for x, image in enumerate(images):
            pixels = (image * 255).round().to(torch.uint8).numpy()
            tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (MARGIN + x * TILE, y * TILE))
    return sheet


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print the table, write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("address", help="the address of the server")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the pictures go")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there")
    parser.add_argument("--model", choices=MODELS, default="sd3-mini", help="the demo model (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="captions to draw at most (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for them (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        rounds, floats = asyncio.run(compare(args.address, args.model, max(1, args.rounds), args.seconds))
        summary = {"model": args.model, **summarise(rounds, floats)}
    except KeyboardInterrupt:
        return 130
    except (DemoError, aiohttp.ClientError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    print(table(summary))
    sheet = args.out / "grid.png"
    grid(rounds).save(sheet)
    reports = {str(setting): [runs[setting].report for runs in rounds] for setting in (FULL, *SETTINGS)}
    (args.out / "reports.json").write_text(json.dumps(reports, indent=1), encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"Pictures: {sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
