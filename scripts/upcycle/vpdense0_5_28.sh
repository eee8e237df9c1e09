#!/usr/bin/env bash
# Rung 3: models/qwen3-0_6B-o200k-healed -> models/vpdense0_5_28 (the student's shapes).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=$(command -v python3 || command -v python)
exec "$python" -m vpmoe.cli upcycle run vpdense0_5_28 "$@"
