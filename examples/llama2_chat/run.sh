#!/usr/bin/env bash
# From text to RLHF-V5, as the Llama 2 paper goes: pretraining, fine-tuning, two reward models, four versions by rejection
# sampling and a fifth by PPO on top; then every version's answers to held-out prompts, judged by the reward models and
# by rules that they never saw. Run again, it goes on where it stopped.
#
#   examples/llama2_chat/run.sh [SEED]
#
# OUT      folder of all results [runs/llama2_chat/seed_SEED]
# REDUCED  1 = a short run with less of everything, which still shows the rise (the tests run it)
# ALONE, BOTH   what starts a stage on one core and on both [python -m megallama; torchrun on two processes]
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/llama2_chat
seed=${1:-1}
out=${OUT:-runs/llama2_chat/seed_$seed}
alone=${ALONE:-python -m megallama}
both=${BOTH:-torchrun --standalone --nproc-per-node 2 -m megallama}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two processes, or two stages side by side, on a laptop's two cores
if [ -n "${REDUCED:-}" ]; then
    sizes=(--demonstrations 1500 --pairs 800 --safety-pairs 400 --test-pairs 60 --prompts 256 --valid-prompts 96)
    pretrain_steps=300 sft_epochs=3 control_epochs=1 versions="1 4" samples=2 iterations=6
else
    # Few demonstrations, often: to the end of what they teach, or the control would go on learning from them.
    sizes=(--demonstrations 1500)
    pretrain_steps=800 sft_epochs=10 control_epochs=5 versions="1 2 3 4" samples=3 iterations=25
fi
corpus=$out/corpus
started=$SECONDS

step() { # step RESULT TITLE COMMAND...: skipped where the result is there
    local result=$1 title=$2
    shift 2
    if [ -e "$result" ]; then
        echo "[skip] $title"
    else
        echo "[$((SECONDS - started)) s] $title"
        "$@"
    fi
}

stage() { # stage LAUNCH NAME TITLE STAGE ARGUMENTS...: a run in $out/NAME, marked once it is complete
    local launch=$1 name=$2 title=$3 kind=$4
    shift 4
    run() {
        $launch "$kind" --config $here/tiny.yaml --data.tokenizer $out/tokenizer.model --train.seed "$seed" \
            --output_dir "$out/$name" "$@"
        touch "$out/$name/complete"
    }
    step "$out/$name/complete" "$title" run "$@"
}

mkdir -p "$out"
step $corpus "collect questions, answers, preferences and prompts from this Python's documentation" \
    python tools/make_chat_corpus.py --output $corpus --seed "$seed" ${sizes[@]+"${sizes[@]}"}
step $out/tokenizer.model "train a tokenizer" \
    python tools/train_tokenizer.py --input $corpus/pretrain.jsonl --vocab-size 2048 --output $out/tokenizer
step $out/data.idx "tokenise" \
    python tools/preprocess_data.py --input $corpus/pretrain.jsonl --tokenizer $out/tokenizer.model \
    --output-prefix $out/data --workers 2
stage "$both" pretrain "pretrain" pretrain --config $here/pretrain.yaml --data.sources "[{prefix: $out/data}]" \
    --train.steps $pretrain_steps
stage "$both" sft "fine-tune on demonstrations" sft --checkpoint.load "weights:$out/pretrain" \
    --sft.sources "[{path: $corpus/sft.jsonl}]" --sft.epochs $sft_epochs --optim.lr 2e-3 --optim.warmup_steps 20 \
    --optim.min_lr_ratio 0

# Two answers a prompt, from the model at two temperatures, compared by the rules: what annotators do for a real model.
compare() { # compare MODEL NAME
    local number=0
    for temperature in 0.8 1.2; do
        number=$((number + 1))
        step "$out/$2/answers_$temperature.jsonl" "answers of $1 at temperature $temperature" \
            $both generate --config $here/tiny.yaml --data.tokenizer $out/tokenizer.model \
            --generate.model "$out/$1" --generate.file $corpus/prompts.jsonl --generate.temperature $temperature \
            --generate.seed $((10 * seed + number)) --generate.output "$out/$2/answers_$temperature.jsonl" --output_dir "$out/$2"
    done
    cat "$out/$2"/answers_*.jsonl >"$out/$2/answers.jsonl"
    step "$out/$2/preferences/safety.jsonl" "compare them" python tools/check_answers.py --prompts $corpus/prompts.jsonl \
        --answers "$out/$2/answers.jsonl" --prefer "$out/$2/preferences" --seed "$seed"
}

rewards() { # rewards NAME MODEL PREFERENCES: the helpfulness and the safety model, from a chat model
    local recipe=(--checkpoint.load "weights:$out/$2" --train.micro_batch_size 16
        --train.global_batch_size 32 --optim.lr 1e-3 --optim.warmup_steps 10 --reward.epochs 1)
    stage "$alone" "help_$1" "reward model for helpfulness, $1" reward "${recipe[@]}" \
        --reward.sources "[{path: $corpus/helpfulness.jsonl}, {path: $3/helpfulness.jsonl}, {path: $corpus/safety.jsonl, share: 0.1}]" \
        --reward.valid "[$corpus/helpfulness_test.jsonl]" &
    local other=$!
    stage "$alone" "safe_$1" "reward model for safety, $1" reward "${recipe[@]}" --reward.safety_weight 0.5 \
        --reward.sources "[{path: $corpus/safety.jsonl}, {path: $3/safety.jsonl}, {path: $corpus/helpfulness.jsonl, share: 0.1}]" \
        --reward.valid "[$corpus/safety_test.jsonl]"
    wait $other
}

mkdir -p $out/compared_sft
compare sft compared_sft
rewards 1 sft $out/compared_sft/preferences
stage "$both" grid "both reward models on both test sets" reward-eval --reward.models "[$out/help_1, $out/safe_1]" \
    --reward.valid "[$corpus/helpfulness_test.jsonl, $corpus/safety_test.jsonl]"

judges=(--judges.helpfulness $out/help_1 --judges.safety $out/safe_1)
before=sft
earlier=
for version in $versions; do
    bags=()
    if [ $version = 4 ]; then # from here on the best of all iterations
        bags=(--rejection.bags "[$earlier]")
    fi
    stage "$both" samples_$version "rejection sampling for RLHF-V$version" rejection-sample --rejection.model $out/$before \
        --rejection.prompts $corpus/prompts.jsonl --rejection.samples $samples --rejection.temperatures "[0.8, 1.0]" \
        --rejection.version $before --train.micro_batch_size 32 ${bags[@]+"${bags[@]}"} "${judges[@]}"
    stage "$both" v$version "RLHF-V$version" sft --checkpoint.load "weights:$out/$before" --sft.epochs 2 \
        --sft.sources "[{path: $out/samples_$version/sft.jsonl}]" --optim.lr 5e-4 --optim.warmup_steps 5
    before=v$version
    earlier=${earlier:+$earlier, }$out/samples_$version
done

mkdir -p $out/compared_v4
compare v4 compared_v4
rewards 2 v4 $out/compared_v4/preferences
stage "$both" v5 "RLHF-V5 by PPO" ppo --checkpoint.load "weights:$out/v4" --ppo.prompts $corpus/prompts.jsonl \
    --ppo.valid_prompts $corpus/valid_prompts.jsonl --judges.helpfulness $out/help_2 --judges.safety $out/safe_2 \
    --ppo.rollouts 128 --ppo.max_new_tokens 64 --train.global_batch_size 64 --train.micro_batch_size 32 \
    --train.steps $iterations --train.valid_interval 10 --optim.lr 1e-4 --ppo.critic_lr 5e-4 --ppo.beta 0.02 --log.interval 5 \
    --checkpoint.interval 10
stage "$both" control "the control: demonstrations again, as many steps as versions 1 to 4 had" sft \
    --checkpoint.load "weights:$out/sft" --sft.sources "[{path: $corpus/sft.jsonl}]" --sft.epochs $control_epochs \
    --optim.lr 5e-4 --optim.warmup_steps 5 --optim.min_lr_ratio 0

judged=(sft)
for version in $versions 5; do
    judged+=(v$version)
done
judge() { # judge MODEL: its answers to held-out prompts, by the first reward models, which PPO has not seen
    stage "$alone" judged_$1 "held-out answers of $1" rejection-sample --rejection.model $out/$1 \
        --rejection.prompts $corpus/valid_prompts.jsonl --rejection.samples 2 --rejection.temperatures "[1.0]" \
        --rejection.version $1 --train.micro_batch_size 32 "${judges[@]}"
    step $out/judged_$1/rules.json "rules about $1" python tools/check_answers.py --prompts $corpus/valid_prompts.jsonl \
        --answers $out/judged_$1 --json $out/judged_$1/rules.json
}
set -- "${judged[@]}" control
while [ $# -gt 0 ]; do # two at a time
    judge $1 &
    other=$!
    [ $# -eq 1 ] || judge $2
    wait $other
    shift
    [ $# -eq 0 ] || shift
done
python tools/plot_versions.py "${judged[@]/#/$out/judged_}" --control $out/judged_control --output $out/versions.png
echo "everything: $((SECONDS - started)) s"
