#!/usr/bin/env bash
# Rung 6: models/vpdense_80-healed -> models/vpmoe (shared and routed experts).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=$(command -v python3 || command -v python)
exec "$python" -m vpmoe.cli upcycle run vpmoe "$@"
