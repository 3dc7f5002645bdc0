#!/usr/bin/env bash
# The tests: style, types, and everything that runs in minutes. Further arguments go to pytest, such as: -m slow
#
# Tests against a real ComfyUI run where one is found, with its own Python: COMFYUI_PATH, the ComfyUI around this
# folder, or ~/comfy/ComfyUI; COMFYUI_PYTHON, or an environment named venv or .venv in the checkout or next to it.
# Elsewhere they are skipped, and say so.
set -euo pipefail
EXTRAS=cli,test
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
mkdir -p .venv/mypy && ln -sfn "$root" .venv/mypy/rayltx
MYPYPATH=.venv/mypy "$PYTHON" -m mypy -p rayltx
"$PYTHON" -m pytest --ignore tests/comfyui "$@"

comfyui=$("$PYTHON" -c 'import sys; sys.path.insert(0, "tests"); import comfy_checkout; print(comfy_checkout.find_comfyui() or "")')
comfyui_python=${COMFYUI_PYTHON:-}
for candidate in "$comfyui/venv" "$comfyui/.venv" "$comfyui/../venv" "$comfyui/../.venv"; do
    if [ -n "$comfyui" ] && [ -z "$comfyui_python" ] && [ -x "$candidate/bin/python" ]; then
        comfyui_python="$candidate/bin/python"
    fi
done
if [ -z "$comfyui" ]; then
    echo "SKIPPED: the tests against a real ComfyUI: no checkout at COMFYUI_PATH, around this folder, or at ~/comfy/ComfyUI"
elif [ -z "$comfyui_python" ]; then
    echo "SKIPPED: the tests against a real ComfyUI: no environment found for $comfyui; set COMFYUI_PYTHON"
elif ! "$comfyui_python" -c 'import pytest, ray, torch' 2>/dev/null; then
    echo "SKIPPED: the tests against a real ComfyUI: $comfyui_python has no pytest, ray or torch"
else
    echo "tests against ComfyUI at $comfyui"
    COMFYUI_PATH="$comfyui" "$comfyui_python" -m pytest tests/comfyui "$@"
fi
