#!/usr/bin/env bash
# `vpmoe eval SUITE`: scripts/eval/run_suite.sh SUITE WHERE ...; with NPROC=8 over eight processes, one a GPU.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=$(command -v python3 || command -v python)
if [[ "${NPROC:-1}" == 1 ]]; then
    exec "$python" -m vpmoe.cli eval "$@"
fi
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m vpmoe.cli eval "$@"
