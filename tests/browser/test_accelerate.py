"""What the Accelerate node shows."""

from __future__ import annotations

import pytest
from browser.page import DECISIONS, EFFECTIVE, RUN, STEPS, SUMMARY, NodePage, accelerate, node
from playwright.sync_api import expect

SET_BY_PRESET = ("start_percent", "end_percent", "window", "boundary", "forecast")
VALUES = [True, "auto", 3, 0.3, 0.9, "steps", 11, "delta", "cpu", "off"]


def disabled(page: NodePage) -> tuple[str, ...]:
    return tuple(name for name, widget in page.widgets(1).items() if widget["disabled"])


def test_page_loaded_registers_extension(page: NodePage) -> None:
    page.load(accelerate())
    assert page.js("() => window.app.extensions.filter(e => e.name === 'BlockDance').length") == 1


def test_node_before_a_run_shows_one_line(page: NodePage) -> None:
    page.load(accelerate())
    expect(page.panel(1)).to_have_text("Values in force are shown after the first run.")
    expect(page.panel(1).locator("svg")).to_be_hidden()
    box = page.panel(1).bounding_box()
    assert box is not None and box["height"] < 80


@pytest.mark.parametrize(("preset", "inactive"), [("auto", SET_BY_PRESET), ("paper", (*SET_BY_PRESET, "quality"))])
def test_preset_disables_what_it_sets_and_keeps_values(page: NodePage, preset: str, inactive: tuple[str, ...]) -> None:
    page.load(accelerate(preset=preset))
    assert disabled(page) == inactive
    assert [widget["value"] for widget in page.widgets(1).values()] == [True, preset, *VALUES[2:]]
    assert page.widgets(1)["boundary"]["label"] == f"boundary ({preset})"


def test_preset_chosen_by_hand_enables_and_disables(page: NodePage) -> None:
    page.load(accelerate())
    page.choose(1, "preset", "custom")
    assert page.widgets(1)["preset"]["value"] == "custom"
    assert disabled(page) == ()
    assert page.widgets(1)["start_percent"]["label"] == "start"
    page.choose(1, "forecast", "hold")
    assert disabled(page) == ("quality",), "hold makes no forecast that could be watched"
    assert page.widgets(1)["quality"]["label"] == "quality (off)"
    page.choose(1, "preset", "paper")
    assert disabled(page) == (*SET_BY_PRESET, "quality")
    assert [widget["value"] for widget in page.widgets(1).values()] == [True, "paper", *VALUES[2:7], "hold", *VALUES[8:]]


def test_status_effective_values_appear_in_panel_and_labels(page: NodePage) -> None:
    page.load(accelerate())
    page.send("status", node_id="1", supported=True, message="skips 21 of 28 blocks", effective=EFFECTIVE)
    expect(page.panel(1)).to_have_text(
        "Skips 21 of 28 blocks on reuse steps, window 40 % to 95 % of the noise level, N = 2, taylor"
    )
    labels = {name: widget["label"] for name, widget in page.widgets(1).items()}
    assert labels["boundary"] == "boundary (21 of 28 blocks)"
    assert labels["start_percent"] == "start (0.40)"
    assert labels["window"] == "window (noise_level)"
    if page.vue:
        expect(page.page.locator('[data-node-id="1"]')).to_contain_text("boundary (21 of 28 blocks)")


def test_status_after_change_of_a_setting_is_no_longer_shown(page: NodePage) -> None:
    page.load(accelerate())
    page.send("status", node_id="1", supported=True, message="", effective=EFFECTIVE)
    page.choose(1, "preset", "custom")
    expect(page.panel(1)).to_have_text("Values in force are shown after the first run.")


def test_connected_policy_disables_what_it_overrides_and_keeps_values(page: NodePage) -> None:
    page.load(accelerate(preset="custom"), node(2, "BlockDanceLoadPolicy", ["a.safetensors"], x=500))
    page.send("status", node_id="1", supported=True, message="", effective={**EFFECTIVE, "preset": "custom"})
    expect(page.panel(1)).to_contain_text("Skips 21 of 28 blocks")
    link = "() => { const { graph } = window.app; graph.getNodeById(2).connect(0, graph.getNodeById(1), 'policy'); }"
    page.js(link)
    assert disabled(page) == ("preset", *SET_BY_PRESET)
    assert page.widgets(1)["boundary"]["label"] == "boundary (policy)"
    expect(page.panel(1)).to_have_text("Values in force are shown after the first run.")
    page.send("status", node_id="1", supported=True, message="", effective={**EFFECTIVE, "policy": "tiny"})
    expect(page.panel(1)).to_have_text("Policy tiny, N = 2")
    page.send("status", node_id="1", supported=True, message="", effective={**EFFECTIVE, "policy": "tiny", "policy_cut": 0.6})
    expect(page.panel(1)).to_have_text("Policy tiny, cut up to 60 %")
    page.js("() => { window.app.graph.getNodeById(2).mode = 4; }")  # bypassed: the server gets no policy
    page.send("status", node_id="1", supported=True, message="", effective={**EFFECTIVE, "preset": "custom"})
    expect(page.panel(1)).to_contain_text("Skips 21 of 28 blocks")
    assert disabled(page) == ()
    page.js("() => { const node = window.app.graph.getNodeById(1); node.disconnectInput(node.findInputSlot('policy')); }")
    assert disabled(page) == ()
    assert page.widgets(1)["preset"]["label"] == "preset"
    assert [widget["value"] for widget in page.widgets(1).values()] == [True, "custom", *VALUES[2:]]


def test_run_of_a_silent_node_gives_the_values_in_force_unless_they_were_changed_since(page: NodePage) -> None:
    page.load(accelerate())
    page.send("run", node_id="1", summary=SUMMARY, run={**RUN, "config": {**EFFECTIVE, "group_size": 3}})
    expect(page.panel(1)).to_contain_text("Skips 21 of 28 blocks on reuse steps")
    assert page.widgets(1)["forecast"]["label"] == "forecast (taylor)"
    page.choose(1, "preset", "paper")
    page.send("run", node_id="1", summary=SUMMARY, run={**RUN, "config": {**EFFECTIVE, "group_size": 3}})
    expect(page.panel(1)).to_contain_text("Values in force are shown after the next run.")
    expect(page.panel(1)).to_contain_text("8 of 30 steps reused")
    assert page.widgets(1)["forecast"]["label"] == "forecast (paper)"


@pytest.mark.parametrize(("preset", "settings", "known"), [
    ("auto", {"quality": "balanced"}, False),
    ("auto", {"quality": "off", "boundary": 5}, True),
    ("custom", {"boundary": 5}, False),
    ("custom", {"boundary": VALUES[6]}, True),
])
def test_run_of_other_settings_does_not_give_the_values_in_force(
    page: NodePage, preset: str, settings: dict[str, object], known: bool
) -> None:
    page.load(accelerate(preset=preset))
    config = {**EFFECTIVE, **dict(zip(page.widgets(1), VALUES, strict=True)), "preset": preset, **settings}
    page.send("run", node_id="1", summary=SUMMARY, run={**RUN, "config": config})
    told = "Skips 21 of 28 blocks" if known else "Values in force are shown after the next run."
    expect(page.panel(1)).to_contain_text(told)


def test_status_unsupported_model_gives_the_reason(page: NodePage) -> None:
    page.load(accelerate())
    reason = "No block list found in UNetModel (children: input_blocks). The model passes through unchanged."
    page.send("status", node_id="1", supported=False, message=reason, effective=None)
    expect(page.panel(1)).to_have_text(reason)


@pytest.mark.parametrize(("values", "text"), [
    ([False, "auto", 2], "Off: every step is computed."), ([True, "auto", 1], "Off (N = 1): every step is computed."),
])
def test_node_switched_off_says_so(page: NodePage, values: list[object], text: str) -> None:
    page.load(node(1, "BlockDanceAccelerate", [*values, *VALUES[3:]]))
    expect(page.panel(1)).to_have_text(text)


def test_progress_fills_the_timeline(page: NodePage) -> None:
    page.load(accelerate())
    for done in (1, 14):
        decisions = DECISIONS[:done] + [None] * (STEPS - done)
        last = done - 1
        page.send("progress", node_id="1", step=last, steps=STEPS, decision=DECISIONS[last], decisions=decisions)
        expect(page.panel(1)).to_contain_text(f"Sampling: step {done} of {STEPS}")
        expect(page.panel(1).locator("svg .blockdance-pending")).to_have_count(STEPS - done)
    expect(page.panel(1).locator("svg .blockdance-reuse")).to_have_count(1)
    expect(page.panel(1).locator("svg")).to_be_visible()


def test_run_shows_bars_numbers_and_reasons(page: NodePage) -> None:
    page.load(accelerate())
    page.send("progress", node_id="1", step=0, steps=STEPS, decision="compute", decisions=DECISIONS)
    page.send("run", node_id="1", summary=SUMMARY, run=RUN)
    panel = page.panel(1)
    for text in (
        "Window covers 17 of 30 steps; 8 of 30 steps reused",
        "DiT step, median: compute 60.0 ms, reuse 20.0 ms",
        "Estimated cut of DiT time: 20 %",
        "40 % noise level is reached after 3 steps",
        "Computed instead of reused, 2 calls: a patch replaces block 0",
        "Computed instead of reused, 1 call: new stream",
    ):
        expect(panel).to_contain_text(text)
    expect(panel.locator("svg .blockdance-reuse")).to_have_count(8)
    expect(panel.locator("svg")).to_have_attribute("aria-label", f"{SUMMARY}. Steps " + ", ".join(
        ["1-12 compute", *(f"{step + 1} {DECISIONS[step]}" for step in range(12, 28)), "29-30 compute"]
    ))
    heights = [float(bar.get_attribute("height") or 0) for bar in panel.locator("svg rect").all()[:STEPS]]
    assert heights[0] == 94  # a slow first step is cut off, and does not flatten the others
    assert heights[13] / heights[12] == pytest.approx(20 / 60)


def test_pointer_on_a_bar_describes_the_step(page: NodePage) -> None:
    page.load(accelerate())
    page.send("run", node_id="1", summary=SUMMARY, run=RUN)
    panel = page.panel(1)
    panel.locator("svg .blockdance-reuse").first.hover()
    expect(panel).to_contain_text("step 14, reuse, sigma 4.69, 7 of 28 blocks run, 20.0 ms")
    panel.locator("svg").press("ArrowLeft")
    expect(panel).to_contain_text("step 13, cache")
    page.page.mouse.move(5, 5)
    expect(panel.locator(".blockdance-caption")).to_have_text("computecachereusewindow")


def test_run_without_measurement_shows_no_time(page: NodePage) -> None:
    page.load(accelerate())
    page.send("run", node_id="1", summary=SUMMARY, run={**RUN, "dit_ms": [0] * STEPS})
    expect(page.panel(1)).to_contain_text("8 of 30 steps reused")
    expect(page.panel(1)).not_to_contain_text("median")


def test_node_grows_with_its_content(page: NodePage) -> None:
    page.load(accelerate())
    page.send("run", node_id="1", summary=SUMMARY, run=RUN)
    expect(page.panel(1)).to_contain_text("new stream")
    page.page.wait_for_function(  # it grows with the next frame
        "panel => { const { canvas, canvas: { ds } } = window.app, { pos, size } = canvas.graph.getNodeById(1); "
        "const drawn = canvas.canvas.getBoundingClientRect().top + (pos[1] + size[1] + ds.offset[1]) * ds.scale; "
        "const bottom = panel.closest('[data-node-id]')?.getBoundingClientRect().bottom ?? drawn; "
        "return panel.getBoundingClientRect().bottom <= bottom + 1 && panel.scrollHeight <= panel.clientHeight; }",
        arg=page.panel(1).element_handle(),
    )


def test_wheel_over_the_panel_zooms_the_canvas(page: NodePage) -> None:
    page.load(accelerate())
    page.panel(1).hover()
    page.page.mouse.wheel(0, -200)
    page.page.wait_for_function("() => window.app.canvas.ds.scale > 1")


def test_side_panel_lists_the_settings_only(page: NodePage) -> None:
    page.load(accelerate())
    listed = page.js(
        "() => window.app.canvas.graph.getNodeById(1).widgets.filter(w => !w.options.hideInPanel).map(w => w.name)"
    )
    assert listed == list(page.widgets(1))


def test_save_and_load_keep_widget_values(page: NodePage) -> None:
    page.load(accelerate())
    page.send("status", node_id="1", supported=True, message="", effective=EFFECTIVE)
    page.send("run", node_id="1", summary=SUMMARY, run=RUN)
    saved = page.saved()
    assert saved["nodes"][0]["widgets_values"] == VALUES
    assert "blockdance_panel" not in str(saved)
    page.load_workflow(saved)
    assert [widget["value"] for widget in page.widgets(1).values()] == VALUES
    assert page.saved()["nodes"][0]["widgets_values"] == VALUES


def test_prompt_holds_the_widgets_own_values(page: NodePage) -> None:
    page.load(accelerate())
    page.send("status", node_id="1", supported=True, message="", effective=EFFECTIVE)
    prompt = page.js("() => window.app.graphToPrompt().then(({ output }) => output)")
    assert list(prompt["1"]["inputs"].values()) == VALUES


def test_interrupted_run_says_so(page: NodePage) -> None:
    page.load(accelerate())
    page.send("run", node_id="1", summary=SUMMARY, run={**RUN, "completed": False, "dit_ms": []})
    expect(page.panel(1)).to_contain_text("The run did not finish")


def test_workflow_built_again_shows_its_last_run(page: NodePage) -> None:
    page.load(accelerate())
    page.send("status", node_id="1", supported=True, message="", effective=EFFECTIVE)
    page.send("run", node_id="1", summary=SUMMARY, run=RUN)
    page.load_workflow(page.saved())  # what undo and a change of tab do
    expect(page.panel(1)).to_contain_text("8 of 30 steps reused")
    assert page.widgets(1)["boundary"]["label"] == "boundary (21 of 28 blocks)"
    page.choose(1, "preset", "custom")
    assert page.widgets(1)["boundary"]["label"] == "boundary"


def test_policy_input_that_a_subgraph_exposes_counts_where_something_is_connected_outside(page: NodePage) -> None:
    page.load(accelerate(preset="custom"), node(2, "BlockDanceLoadPolicy", ["a.safetensors"], x=900))
    leaf, outer = page.js(
        "() => { const { graph } = window.app; "
        "const { subgraph, node } = graph.convertToSubgraph(new Set([graph.getNodeById(1)])); "
        "const leaf = subgraph.nodes[0], slot = leaf.findInputSlot('policy'); "
        "subgraph.addInput('policy', 'BLOCKDANCE_POLICY').connect(leaf.inputs[slot], leaf); "
        "return [leaf.id, node.id]; }"
    )

    def greyed() -> list[str]:
        page.send("status", node_id=f"{outer}:{leaf}", supported=True, message="", effective={**EFFECTIVE, "preset": "custom"})
        found: list[str] = page.js(
            "([outer, leaf]) => window.app.rootGraph.getNodeById(outer).subgraph.getNodeById(leaf).widgets"
            ".filter((widget) => widget.disabled).map((widget) => widget.name)", [outer, leaf])
        return found

    assert greyed() == []
    page.js("(outer) => { const { graph } = window.app; graph.getNodeById(2).connect(0, graph.getNodeById(outer), 'policy'); }",
            outer)
    assert "preset" in greyed()
    page.js("() => { window.app.graph.getNodeById(2).mode = 4; }")
    assert greyed() == []


def test_node_in_nested_subgraphs_receives_its_events(page: NodePage) -> None:
    page.load(accelerate())
    path, = page.js(
        "() => { const { graph } = window.app; "
        "const inner = graph.convertToSubgraph(new Set([graph.getNodeById(1)])); "
        "const outer = graph.convertToSubgraph(new Set([inner.node])); "
        "const middle = outer.subgraph.nodes[0], leaf = middle.subgraph.nodes[0]; "
        "return [[outer.node.id, middle.id, leaf.id]]; }"
    )
    page.js(  # later, as a user would: front end 1.58 draws a node anew only where it was not drawn a moment before
        "([outer, middle]) => { const { canvas, graph } = window.app; "
        "canvas.setGraph(graph.getNodeById(outer).subgraph.getNodeById(middle).subgraph); }", path[:2],
    )
    page.send("run", node_id=":".join(str(number) for number in path), summary=SUMMARY, run=RUN)
    expect(page.panel(path[-1])).to_contain_text("8 of 30 steps reused")


@pytest.mark.parametrize("node_id", ["99", "1:3", "99:1", "2", "", None])
def test_event_for_no_such_node_is_ignored(page: NodePage, node_id: str | None) -> None:
    page.load(accelerate(), node(2, "KSampler", x=500))
    page.send("run", node_id=node_id, summary=SUMMARY, run=RUN)
    expect(page.panel(1)).not_to_contain_text("reused")


def test_removed_node_leaves_nothing(page: NodePage) -> None:
    page.load(accelerate())
    page.send("run", node_id="1", summary=SUMMARY, run=RUN)
    expect(page.panel(1)).to_contain_text("8 of 30 steps reused")
    page.js("() => { const { graph } = window.app; graph.remove(graph.getNodeById(1)); }")
    expect(page.page.locator(".blockdance")).to_have_count(0)
    page.send("run", node_id="1", summary=SUMMARY, run=RUN)
    assert page.js("() => Object.keys(window).filter(name => /blockdance/i.test(name))") == []
