/** One bar per sampling step: colour = decision, height = measured DiT time. Used by both nodes. */

import { DECISIONS, decisionsText, median, stepText } from "./run.js";
import { element } from "./panel.js";

const SVG = "http://www.w3.org/2000/svg";
const TALLEST = 1.5; // in medians of the full steps: a slow first step must not flatten the others

/** @param {string} name @param {Record<string, string | number>} attributes */
function shape(name, attributes) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, String(value));
  return node;
}

/**
 * Bar heights as shares 0..1 of the tallest. Without a measurement a bar is full.
 * @param {import("./run.js").Run} run
 * @returns {number[]}
 */
export function heights(run) {
  const decisions = run.decisions ?? [];
  const times = decisions.map((_, step) => run.dit_ms?.[step] || null);
  const full = median(times.filter((_, step) => decisions[step] === "compute" || decisions[step] === "cache"));
  const top = Math.min(Math.max(0, ...times.map((time) => time ?? 0)), full ? full * TALLEST : Infinity);
  return times.map((time) => (time === null || !top ? 1 : Math.max(0.06, Math.min(1, time / top))));
}

/** The bars, and below them the legend, which gives way to the step under the pointer. */
export class Timeline {
  constructor() {
    this.bars = /** @type {SVGSVGElement} */ (shape("svg", {
      class: "blockdance-bars", preserveAspectRatio: "none", role: "img", tabindex: 0,
    }));
    this.caption = element("div", "blockdance-caption");
    this.element = element("div", "blockdance-timeline", this.bars, this.caption);
    /** @type {import("./run.js").Run} */
    this.run = {};
    this.step = -1;

    this.bars.addEventListener("pointermove", (event) => {
      const box = this.bars.getBoundingClientRect();
      this.#point(Math.floor(((event.clientX - box.left) / box.width) * this.#length));
    });
    this.bars.addEventListener("pointerleave", () => this.#point(-1));
    this.bars.addEventListener("blur", () => this.#point(-1));
    this.bars.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      event.stopPropagation(); // the host moves the selected node with the arrow keys
      this.#point(Math.max(0, Math.min(this.#length - 1, this.step + move)));
    });
  }

  get #length() {
    return this.run.decisions?.length ?? 0;
  }

  /**
   * @param {import("./run.js").Run} run while sampling: only its decisions, null where a step is still to come
   * @param {string} [summary] put before the spoken text
   */
  draw(run, summary = "") {
    this.run = run;
    const decisions = run.decisions ?? [];
    const tall = heights(run);
    this.bars.setAttribute("viewBox", `0 0 ${Math.max(decisions.length, 1)} 100`);
    this.bars.setAttribute("aria-label", [summary, decisionsText(decisions)].filter(Boolean).join(". "));
    this.bars.replaceChildren(
      ...decisions.map((decision, step) => shape("rect", {
        class: `blockdance-${decision ?? "pending"}`,
        x: step + 0.08, width: 0.84, y: 94 - 94 * tall[step], height: 94 * tall[step],
      })),
      shape("rect", { class: "blockdance-axis", x: 0, width: Math.max(decisions.length, 1), y: 97, height: 3 }),
      ...this.#window(),
    );
    this.#point(this.step);
  }

  #window() {
    const { first, last } = this.run.window ?? {};
    if (first == null || last == null || last < first) return [];
    return [shape("rect", { class: "blockdance-window", x: first, width: last - first + 1, y: 97, height: 3 })];
  }

  /** @param {number} step 0-based; outside the run: the legend */
  #point(step) {
    this.step = step >= 0 && step < this.#length ? step : -1;
    const pointed = this.step >= 0;
    [...this.bars.children].forEach((bar, index) => bar.classList.toggle("blockdance-pointed", index === this.step));
    this.caption.replaceChildren(...(pointed ? [stepText(this.run, this.step)] : this.#legend()));
  }

  #legend() {
    const used = DECISIONS.filter((decision) => this.run.decisions?.includes(decision));
    const entries = used.map((decision) => element("span", `blockdance-key blockdance-${decision}`, decision));
    if (this.#window().length) entries.push(element("span", "blockdance-key blockdance-window", "window"));
    return entries;
  }
}
