#!/usr/bin/env bash
# From the Python installation's own text to a trained model. A step whose result is there already is skipped.
# `make quickstart` runs this in .venv.
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two processes on a laptop's cores: one thread each
cd "$(dirname "$0")/../.."
out=runs/quickstart
config=examples/quickstart/pretrain.yaml
steps=$(sed -n 's/^  steps: *//p' $config)

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

collect() { # the folder appears when it is complete
    python tools/make_quickstart_corpus.py --output $out/corpus.tmp
    mv $out/corpus.tmp $out/corpus
}

step $out/corpus "collect text from this Python's documentation and library" collect
step $out/tokenizer.model "train a tokenizer" \
    python tools/train_tokenizer.py --input $out/corpus/*.jsonl --vocab-size 8192 --output $out/tokenizer
step $out/data.idx "tokenise" \
    python tools/preprocess_data.py --input $out/corpus/*.jsonl --tokenizer $out/tokenizer.model \
    --output-prefix $out/data --workers 2
step "$out/run/checkpoints/step_$(printf %08d "$steps")" "pretrain on two processes (tensor parallel)" \
    torchrun --standalone --nproc-per-node 2 -m megallama pretrain --config $config
entropy=$(python tools/inspect_data.py $out/data --entropy)
python tools/plot_loss.py $out/run --output $out/loss.png --reference "unigram entropy=$entropy" | tee $out/verdict.txt
below=$(sed -n 's/.* \([0-9.]*\) below unigram entropy.*/\1/p' $out/verdict.txt)
if ! awk "BEGIN { exit !(${below:-0} >= 0.5) }"; then
    echo "the loss is not 0.5 nats below the corpus's unigram entropy: the model has learnt little but frequencies" >&2
    exit 1
fi
echo "the loss is clearly (0.5 nats or more) below what frequencies alone can reach: the model has learnt context"
echo "[run]  continue a prompt greedily"
torchrun --standalone --nproc-per-node 2 -m megallama generate --config $config
cat <<TEXT
corpus      $out/corpus
tokenizer   $out/tokenizer.model
data        $out/data.bin, $out/data.idx   (python tools/inspect_data.py $out/data)
run         $out/run                       metrics.jsonl, tensorboard/, checkpoints/, config.yaml
loss curve  $out/loss.png
TEXT
