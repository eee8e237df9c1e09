#!/usr/bin/env bash
# `vpmoe train`: scripts/train.sh configs/nano/stage1.yaml [--any-field value] [--dry-run] [--debug]; --help lists every field.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=$(command -v python3 || command -v python)
exec "$python" -m vpmoe.cli train "$@"
