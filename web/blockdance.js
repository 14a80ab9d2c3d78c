/** BlockDance in the page: what the Accelerate and the Report node show. */

import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";
import { AccelerateView, viewOf as accelerateOf } from "./accelerate.js";
import { nodeByExecutionId, nodeByLocator } from "./graph.js";
import { ReportView, viewOf as reportOf } from "./report.js";

/** @typedef {Partial<import("./accelerate.js").State>} Change */

const PROMPTS = 200; // remembered

/**
 * The workflow of each prompt that was queued here: it may run while another tab is open.
 * @type {Map<string, string>}
 */
const workflowOf = new Map();

/**
 * What was told of nodes in workflows that are not open, by workflow and node.
 * @type {Map<string, Map<string, Change>>}
 */
const waiting = new Map();

/** Learn which workflow a prompt is of: neither the server nor the page says so later. */
function watchQueue() {
  const queuePrompt = api.queuePrompt;
  api.queuePrompt = async function (/** @type {any} */ number, /** @type {any} */ prompt, /** @type {any[]} */ ...rest) {
    const answer = await queuePrompt.call(this, number, prompt, ...rest);
    if (answer?.prompt_id && prompt?.workflow?.id) workflowOf.set(answer.prompt_id, prompt.workflow.id);
    if (workflowOf.size > PROMPTS) workflowOf.delete(/** @type {string} */ (workflowOf.keys().next().value));
    return answer;
  };
}

/**
 * @param {string} event
 * @param {(detail: any) => Change} change
 */
function listen(event, change) {
  api.addEventListener(event, ({ detail }) => {
    const workflow = workflowOf.get(detail.prompt_id) ?? app.rootGraph.id;
    if (workflow === app.rootGraph.id) {
      accelerateOf(nodeByExecutionId(detail.node_id))?.update(change(detail));
      return;
    }
    const nodes = waiting.get(workflow) ?? new Map();
    waiting.set(workflow, nodes.set(detail.node_id, { ...nodes.get(detail.node_id), ...change(detail) }));
  });
}

app.registerExtension({
  name: "BlockDance",

  init() {
    const link = document.createElement("link");
    link.rel = "stylesheet";
    link.href = new URL("./blockdance.css", import.meta.url).href;
    document.head.append(link);

    listen("blockdance.status", (status) => ({ status }));
    listen("blockdance.progress", (progress) => ({ progress }));
    listen("blockdance.run", (finished) => ({ finished, progress: undefined }));
    watchQueue();
  },

  nodeCreated(node) {
    if (node.comfyClass === "BlockDanceAccelerate") new AccelerateView(node);
    if (node.comfyClass === "BlockDanceReport") new ReportView(node);
  },

  loadedGraphNode(node) {
    accelerateOf(node)?.restore();
  },

  /** What happened while another workflow was open. */
  afterConfigureGraph() {
    for (const [id, change] of waiting.get(app.rootGraph.id) ?? []) accelerateOf(nodeByExecutionId(id))?.update(change);
    waiting.delete(app.rootGraph.id);
  },

  /** Outputs that come back without an execution: another workflow tab, an entry of the history. */
  onNodeOutputsUpdated(outputs) {
    for (const [locator, output] of Object.entries(outputs)) reportOf(nodeByLocator(locator))?.show(output);
  },
});
