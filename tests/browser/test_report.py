"""What the Report node shows."""

from __future__ import annotations

import json
from typing import Any

from browser.page import DECISIONS, RUN, STEPS, NodePage, accelerate, report
from playwright.sync_api import expect

SECOND: dict[str, Any] = {
    **RUN, "steps": 2, "sigmas": [1.0, 0.5, 0.0], "decisions": ["compute", "compute"], "dit_ms": [31.0, 33.0],
    "blocks_run": [28, 28], "boundary": [None, None], "fallbacks": {}, "warnings": ["too few steps"],
    "window": {"first": None, "last": None, "covered": 0, "steps": 2, "text": "window covers 0 of 2 steps"},
}
TOTALS = {"runs": 2, "steps": 32, "reused_steps": 8, "dit_ms": 2384.0, "cut_arithmetic": 0.19}
TEXT = json.dumps({**SECOND, "runs": [RUN, SECOND], "totals": TOTALS})


def execute(page: NodePage, text: str, node_id: str = "2") -> None:
    """Let the page know the node's output, as the server does."""
    page.js(
        "([node, text]) => window.app.api.dispatchCustomEvent('executed', "
        "{ node, display_node: node, prompt_id: 'p', output: { text: [text] } })", [node_id, text],
    )


def copy(page: NodePage) -> None:
    """Press the button and wait for its answer, which stands there for a moment only."""
    button = page.panel(2).get_by_role("button")
    button.evaluate(
        "button => { button.copied = new Promise(done => new MutationObserver(() => done(button.textContent))"
        ".observe(button, { childList: true })); }"
    )
    button.click()
    assert button.evaluate("button => button.copied") == "Copied"


def test_node_before_a_run_says_when_the_report_comes(page: NodePage) -> None:
    page.load(report())
    expect(page.panel(2).get_by_text("The report appears after a run.")).to_be_visible()
    expect(page.panel(2).get_by_role("button")).to_have_count(0)  # hidden


def test_report_shows_the_last_run(page: NodePage) -> None:
    page.load(report())
    execute(page, TEXT)
    panel = page.panel(2)
    expect(panel.get_by_role("combobox")).to_have_value("1")
    expect(panel).to_contain_text("compute 32.0 ms (medians)")
    expect(panel).to_contain_text("Too few steps")
    expect(panel.locator("svg .blockdance-compute")).to_have_count(2)


def test_report_other_run_chosen_shows_its_numbers_and_steps(page: NodePage) -> None:
    page.load(report())
    execute(page, TEXT)
    panel = page.panel(2)
    panel.get_by_role("combobox").select_option("0")
    rows = dict(row.locator("td").all_inner_texts() for row in panel.locator(".blockdance-numbers tr").all())
    assert rows == {
        "Model": "PixArt",
        "Settings": "Skips 21 of 28 blocks on reuse steps, window 40 % to 95 % of the noise level, N = 2, taylor",
        "Window": "window covers 17 of 30 steps",
        "Steps": "8 of 30 steps reused",
        "DiT total": "2320 ms",
        "DiT per step": "compute 60.0 ms, reuse 20.0 ms (medians)",
        "Cut": "20 % (estimate)",
        "Evaluations": "30",
        "Reused calls": "8",
        "Stored": "18.0 MiB, predicted 18.0 MiB",
        "All runs": "8 of 32 steps reused in 2 runs, DiT total 2384 ms, cut 19 % (estimate)",
    }
    panel.get_by_text("Every step").click()
    steps = panel.locator(".blockdance-steps tr")
    expect(steps).to_have_count(STEPS + 1)
    assert steps.nth(14).locator("td").all_inner_texts() == ["14", "4.69", DECISIONS[13], "20", "7", "20.0 ms"]


def test_report_copied_is_the_json(page: NodePage) -> None:
    page.load(report())
    execute(page, TEXT)
    copy(page)
    assert page.js("() => navigator.clipboard.readText()") == TEXT


def test_report_without_clipboard_is_still_copied(page: NodePage) -> None:
    page.load(report())
    execute(page, TEXT)
    page.js("() => navigator.clipboard.writeText('')")
    page.js("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('not allowed')); }")
    copy(page)
    page.js("() => { delete navigator.clipboard.writeText; }")
    assert page.js("() => navigator.clipboard.readText()") == TEXT


def test_report_without_runs_gives_the_reason(page: NodePage) -> None:
    page.load(report())
    execute(page, json.dumps({"steps": 0, "decisions": [], "warnings": ["this model is not accelerated"], "runs": []}))
    expect(page.panel(2)).to_contain_text("this model is not accelerated")
    expect(page.panel(2).locator("svg")).to_be_hidden()


def test_outputs_of_the_history_are_shown(page: NodePage) -> None:
    page.load(report())
    page.js("text => { window.app.nodeOutputs = { 2: { text: [text] }, 77: { text: [text] } }; }", TEXT)
    expect(page.panel(2)).to_contain_text("window covers 0 of 2 steps")


def test_text_of_another_node_is_no_report(page: NodePage) -> None:
    page.load(report())
    for text in ("a cat", "[1]", "null", '{"runs": 1}'):
        execute(page, text)
    expect(page.panel(2).get_by_text("The report appears after a run.")).to_be_visible()


def test_report_is_not_saved_in_the_workflow(page: NodePage) -> None:
    page.load(report(), accelerate())
    execute(page, TEXT)
    expect(page.panel(2)).to_contain_text("Too few steps")
    saved = {node["id"]: node for node in page.saved()["nodes"]}
    assert saved[2].get("widgets_values", []) == []
