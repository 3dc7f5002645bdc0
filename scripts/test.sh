#!/usr/bin/env bash
# The tests: style, types, and everything that runs in minutes. Further arguments go to pytest, such as: -m slow
#
# Tests against a real ComfyUI run where one is found: COMFYUI_PATH, the custom_nodes folder around this repository, or
# ~/comfy/ComfyUI, with the Python of an environment next to it. Elsewhere they are skipped, and say so.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

"$PYTHON" -m ruff check .
mkdir -p .venv/mypy && ln -sfn "$root" .venv/mypy/rayltx
MYPYPATH=.venv/mypy "$PYTHON" -m mypy -p rayltx
"$PYTHON" -m pytest "$@"
