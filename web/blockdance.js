/** BlockDance in the page: what the Accelerate and the Report node show. */

import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";
import { AccelerateView, viewOf as accelerateOf } from "./accelerate.js";
import { nodeByExecutionId, nodeByLocator } from "./graph.js";
import { ReportView, viewOf as reportOf } from "./report.js";

/**
 * @param {string} event
 * @param {(detail: any) => Partial<import("./accelerate.js").State>} change
 */
function listen(event, change) {
  api.addEventListener(event, ({ detail }) => accelerateOf(nodeByExecutionId(detail.node_id))?.update(change(detail)));
}

/**
 * The values in force as the run had them: the host executes no node whose inputs are unchanged, so the node itself may
 * have been silent since the page was loaded.
 * @param {import("./run.js").Run} run
 */
function statusOf(run) {
  return run.config?.boundary_label ? { status: { supported: true, message: "", effective: run.config } } : {};
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
    listen("blockdance.run", (finished) => ({ finished, progress: undefined, ...statusOf(finished.run) }));
  },

  nodeCreated(node) {
    if (node.comfyClass === "BlockDanceAccelerate") new AccelerateView(node);
    if (node.comfyClass === "BlockDanceReport") new ReportView(node);
  },

  loadedGraphNode(node) {
    accelerateOf(node)?.restore();
  },

  /** Outputs that come back without an execution: another workflow tab, an entry of the history. */
  onNodeOutputsUpdated(outputs) {
    for (const [locator, output] of Object.entries(outputs)) reportOf(nodeByLocator(locator))?.show(output);
  },
});
