/** The Report node's JSON as a page: timeline, numbers, steps. */

import { addPanel, chain, element } from "./panel.js";
import { bytes, milliseconds, noteTexts, percent, reusedText, settingsText, sigma, timeText } from "./run.js";
import { Timeline } from "./timeline.js";

/** @type {WeakMap<object, ReportView>} */
const views = new WeakMap();

/** @param {any} node @returns {ReportView | undefined} */
export const viewOf = (node) => views.get(node);

export class ReportView {
  /** @param {any} node */
  constructor(node) {
    this.text = "";
    /** @type {import("./run.js").Run[]} */
    this.runs = [];
    /** @type {import("./run.js").Totals | undefined} */
    this.totals = undefined;
    this.reason = "The report appears after a run.";

    this.message = element("div", "blockdance-headline");
    this.choice = /** @type {HTMLSelectElement} */ (element("select", "blockdance-choice"));
    this.choice.setAttribute("aria-label", "Run");
    this.choice.addEventListener("change", () => this.#draw());
    this.copy = /** @type {HTMLButtonElement} */ (element("button", "blockdance-copy", "Copy JSON"));
    this.copy.type = "button";
    this.copy.addEventListener("click", () => this.#copy());
    this.bar = element("div", "blockdance-toolbar", this.choice, this.copy);
    this.timeline = new Timeline();
    this.numbers = element("table", "blockdance-numbers");
    this.notes = element("ul", "blockdance-notes");
    this.table = element("table", "blockdance-steps");
    const scroll = element("div", "blockdance-scroll", this.table);
    scroll.addEventListener("wheel", (event) => event.stopPropagation()); // scrolls the table, not the canvas
    this.details = element("details", "", element("summary", "", "Every step"), scroll);
    addPanel(node, element(
      "div", "blockdance-body", this.bar, this.message, this.timeline.element, this.numbers, this.notes, this.details,
    ));
    views.set(node, this);

    chain(node, "onExecuted", (output) => this.show(output));
    this.#draw();
  }

  /** @param {{text?: string | string[]} | undefined} output the node's `ui` output */
  show(output) {
    const text = [output?.text].flat()[0];
    const report = typeof text === "string" ? parsed(text) : undefined;
    if (!report) return;
    this.text = text;
    this.runs = report.runs ?? [];
    this.totals = report.totals;
    this.reason = report.warnings?.join(" ") || "The report holds no sampling run.";
    this.choice.replaceChildren(...this.runs.map((run, index) => {
      const option = /** @type {HTMLOptionElement} */ (element("option", "", `Run ${index + 1}: ${reusedText(run)}`));
      option.value = String(index);
      return option;
    }));
    this.choice.value = String(this.runs.length - 1);
    this.#draw();
  }

  #draw() {
    const run = this.runs[Number(this.choice.value)];
    this.message.hidden = Boolean(run);
    this.message.textContent = this.reason;
    this.bar.hidden = !this.text;
    this.choice.hidden = this.runs.length < 2;
    for (const part of [this.timeline.element, this.numbers, this.notes, this.details]) part.hidden = !run;
    if (!run) return;
    this.timeline.draw(run, [reusedText(run), timeText(run)].filter(Boolean).join(", "));
    const sums = this.totals && this.runs.length > 1 ? totalsText(this.totals) : "";
    this.numbers.replaceChildren(...[...numbers(run), ...(sums ? [["All runs", sums]] : [])].map((pair) => row("td", pair)));
    this.notes.replaceChildren(...noteTexts(run).map((text) => element("li", "", text)));
    this.table.replaceChildren(
      row("th", ["step", "sigma", "decision", "boundary", "blocks run", "DiT time"]),
      ...(run.decisions ?? []).map((decision, step) => row("td", [
        String(step + 1), sigma(run.sigmas?.[step]), decision ?? "-", String(run.boundary?.[step] ?? "-"),
        String(run.blocks_run?.[step] ?? "-"), milliseconds(run.dit_ms?.[step] || null),
      ])),
    );
  }

  async #copy() {
    this.copy.textContent = (await copied(this.text)) ? "Copied" : "Copy failed";
    setTimeout(() => (this.copy.textContent = "Copy JSON"), 1500);
  }
}

/** @param {string} text @returns {any} a report; undefined for any other text, of a node of the same id in another workflow */
function parsed(text) {
  try {
    const found = JSON.parse(text);
    return Array.isArray(found?.runs) ? found : undefined;
  } catch {
    return undefined;
  }
}

/** @param {"td" | "th"} cell @param {string[]} values */
function row(cell, values) {
  return element("tr", "", ...values.map((value) => element(cell, "", value)));
}

/** @param {import("./run.js").Run} run @returns {[string, string][]} names and values of the summary */
function numbers(run) {
  const total = run.dit_ms?.reduce((/** @type {number} */ sum, time) => sum + (time ?? 0), 0);
  const stored = `${bytes(run.cached_bytes)}, predicted ${bytes(run.predicted_bytes)}`;
  /** @type {[string, string | number | undefined][]} */
  const rows = [
    ["Model", run.model_family],
    ["Settings", settingsText(run.config ?? {})],
    ["Window", run.window?.text],
    ["Steps", reusedText(run)],
    ["DiT total", total ? milliseconds(total) : undefined],
    ["DiT per step", timeText(run) && `${timeText(run)} (medians)`],
    ["Cut", run.cut_arithmetic == null ? undefined : `${percent(run.cut_arithmetic)} (estimate)`],
    ["Evaluations", run.evaluations],
    ["Reused calls", run.reused_calls],
    ["Stored", run.cached_bytes == null ? undefined : stored],
  ];
  return rows.filter(([, value]) => value != null && value !== "").map(([name, value]) => [name, String(value)]);
}

/** @param {import("./run.js").Totals} totals */
function totalsText(totals) {
  const reused = `${totals.reused_steps} of ${totals.steps} steps reused in ${totals.runs} runs`;
  return `${reused}, DiT total ${milliseconds(totals.dit_ms)}, cut ${percent(totals.cut_arithmetic)} (estimate)`;
}

/** @param {string} text @returns {Promise<boolean>} */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text); // absent on plain http from another machine
    return true;
  } catch {
    const area = /** @type {HTMLTextAreaElement} */ (element("textarea", "blockdance-offscreen"));
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
