"""A workflow built in the page, queued there, and sampled by the server."""

from __future__ import annotations

import random
import uuid

from browser.page import NodePage
from playwright.sync_api import expect

STEPS = 20
BUILD = """([steps, seed]) => {
  const { app, LiteGraph } = window, graph = app.rootGraph;
  const add = (type, x, y) => {
    const node = LiteGraph.createNode(type);
    node.pos = [x, y];
    graph.add(node);
    return node;
  };
  const set = (node, name, value) => { node.widgets.find(widget => widget.name === name).value = value; };
  const source = add("TinyModel", 0, 0), accelerate = add("BlockDanceAccelerate", 0, 160);
  const sampler = add("KSampler", 400, 0), report = add("BlockDanceReport", 800, 0);
  const shown = add("PreviewAny", 0, 700);
  const input = (node, name) => node.inputs.findIndex(slot => slot.name === name);
  source.connect(0, accelerate, input(accelerate, "model"));
  accelerate.connect(0, sampler, input(sampler, "model"));
  source.connect(1, sampler, input(sampler, "positive"));
  source.connect(2, sampler, input(sampler, "negative"));
  source.connect(3, sampler, input(sampler, "latent_image"));
  accelerate.connect(0, report, input(report, "model"));
  sampler.connect(0, report, input(report, "latent"));
  report.connect(2, shown, 0);
  set(sampler, "steps", steps);
  set(sampler, "seed", seed);
  set(sampler, "scheduler", "simple");
  set(sampler, "sampler_name", "euler");
  app.canvas.ds.scale = 0.8;
  app.canvas.ds.offset = [60, 60];
  app.canvas.setDirty(true, true);
  return [accelerate.id, report.id];
}"""
WATCH = """() => {
  window.testProgress = [];
  window.app.api.addEventListener("blockdance.progress", ({ detail }) => window.testProgress.push(detail));
}"""


def seed() -> int:
    """A new one each time, or the host would answer from its cache and not sample."""
    return random.SystemRandom().randrange(2**32)


def test_queued_run_fills_timeline_and_report(page: NodePage) -> None:
    accelerate, report = page.js(BUILD, [STEPS, seed()])
    expect(page.panel(accelerate)).to_contain_text("Values in force are shown after the first run.")
    page.js(WATCH)
    page.js("() => window.app.queuePrompt(0)")

    panel = page.panel(accelerate)
    expect(panel).to_contain_text(f"of {STEPS} steps reused", timeout=120_000)
    expect(panel).to_contain_text("Skips 6 of 8 blocks on reuse steps")
    expect(panel).to_contain_text("DiT step, median: compute")
    reused = panel.locator("svg .blockdance-reuse")
    assert 1 <= reused.count() < STEPS / 2
    assert page.widgets(accelerate)["boundary"]["label"] == "boundary (6 of 8 blocks)"

    told = page.js("() => window.testProgress")
    assert [event["step"] for event in told] == list(range(STEPS))
    assert [event["decision"] for event in told].count("reuse") == reused.count()

    expect(page.panel(report)).to_contain_text(f"of {STEPS} steps reused")
    expect(page.panel(report).locator("svg .blockdance-reuse")).to_have_count(reused.count())
    expect(page.panel(report).locator(".blockdance-steps tr")).to_have_count(STEPS + 1)


def test_queued_run_of_a_node_that_is_not_executed_shows_everything(page: NodePage) -> None:
    accelerate, _ = page.js(BUILD, [STEPS, seed()])
    page.js("() => window.app.queuePrompt(0)")
    expect(page.panel(accelerate)).to_contain_text(f"of {STEPS} steps reused", timeout=120_000)
    page.load_workflow({**page.saved(), "id": str(uuid.uuid4())})  # nothing is remembered, as in a new page
    page.js(
        "() => { const sampler = window.app.rootGraph.nodes.find(node => node.type === 'KSampler'); "
        "for (const [name, value] of [['seed', 7], ['steps', 24]]) "
        "sampler.widgets.find(widget => widget.name === name).value = value; }"
    )
    page.js("() => window.app.queuePrompt(0)")
    expect(page.panel(accelerate)).to_contain_text("of 24 steps reused", timeout=120_000)
    expect(page.panel(accelerate)).to_contain_text("Skips 6 of 8 blocks")


def test_run_that_goes_on_while_another_tab_is_open_is_shown_in_its_own(page: NodePage) -> None:
    accelerate, _ = page.js(BUILD, [STEPS, seed()])
    workflow = {**page.saved(), "id": str(uuid.uuid4())}
    page.load_workflow(workflow)
    page.js("() => window.app.queuePrompt(0)")
    page.load_workflow({**workflow, "id": str(uuid.uuid4())})  # nodes of the same ids
    page.page.wait_for_function(
        "async () => { const queue = await window.app.api.getQueue(); return !queue.Running.length && !queue.Pending.length; }",
        timeout=120_000)
    expect(page.panel(accelerate)).to_have_text("Values in force are shown after the first run.")
    page.load_workflow(workflow)
    expect(page.panel(accelerate)).to_contain_text(f"of {STEPS} steps reused")
    expect(page.panel(accelerate)).to_contain_text("Skips 6 of 8 blocks on reuse steps")
