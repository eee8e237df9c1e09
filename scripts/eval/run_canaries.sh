#!/usr/bin/env bash
# `vpmoe eval canaries`: scripts/eval/run_canaries.sh WHERE [--size full] [--tasks a,b] [--against REPORT] ...; with NPROC=8 over eight processes, one a GPU.
exec "$(dirname "${BASH_SOURCE[0]}")/run_suite.sh" canaries "$@"
