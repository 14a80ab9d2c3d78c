/** What one sampling run says about itself. Pure: no page, no host. */

/** @typedef {"compute" | "cache" | "reuse" | "mixed"} Decision */

/**
 * One sampling run as the server reports it. A list has one entry per executed step.
 * @typedef {object} Run
 * @property {boolean} [completed] false where the run was interrupted or failed
 * @property {number} [steps]
 * @property {number[]} [sigmas] one more than steps where the last noise level is known
 * @property {number} [evaluations]
 * @property {{first?: number, last?: number, covered?: number, steps?: number, text?: string}} [window]
 * @property {(Decision | null)[]} [decisions] null while a step is still to come
 * @property {(number | null)[]} [boundary]
 * @property {number} [blocks_total]
 * @property {(number | null)[]} [blocks_run]
 * @property {number} [reused_calls]
 * @property {Record<string, number>} [fallbacks]
 * @property {(number | null)[]} [dit_ms] 0 where a step was not measured
 * @property {number} [cached_bytes]
 * @property {number} [predicted_bytes]
 * @property {string} [model_family]
 * @property {string[]} [warnings]
 * @property {Record<string, any>} [config]
 * @property {number} [cut_arithmetic] share 0..1 of the blocks that did not run
 */

/**
 * Sums over several runs, such as the tiles of an upscale.
 * @typedef {object} Totals
 * @property {number} runs
 * @property {number} steps
 * @property {number} reused_steps
 * @property {number} dit_ms
 * @property {number} cut_arithmetic
 */

/** @type {Decision[]} in the order of the legend */
export const DECISIONS = ["compute", "cache", "reuse", "mixed"];

/** @param {unknown} value @returns {value is number} */
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/**
 * @param {(number | null | undefined)[] | undefined} values
 * @returns {number | null} null where there is nothing to take the median of
 */
export function median(values) {
  const sorted = (values ?? []).filter(isNumber).sort((a, b) => a - b);
  if (!sorted.length) return null;
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/**
 * @param {Run} run
 * @param {...Decision} kinds
 * @returns {number | null} median measured DiT time of the steps with one of these decisions, ms
 */
export function medianTime(run, ...kinds) {
  const decisions = run.decisions ?? [];
  return median(run.dit_ms?.filter((ms, step) => Boolean(ms) && kinds.some((kind) => kind === decisions[step])));
}

/** @param {unknown} ms @returns {string} for example `18.4 ms`, or a dash */
export function milliseconds(ms) {
  if (!isNumber(ms)) return "-";
  return ms >= 10000 ? `${(ms / 1000).toFixed(1)} s` : `${ms.toFixed(ms < 100 ? 1 : 0)} ms`;
}

/** @param {unknown} bytes @returns {string} for example `72.0 MiB`, or a dash */
export function bytes(bytes) {
  if (!isNumber(bytes)) return "-";
  const units = ["B", "KiB", "MiB", "GiB"];
  const power = Math.min(units.length - 1, bytes > 0 ? Math.floor(Math.log2(bytes) / 10) : 0);
  return `${(bytes / 1024 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
}

/** @param {unknown} share 0..1 @returns {string} for example `26 %`, or a dash */
export function percent(share) {
  return isNumber(share) ? `${Math.round(share * 100)} %` : "-";
}

/** @param {unknown} sigma @returns {string} */
export function sigma(sigma) {
  return isNumber(sigma) ? String(Number(sigma.toPrecision(3))) : "-";
}

/**
 * @param {Run} run
 * @returns {string} for example `8 of 30 steps reused, 2 partly`
 */
export function reusedText(run) {
  const decisions = run.decisions ?? [];
  const count = (/** @type {Decision} */ kind) => decisions.filter((decision) => decision === kind).length;
  const partly = count("mixed");
  return `${count("reuse")} of ${decisions.length} steps reused${partly ? `, ${partly} partly` : ""}`;
}

/**
 * @param {Run} run
 * @returns {string} measured medians, for example `compute 61.0 ms, reuse 18.4 ms`; empty where nothing was measured
 */
export function timeText(run) {
  const full = medianTime(run, "compute", "cache");
  const reuse = medianTime(run, "reuse");
  const parts = [];
  if (full !== null) parts.push(`compute ${milliseconds(full)}`);
  if (reuse !== null) parts.push(`reuse ${milliseconds(reuse)}`);
  return parts.join(", ");
}

/**
 * @param {Record<string, any>} effective the values in force
 * @returns {string} for example `Skips 21 of 28 blocks on reuse steps, window 40 % to 95 % of the noise level, ...`
 */
export function settingsText(effective) {
  const guarded = effective.quality && effective.quality !== "off";
  if (effective.policy) {
    const speed = effective.policy_cut ? `cut up to ${percent(effective.policy_cut)}` : `N = ${effective.group_size}`;
    return `Policy ${effective.policy}, ${speed}${guarded ? `, ${effective.quality}` : ""}`;
  }
  if (guarded && effective.preset === "auto") return `Skips ${effective.boundary_label} wherever ${effective.quality} allows`;
  const of = effective.window === "steps" ? "of the steps" : "of the noise level";
  return [
    effective.boundary_label ? `Skips ${effective.boundary_label} on reuse steps` : "",
    isNumber(effective.start_percent)
      ? `window ${percent(effective.start_percent)} to ${percent(effective.end_percent)} ${of}` : "",
    isNumber(effective.group_size) ? `N = ${effective.group_size}` : "",
    effective.forecast ?? "",
    guarded ? effective.quality : "",
  ].filter(Boolean).join(", ");
}

/** @param {Run} run @returns {string[]} what went otherwise than planned: warnings, then reasons for not reusing */
export function noteTexts(run) {
  const reasons = Object.entries(run.fallbacks ?? {})
    .sort(([, a], [, b]) => b - a)
    .map(([reason, count]) => `Computed instead of reused, ${count} ${count === 1 ? "call" : "calls"}: ${reason}`);
  const unfinished = run.completed === false ? ["The run did not finish"] : [];
  return [...unfinished, ...(run.warnings ?? []), ...reasons].map(sentence);
}

/** @param {string} text @returns {string} with a capital first letter */
export const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

/**
 * @param {Run} run
 * @param {number} step 0-based
 * @returns {string} one step in words
 */
export function stepText(run, step) {
  const blocks = run.blocks_run?.[step];
  const parts = [`step ${step + 1}`, run.decisions?.[step] ?? "to come"];
  if (isNumber(run.sigmas?.[step])) parts.push(`sigma ${sigma(run.sigmas?.[step])}`);
  if (isNumber(blocks)) parts.push(`${blocks}${run.blocks_total ? ` of ${run.blocks_total}` : ""} blocks run`);
  if (run.dit_ms?.[step]) parts.push(milliseconds(run.dit_ms?.[step]));
  return parts.join(", ");
}

/**
 * @param {(Decision | null)[]} decisions
 * @returns {string} runs of equal decisions in words, for example `steps 1-12 compute, 13 cache, 14 reuse`
 */
export function decisionsText(decisions) {
  const spans = [];
  for (let first = 0, step = 1; step <= decisions.length; step++) {
    if (decisions[step] === decisions[first]) continue;
    spans.push(`${first + 1 === step ? step : `${first + 1}-${step}`} ${decisions[first] ?? "to come"}`);
    first = step;
  }
  return spans.length ? `Steps ${spans.join(", ")}` : "No steps";
}
