#!/usr/bin/env bash
# Rung 4: models/vpdense0_5_28-healed -> models/vpdense_28 (the student's attention).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=$(command -v python3 || command -v python)
exec "$python" -m vpmoe.cli upcycle run vpdense_28 "$@"
