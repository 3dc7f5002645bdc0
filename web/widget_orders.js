// Which widget each stored value belongs to, in files that were saved by other versions of these nodes.
//
// A workflow file holds the values of a node as a list without names, in the order of its widgets. Raylight changed that
// order several times, so its files would put values into the wrong widgets. What they have in common is one string that
// cannot be mistaken: the attention kernel. Its place and the number of values tell the versions apart.
//
// Nothing here needs a browser.

const ATTENTION = "XFuser_attention"
const COMMON = ["ray_cluster_address", "ray_cluster_namespace", "GPU", "ulysses_degree", "ring_degree", "cfg_degree"]
const SHARDED = ["FSDP", "FSDP_CPU_OFFLOAD", ATTENTION]
const TESTED = ["skip_comm_test", "use_mmap"]
const UNKNOWN = null // a value whose name is not known

// What earlier versions stored. The order of the present node is not among them: it is read from the node.
export const ORDERS = {
  RayInitializer: [
    // until January 2026
    [...COMMON, "sync_ulysses", ...SHARDED],
    // a fork of January 2026
    [...COMMON, "sync_ulysses", ...SHARDED, "ray_object_store_gb", "gpu_indices"],
    // March 2026
    [...COMMON, "sync_ulysses", ...SHARDED, ...TESTED],
    // April 2026
    [...COMMON, "dp_degree", "sync_ulysses", ...SHARDED, ...TESTED],
    // Raylight 1.5
    [...COMMON, "dp_degree", "sync_ulysses", "clear_vram_after_sampling", ...SHARDED, ...TESTED],
    // the fork in April 2026
    [...COMMON, "tensor_parallel_degree", "sync_ulysses", ...SHARDED, ...Array(14).fill(UNKNOWN), "gpu_indices"],
  ],
  RayInitializerAdvanced: [
    // a fork of January 2026
    [
      "ray_cluster_address", "ray_cluster_namespace", "ray_object_store_gb", "ray_dashboard_address", "torch_dist_address",
      "GPU", "ulysses_degree", "ring_degree", "cfg_degree", "sync_ulysses", ...SHARDED, "gpu_indices",
    ],
    // Raylight 1.5
    [
      "ray_cluster_address", "ray_cluster_namespace", "GPU", "GPU_SELECT", "ulysses_degree", "ring_degree",
      "clear_vram_after_sampling", "cfg_degree", "dp_degree", "sync_ulysses", ...SHARDED, ...TESTED, "ray_object_store_gb",
      "ray_dashboard_address", "torch_dist_address",
    ],
  ],
}

/**
 * The values of a file, in the order of the present node.
 *
 * nodeName: a key of ORDERS.
 * widgets: the present node's widgets, in order: [{ name, value, options }]. `value` is used where the file says nothing.
 * stored: the values in the file. named: the same by name, from frontends that store that too.
 * Returns { values, dropped }: `dropped` says in words which values of the file are not used.
 */
export function repair(nodeName, widgets, stored, named) {
  const names = named ? Object.keys(named) : orderOf(nodeName, widgets, stored)
  const found = new Map()
  const dropped = []
  for (const [index, value] of (named ? Object.values(named) : stored).entries()) {
    const name = names[index] ?? UNKNOWN
    const taken = take(widgets, name, value)
    if (taken === undefined) dropped.push(`${name ?? `value ${index + 1}`} = ${JSON.stringify(value)}`)
    else found.set(name, taken)
  }
  return { values: widgets.map(({ name, value }) => (found.has(name) ? found.get(name) : value)), dropped }
}

/** The name of each stored value, or UNKNOWN. */
function orderOf(nodeName, widgets, stored) {
  const present = widgets.map(({ name }) => name)
  const attentionNames = widgets.find(({ name }) => name === ATTENTION).options.values
  // The last one: a file exists that holds such a string a second time, in the place before.
  const place = stored.findLastIndex((value) => attentionNames.includes(value))
  // The present order fits any number of values: widgets are only ever added at its end.
  const orders = [present, ...ORDERS[nodeName].filter((names) => names.length === stored.length)]
  const candidates = orders.filter((names) => place >= 0 && names[place] === ATTENTION)
  if (candidates.length) {
    // Several orders can have the attention in the same place. Booleans, numbers and strings then tell them apart.
    const misfits = (names) => stored.filter((value, i) => take(widgets, names[i], value) === undefined).length
    return candidates.reduce((best, names) => (misfits(names) < misfits(best) ? names : best))
  }
  // A version that is not known here: what all known versions agree on, from the start, and the attention.
  const agreed = present.findIndex((name, i) => ORDERS[nodeName].some((names) => names[i] !== name))
  return stored.map((_, i) => (i === place ? ATTENTION : i < agreed ? present[i] : UNKNOWN))
}

/** The value as the widget of that name takes it; undefined without such a widget, or if it is of another kind. */
function take(widgets, name, value) {
  const widget = widgets.find((candidate) => candidate.name === name)
  // cfg_degree was a switch once: off is 1, on is 2.
  if (widget && name === "cfg_degree" && typeof value === "boolean") return value ? 2 : 1
  return typeof value === typeof widget?.value ? value : undefined
}
