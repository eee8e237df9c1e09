#!/usr/bin/env bash
# Heal a rung: scripts/upcycle/heal.sh vpdense_28 makes models/vpdense_28-healed, and what it is made from where that is due.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=$(command -v python3 || command -v python)
exec "$python" -m vpmoe.cli upcycle run "${1:?name a rung, such as vpdense_28}-healed" --chain "${@:2}"
