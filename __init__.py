"""ComfyUI's way in: the nodes of RayLTX.

ComfyUI imports this folder under a name made of its path, which no worker could import. So the nodes are imported under
their one name, `rayltx`, from a folder that holds nothing else and goes to the end of the search path.
"""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent
if str(_ROOT / "importable") not in sys.path:
    sys.path.append(str(_ROOT / "importable"))

from rayltx import about  # noqa: E402

if about.ROOT != _ROOT:
    raise ImportError(
        f"there are two copies of RayLTX: this one in {_ROOT}, and one in {about.ROOT}, which Python found first; remove one "
        "from custom_nodes, or uninstall the package rayltx from ComfyUI's Python"
    )

from rayltx.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS  # noqa: E402

WEB_DIRECTORY = "./web"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
