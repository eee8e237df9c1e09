#!/usr/bin/env bash
# The whole ladder at nano size: texts, two vocabularies, their datasets, then every rung. What is done is skipped.
# Works in the current directory. --texts-only stops before the ladder, --rows N makes fewer texts; the rest goes to
# `vpmoe ladder`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=$(command -v python3 || command -v python)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a second thread costs more than it brings at this size
data=data/ladder_nano rows=60000 climb=yes rest=()
while (($#)); do
    case $1 in
        --texts-only) climb=no ;;
        --rows) rows=$2; shift ;;
        *) rest+=("$1") ;;
    esac
    shift
done
say() { echo "\$ $*"; "$@"; }
vpmoe() { "$python" -m vpmoe.cli "$@"; }
texts() { vpmoe data build-text --input $data/texts/pool.jsonl --id-field synth_id \
    --valid-fraction 0.05 --seq-len 128 --quiet "$@"; }

say vpmoe data synth-mini --output-dir $data/rows --rows "$rows" --levels "counting=6 items" \
    --families sorting=0.3,maximum=0.35,counting=0.35
say vpmoe data question-texts --input-dir $data/rows --output-dir $data/texts
say vpmoe tokenizer train --input $data/texts/pool.jsonl --output-dir $data/bpe --vocab-size 384
say vpmoe data compact-map --input $data/texts/pool.jsonl --output-dir $data/o200k --size 298
say texts --output-dir $data/texts_bpe --tokenizer $data/bpe --padded-vocab-size 384
say texts --output-dir $data/texts_o200k --compact-map $data/o200k/compact_vocab.npy --padded-vocab-size 512
[[ $climb == no ]] || say vpmoe ladder --config configs/nano/ladder/ladder.toml "${rest[@]}"
