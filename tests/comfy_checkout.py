"""Where a real ComfyUI is, for the tests that need one."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def find_comfyui() -> Path | None:
    """COMFYUI_PATH, the ComfyUI whose custom_nodes this repository lies in, or ~/comfy/ComfyUI."""
    candidates = [Path(os.environ["COMFYUI_PATH"])] if "COMFYUI_PATH" in os.environ else []
    if ROOT.parent.name == "custom_nodes":
        candidates.append(ROOT.parents[1])
    candidates.append(Path.home() / "comfy" / "ComfyUI")
    return next((path for path in candidates if (path / "comfy" / "sd.py").is_file()), None)
