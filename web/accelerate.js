/** What the Accelerate node shows about itself: the values in force, then the run. */

import { isFed, lastingKey } from "./graph.js";
import { addPanel, chain, element } from "./panel.js";
import { noteTexts, percent, reusedText, sentence, settingsText, timeText } from "./run.js";
import { Timeline } from "./timeline.js";

/** Set by the presets `auto` and `paper`, so inactive under them; a policy decides in place of these and the preset. */
const PRESET_WIDGETS = ["start_percent", "end_percent", "window", "boundary", "forecast"];
const REMEMBERED = 50; // nodes

/**
 * @typedef {object} State
 * @property {{supported: boolean, message: string, effective: Record<string, any> | null}} [status]
 * @property {{step: number, steps: number, decisions: import("./run.js").Run["decisions"]}} [progress]
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
    /** @type {Map<any, string>} the widgets that a preset or a policy overrides, with their own labels */
    this.overridable = new Map();

    for (const widget of node.widgets) {
      chain(widget, "callback", () => this.#settingsChanged());
      if (["preset", ...PRESET_WIDGETS, "quality"].includes(widget.name)) this.overridable.set(widget, widget.label ?? widget.name);
    }

    this.headline = element("div", "blockdance-headline");
    this.timeline = new Timeline();
    this.facts = element("ul", "blockdance-facts");
    this.notes = element("ul", "blockdance-notes");
    addPanel(node, element("div", "blockdance-body", this.headline, this.timeline.element, this.facts, this.notes));
    views.set(node, this);

    chain(node, "onConfigure", () => this.render());
    chain(node, "onConnectionsChange", () => this.render());
    this.render();
  }

  /** @param {Partial<State>} change */
  update(change) {
    this.state = { ...this.state, ...this.#statusOf(change.finished?.run), ...change };
    const key = lastingKey(this.node);
    remembered.delete(key);
    remembered.set(key, this.state);
    if (remembered.size > REMEMBERED) remembered.delete(/** @type {string} */ (remembered.keys().next().value));
    this.render();
  }

  /**
   * The values in force as a run had them: the host executes no node whose inputs are unchanged, so the node itself may
   * have been silent since the page was loaded. Nothing where a widget was changed since the run was queued.
   * @param {import("./run.js").Run} [run]
   * @returns {Partial<State>}
   */
  #statusOf(run) {
    const config = run?.config;
    if (!config?.boundary_label) return {};
    const custom = config.preset === "custom" && !config.policy;
    const own = custom ? ["start_percent", "end_percent", "window", "forecast"] : [];
    if (custom && this.#value("boundary") !== -1) own.push("boundary"); // -1 leaves it to the model
    const same = ["preset", "group_size", ...own].every((name) => [undefined, config[name]].includes(this.#value(name)));
    const quality = this.#withoutQuality() ?? this.#value("quality");
    if (!same || ![undefined, config.quality].includes(quality)) return {};
    return { status: { supported: true, message: "", effective: config } };
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
    this.headline.classList.toggle("blockdance-warning", this.headline.textContent === status?.message);

    const run = progress ? { decisions: progress.decisions } : finished?.run;
    const lines = progress ? [`Sampling: step ${progress.step + 1} of ${progress.steps}`] : run ? facts(run) : [];
    const notes = !progress && run ? noteTexts(run) : [];
    this.facts.replaceChildren(...lines.map((text) => element("li", "", text)));
    this.notes.replaceChildren(...notes.map((text) => element("li", "", text)));
    this.timeline.element.hidden = !run?.decisions?.length;
    this.timeline.draw(run ?? {}, progress ? lines[0] : finished?.summary);
    this.node.setDirtyCanvas(true, true);
  }

  #headline() {
    const { status } = this.state;
    if (this.#value("enabled") === false) return "Off: every step is computed.";
    if (this.#value("group_size") === 1) return "Off (N = 1): every step is computed.";
    if (status && !status.supported) return status.message;
    const effective = this.#effective();
    if (effective) return settingsText(effective);
    return `Values in force are shown after the ${this.state.finished ? "next" : "first"} run.`;
  }

  /** @param {string} name @returns {any} the input slot of a widget */
  #slot(name) {
    return this.node.inputs?.find((/** @type {any} */ input) => input.widget?.name === name);
  }

  /** @param {string} name @returns {any} a widget's value; undefined where a link sets it */
  #value(name) {
    if (this.#slot(name)?.link != null) return undefined;
    return this.node.widgets.find((/** @type {any} */ widget) => widget.name === name)?.value;
  }

  #hasPolicy() {
    return isFed(this.node, "policy");
  }

  /** The values in force; undefined where they were told before a policy was connected or taken away. */
  #effective() {
    const effective = this.state.status?.effective;
    return !!effective?.policy === this.#hasPolicy() ? effective : undefined;
  }

  #settingsChanged() {
    this.update({ status: undefined }); // the values in force are known again when the node executes
  }

  /** Disable what preset or policy override and put the value in force into the label. Saved values stay as they are. */
  #markInactive() {
    for (const [widget, ownLabel] of this.overridable) {
      const label = this.#slot(widget.name)?.label ?? ownLabel; // the slot has a label where the user renamed it
      const value = widget.name === "quality" ? this.#withoutQuality() : this.#overriding(widget.name);
      widget.disabled = value !== undefined;
      widget.label = value === undefined ? label : `${label} (${value})`;
    }
  }

  /** @param {string} name @returns {string | undefined} what decides in place of a widget, or the value in force */
  #overriding(name) {
    const preset = this.#value("preset");
    if (this.#hasPolicy()) return "policy";
    return name !== "preset" && (preset === "auto" || preset === "paper") ? (this.#inForce(name) ?? preset) : undefined;
  }

  /** The guard watches forecasts: `off` where none is made. */
  #withoutQuality() {
    const preset = this.#value("preset");
    const none = preset === "paper" || (preset === "custom" && this.#value("forecast") === "hold");
    return none && !this.#hasPolicy() ? "off" : undefined;
  }

  /** @param {string} name @returns {string | undefined} */
  #inForce(name) {
    const effective = this.#effective();
    if (!effective) return undefined;
    if (name === "boundary") return effective.boundary_label;
    return typeof effective[name] === "number" ? effective[name].toFixed(2) : effective[name];
  }
}

/** @param {import("./run.js").Run} run @returns {string[]} */
function facts(run) {
  if (!run.decisions?.length) return [];
  const time = timeText(run);
  return [
    [run.window?.text, reusedText(run)].filter(Boolean).join("; "),
    time && `DiT step, median: ${time}`,
    run.cut_arithmetic ? `Estimated cut of DiT time: ${percent(run.cut_arithmetic)}` : "",
  ].filter(Boolean).map(sentence);
}
