#!/usr/bin/env bash
# The main job: one clip from two workers, written as a video and a contact sheet, and compared with one worker's.
# Further arguments go to `rayltx generate`, such as: --prompt "blue square left" --workers 4 --ring 2
# The workers share the tokens of one row after the other: with a row of guidance each, they would exchange nothing.
set -euo pipefail
EXTRAS=cli
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

"$PYTHON" -m rayltx.cli.main generate --device cpu --workers 2 --cfg-degree 1 --verify \
    --output output/demo.mp4 --output output/demo.png "$@"
