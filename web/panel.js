/** A block of HTML on a node, in both renderers of the host (canvas, and Vue = "Nodes 2.0"). */

import { app } from "/scripts/app.js";

const MARGIN = 6; // px; the canvas renderer keeps this free around the element
const FIRST_HEIGHT = 22; // px, until the content has been measured

/**
 * @param {string} tag
 * @param {string} className
 * @param {...(Node | string)} children
 * @returns {HTMLElement}
 */
export function element(tag, className, ...children) {
  const node = document.createElement(tag);
  node.className = className;
  node.append(...children);
  return node;
}

/**
 * Run `after` behind a callback of one node instance, whatever stands there already.
 * @param {any} owner
 * @param {string} name
 * @param {(...args: any[]) => void} after
 */
export function chain(owner, name, after) {
  const before = owner[name];
  owner[name] = function (/** @type {any[]} */ ...args) {
    const result = before?.apply(this, args);
    after(...args);
    return result;
  };
}

/**
 * Add a panel below the widgets of a node. It takes the height of its content and stores nothing in the workflow.
 * @param {any} node
 * @param {HTMLElement} body
 */
export function addPanel(node, body) {
  const root = element("div", "blockdance", body);
  let height = FIRST_HEIGHT;
  // A type name of our own: the Vue renderer replaces widgets whose type it knows. `serialize` must be off in both
  // places: the option is for the prompt, the property for the saved workflow (front end 1.47, LGraphNode.serialize).
  const widget = node.addDOMWidget("blockdance_panel", "blockdance_panel", root, {
    serialize: false,
    hideInPanel: true, // not an input to set in the side panel, which would also change its width
    margin: MARGIN,
    getMinHeight: () => height + 2 * MARGIN, // canvas only; the Vue renderer measures the element
    getMaxHeight: () => height + 2 * MARGIN,
  });
  widget.serialize = false;

  root.addEventListener("wheel", (event) => {
    if (!inVueNode(root)) app.canvas.processMouseWheel(event); // zoom, as over the rest of the canvas
  });
  const observer = new ResizeObserver(() => {
    const measured = Math.ceil(body.offsetHeight); // 0 while the node is off screen
    if (!measured || measured === height) return;
    height = measured;
    if (!inVueNode(root)) fit(node); // the Vue renderer grows its nodes itself
  });
  observer.observe(body);
  chain(node, "onRemoved", () => {
    observer.disconnect();
    root.remove();
  });
}

/** @param {HTMLElement} root @returns {boolean} whether the Vue renderer holds the panel */
const inVueNode = (root) => Boolean(root.closest("[data-node-id]"));

/** @param {any} node a node of the canvas renderer, grown to what its widgets need; never shrunk */
function fit(node) {
  const needed = node.computeSize()[1];
  if (needed > node.size[1]) node.setSize([node.size[0], needed]);
  node.setDirtyCanvas(true, true);
}
