#!/usr/bin/env bash
# The crash matrix (tests/crash): scripts/crash_matrix.sh --rounds N [--seed S]; --help says what it does.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=$(command -v python3 || command -v python)
cd "$root"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH="$root:$root/Megatron-vpmoe"
exec "$python" -m tests.crash "$@"
