#!/usr/bin/env bash
# Rung 1: models/qwen3-0_6B_hf (an HF directory) -> models/qwen3-0_6B (Megatron checkpoint, HF export, receipt).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=$(command -v python3 || command -v python)
exec "$python" -m vpmoe.cli upcycle run qwen3-0_6B "$@"
