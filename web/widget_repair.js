// When a workflow that another version saved is opened, each value finds its widget.

import { app } from "../../scripts/app.js"
import { ORDERS, repair } from "./widget_orders.js"

app.registerExtension({
  name: "RayLTX.WidgetRepair",

  // Wrapped here, and not in beforeConfigureGraph, since `configure` is what a node goes through in a subgraph and when
  // it is pasted as well.
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!(nodeData.name in ORDERS)) return
    const configure = nodeType.prototype.configure
    nodeType.prototype.configure = function (info) {
      // Some frontends store an object with names, or nothing. Neither needs repair.
      if (Array.isArray(info.widgets_values) && info.widgets_values.length) repairNode(this, nodeData.name, info)
      return configure.call(this, info)
    }
  },
})

function repairNode(node, nodeName, info) {
  // A node that was just made holds its defaults.
  const widgets = node.widgets.filter(({ serialize }) => serialize !== false)
  const { values, dropped } = repair(nodeName, widgets, info.widgets_values, info.widgets_values_named)
  if (dropped.length)
    console.warn(
      `RayLTX: node ${info.id} (${nodeName}) was saved by another version. These values are not used: ` +
        `${dropped.join(", ")}. Its widgets now: ${widgets.map(({ name }, i) => `${name} = ${values[i]}`).join(", ")}`,
    )
  info.widgets_values = values
}
