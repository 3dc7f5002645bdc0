"""ComfyUI's own frontend in a browser without a window, for the tests that need it."""

from __future__ import annotations

import os
from pathlib import Path

CHROMIUM = Path(os.environ.get("CHROMIUM_PATH", "/usr/bin/chromium"))
CHROMIUM_ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
WAIT_MS = 120_000

# No first-run dialogs; and in the pictures nothing but the graph.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
}

# In every page: the nodes of the graph and of its subgraphs, and a node's widgets by name.
HELPERS = """
window.allNodes = () => [app.rootGraph, ...app.rootGraph.subgraphs.values()].flatMap((graph) => graph.nodes)
window.widgetsOf = (node) =>
  Object.fromEntries((node.widgets ?? []).filter((w) => w.serialize !== false).map((w) => [w.name, w.value]))
window.load = async (workflow) => {
  await app.loadGraphData(workflow)
  return window.allNodes().filter((node) => !node.isSubgraphNode?.())
    .map((node) => ({
      type: node.type,
      missing: !(node.type in LiteGraph.registered_node_types),
      errors: !!node.has_errors, // a file that is not there, among others
      widgets: window.widgetsOf(node),
    }))
}
"""


def page_on(browser, server, **options):
    """A page of the frontend, loaded, with the helpers and the settings."""
    for name, value in SETTINGS.items():
        server.post(f"/settings/{name}", value)
    page = browser.new_page(**options)
    page.set_default_timeout(WAIT_MS)
    page.add_init_script(HELPERS)
    page.goto(server.url, wait_until="domcontentloaded")
    page.wait_for_function("!!(window.app?.rootGraph && app.canvas && LiteGraph.registered_node_types.RayInitializer)")
    return page
