#!/usr/bin/env bash
# The check of a GPU machine (scripts/gpu): scripts/gpu_check.sh [--only SECTION] [--dry-run]; --help says what it does.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=$(command -v python3 || command -v python)
cd "$root"
exec "$python" -m scripts.gpu "$@"
