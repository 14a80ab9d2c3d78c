/** What the Accelerate node shows about itself: the values in force, then the run. */

import { lastingKey } from "./graph.js";
import { addPanel, chain, element } from "./panel.js";
import { noteTexts, percent, reusedText, sentence, settingsText, timeText } from "./run.js";
import { Timeline } from "./timeline.js";

/** Set by the presets `auto` and `paper`, so inactive under them. */
const PRESET_WIDGETS = ["start_percent", "end_percent", "window", "boundary", "forecast"];
const REMEMBERED = 50; // nodes

/**
 * @typedef {object} State
 * @property {{supported: boolean, message: string, effective: Record<string, any> | null}} [status]
 * @property {{step: number, steps: number, decisions: import("./run.js").Decision[]}} [progress]
 * @property {{summary: string, run: import("./run.js").Run}} [finished]
 */

/** @type {WeakMap<object, AccelerateView>} */
const views = new WeakMap();

/**
 * The last state of each node. Undo and a change of workflow tab build every node anew.
 * @type {Map<string, State>}
 */
const remembered = new Map();

/** @param {any} node @returns {AccelerateView | undefined} */
export const viewOf = (node) => views.get(node);

export class AccelerateView {
  /** @param {any} node */
  constructor(node) {
    this.node = node;
    /** @type {State} */
    this.state = {};
    /** @type {Map<any, string>} label of each inactive widget before we changed it */
    this.labels = new Map();

    this.headline = element("div", "blockdance-headline");
    this.timeline = new Timeline();
    this.facts = element("ul", "blockdance-facts");
    this.notes = element("ul", "blockdance-notes");
    addPanel(node, element("div", "blockdance-body", this.headline, this.timeline.element, this.facts, this.notes));
    views.set(node, this);

    for (const widget of node.widgets) {
      if (widget.name !== "blockdance_panel") chain(widget, "callback", () => this.#settingsChanged());
    }
    chain(node, "onConfigure", () => this.render());
    chain(node, "onConnectionsChange", () => this.render());
    this.render();
  }

  /** @param {Partial<State>} change */
  update(change) {
    this.state = { ...this.state, ...change };
    const key = lastingKey(this.node);
    remembered.delete(key);
    remembered.set(key, this.state);
    if (remembered.size > REMEMBERED) remembered.delete(/** @type {string} */ (remembered.keys().next().value));
    this.render();
  }

  /** Show again what this node showed before it was rebuilt. */
  restore() {
    this.state = remembered.get(lastingKey(this.node)) ?? this.state;
    this.render();
  }

  render() {
    const { status, progress, finished } = this.state;
    this.#markInactive();
    this.headline.textContent = this.#headline();
    this.headline.classList.toggle("blockdance-warning", status?.supported === false);

    const run = progress ? { decisions: progress.decisions } : finished?.run;
    this.timeline.element.hidden = !run?.decisions?.length;
    const settled = progress ? undefined : finished;
    this.facts.replaceChildren(...(settled ? facts(settled.run) : []).map((text) => element("li", "", text)));
    this.notes.replaceChildren(...(settled ? noteTexts(settled.run) : []).map((text) => element("li", "", text)));
    if (progress) {
      const { step, steps } = progress;
      this.timeline.draw(run ?? {}, { done: step + 1, steps, summary: `Sampling, step ${step + 1} of ${steps}` });
      this.facts.replaceChildren(element("li", "", `Sampling: step ${step + 1} of ${steps}`));
    } else if (finished) {
      this.timeline.draw(finished.run, { summary: finished.summary });
    }
    this.node.setDirtyCanvas(true, true);
  }

  #headline() {
    const { status } = this.state;
    if (this.#value("enabled") === false) return "Off: every step is computed.";
    if (this.#value("group_size") === 1) return "Off (N = 1): every step is computed.";
    if (status && !status.supported) return status.message;
    if (status?.effective) return [settingsText(status.effective), status.message].filter(Boolean).join(". ");
    return "Values in force are shown after the first run.";
  }

  /** @param {string} name @returns {any} a widget's value; undefined where a link sets it */
  #value(name) {
    const linked = this.node.inputs?.some((/** @type {any} */ i) => i.widget?.name === name && i.link != null);
    return linked ? undefined : this.node.widgets.find((/** @type {any} */ w) => w.name === name)?.value;
  }

  #settingsChanged() {
    this.update({ status: undefined }); // the values in force are known again when the node executes
  }

  /** Disable what the preset overrides and put the value in force into the label. Saved values stay as they are. */
  #markInactive() {
    const preset = this.#value("preset");
    const inactive = preset === "auto" || preset === "paper";
    for (const widget of this.node.widgets) {
      if (!PRESET_WIDGETS.includes(widget.name)) continue;
      if (!inactive && !this.labels.has(widget)) continue;
      const label = this.labels.get(widget) ?? widget.label ?? widget.name;
      if (inactive) this.labels.set(widget, label);
      else this.labels.delete(widget);
      widget.disabled = inactive;
      widget.label = inactive ? `${label} (${this.#inForce(widget.name) ?? preset})` : label;
    }
  }

  /** @param {string} name @returns {string | undefined} */
  #inForce(name) {
    const effective = this.state.status?.effective;
    if (!effective) return undefined;
    if (name === "boundary") return effective.boundary_label;
    return typeof effective[name] === "number" ? effective[name].toFixed(2) : effective[name];
  }
}

/** @param {import("./run.js").Run} run @returns {string[]} */
function facts(run) {
  const time = timeText(run);
  return [
    [run.window?.text, reusedText(run)].filter(Boolean).join("; "),
    time && `Median DiT time of a step: ${time}`,
    run.cut_arithmetic ? `Estimated cut of DiT time: ${percent(run.cut_arithmetic)}` : "",
  ].filter(Boolean).map(sentence);
}
