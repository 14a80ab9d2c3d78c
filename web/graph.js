/** Finding nodes by the ids that the server and the front end use for them. */

import { app } from "/scripts/app.js";

const SILENT = [2, 4]; // modes of a node that gives nothing: muted, bypassed

/**
 * @param {string | number} id a node id of the prompt; inside subgraphs a path such as `12:3`
 * @returns {any} the node, or null where the open workflow has none
 */
export function nodeByExecutionId(id) {
  const path = String(id).split(":");
  const last = path.pop();
  let graph = app.rootGraph;
  for (const part of path) graph = graph?.getNodeById(part)?.subgraph;
  return graph?.getNodeById(last) ?? null;
}

/**
 * @param {string} locator a key of the front end's stored outputs: `<node id>` or `<subgraph uuid>:<node id>`
 * @returns {any} the node, or null
 */
export function nodeByLocator(locator) {
  const [id, subgraph] = locator.split(":").reverse();
  const graph = subgraph ? app.rootGraph.subgraphs?.get(subgraph) : app.rootGraph;
  return graph?.getNodeById(id) ?? null;
}

/** @param {any} node @returns {string} a key that stays the same when the workflow is built again (undo, other tab) */
export function lastingKey(node) {
  return `${app.rootGraph.id}/${node.graph?.id}/${node.id}`;
}

/**
 * @param {any} node
 * @param {string} name an input
 * @returns {boolean} whether something feeds it, from outside where the link begins at an input of the node's subgraph
 */
export function isFed(node, name) {
  const input = node.inputs?.find((/** @type {any} */ one) => one.name === name);
  const link = input?.link == null ? undefined : node.graph?.getLink(input.link);
  if (!link) return false;
  const exposed = link.originIsIoNode ? node.graph.inputs[link.origin_slot] : undefined;
  if (!exposed) return !SILENT.includes(node.graph.getNodeById(link.origin_id)?.mode);
  const graphs = [app.rootGraph, ...(app.rootGraph.subgraphs?.values() ?? [])];
  const around = graphs.flatMap((graph) => graph.nodes).filter((/** @type {any} */ one) => one.subgraph === node.graph);
  return around.some((one) => isFed(one, exposed.name));
}
