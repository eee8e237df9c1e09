#!/usr/bin/env bash
# `vpmoe profile`: PROFILE_TOOL=torch|nsys scripts/profile.sh [--any-field value]; --help lists the variables.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=$(command -v python3 || command -v python)
cd "$root"
exec "$python" -m vpmoe.cli profile "$@"
