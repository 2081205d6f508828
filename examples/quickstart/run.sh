#!/usr/bin/env bash
# From the Python installation's own text to a trained model. A step whose result is there already is skipped.
# `make quickstart` runs this in .venv.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=runs/quickstart
steps=180

step() { # step RESULT TITLE COMMAND...
    local result=$1 title=$2
    shift 2
    if [ -e "$result" ]; then
        echo "[skip] $title: $result is there"
    else
        echo "[run]  $title"
        "$@"
    fi
}

step $out/corpus "collect text" \
    python tools/make_quickstart_corpus.py --output $out/corpus
step $out/tokenizer.model "train a tokenizer" \
    python tools/train_tokenizer.py --input $out/corpus/*.jsonl --vocab-size 8192 --output $out/tokenizer
step $out/data.idx "tokenise" \
    python tools/preprocess_data.py --input $out/corpus/*.jsonl --tokenizer $out/tokenizer.model \
    --output-prefix $out/data --workers 2
step "$out/run/checkpoints/step_$(printf %08d $steps)" "pretrain on two processes" \
    torchrun --nproc-per-node 2 -m megallama pretrain --config examples/quickstart/pretrain.yaml --train.steps $steps
step $out/loss.png "plot the loss" \
    python tools/plot_loss.py $out/run --output $out/loss.png

echo "everything is in $out: the loss curve in loss.png, the run in run/"
