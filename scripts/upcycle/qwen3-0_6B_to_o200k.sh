#!/usr/bin/env bash
# Rung 2: models/qwen3-0_6B and models/gpt-oss-20b_hf (the donor) -> models/qwen3-0_6B-o200k.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=$(command -v python3 || command -v python)
exec "$python" -m vpmoe.cli upcycle run qwen3-0_6B-o200k "$@"
