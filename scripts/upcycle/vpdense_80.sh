#!/usr/bin/env bash
# Rung 5: models/vpdense_28-healed -> models/vpdense_80 (52 layers that add nothing yet).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=$(command -v python3 || command -v python)
exec "$python" -m vpmoe.cli upcycle run vpdense_80 "$@"
