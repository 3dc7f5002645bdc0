"""ComfyUI's way in: the nodes of RayLTX.

ComfyUI imports this folder under a name made of its path, which no worker could import. So the nodes are imported under
their one name, `rayltx`, from a folder that holds nothing else and goes to the end of the search path.

In a wheel this file is the package `rayltx` itself. Under that name it does nothing.
"""

if __name__ != "rayltx":
    import re
    import sys
    from pathlib import Path

    _ROOT = Path(__file__).resolve().parent
    if str(_ROOT / "importable") not in sys.path:
        sys.path.append(str(_ROOT / "importable"))

    from rayltx import about

    if about.ROOT != _ROOT:
        raise ImportError(
            f"there are two copies of RayLTX: this one in {_ROOT}, and one in {about.ROOT}, which Python found first; "
            "remove one from custom_nodes, or uninstall the package rayltx from ComfyUI's Python"
        )

    from rayltx.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    if "comfy.sd" in sys.modules:  # in ComfyUI
        from rayltx.nodes.log_lines import name_log_lines
        from rayltx.nodes.requirements_check import warn_of_missing_names

        name_log_lines()
        warn_of_missing_names()

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]

    WEB_DIRECTORY: str | None = "./web"
    _FOLDER = Path(__file__).parent.name
    if not re.fullmatch(r"[\w.()+-]+", _FOLDER, re.ASCII) and "nodes" in sys.modules:
        # ComfyUI serves this folder under its own name, and not at all where that has a space or the like: the web
        # server compares the name as it is escaped in addresses with the one that it was told. So the scripts get a
        # plain name.
        sys.modules["nodes"].EXTENSION_WEB_DIRS["rayltx"] = str(_ROOT / "web")
        WEB_DIRECTORY = None
