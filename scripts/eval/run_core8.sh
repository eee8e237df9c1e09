#!/usr/bin/env bash
# `vpmoe eval core8`: scripts/eval/run_core8.sh WHERE [--size full] [--tasks a,b] [--bundle FOLDER] ...; with NPROC=8 over eight processes, one a GPU.
exec "$(dirname "${BASH_SOURCE[0]}")/run_suite.sh" core8 "$@"
