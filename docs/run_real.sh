#!/usr/bin/env bash
# Several algorithms on a real model, from the same weights, and the tables of what they came to:
#
#     docs/run_real.sh MODEL TRAIN.jsonl HELD_OUT.jsonl [MORE.jsonl …]
#
# What is finished is skipped and what was cut off goes on, so it may be stopped and started at
# will. Two of it, with different ARMS, may run side by side once the start model has been
# evaluated. Paths are from the repository's root. By environment:
#
#   ARMS      arms to run           (sft grpo dapo gspo srpo luffy dpo gcpo sft_gcpo)
#             each "preset", "preset:its steps" or "preset:its steps:flag=value,flag=value", as in
#             gcpo:200:lr=5e-5
#   STEPS     steps of an arm that names none              (200)
#   SEEDS     "0 1"                                        (0)
#   FLAGS     of every training run                        (--prompts 16 --group-size 8
#                                                           --max-new-tokens 512)
#   EVAL      of every evaluation                          (--samples 4 --max-new-tokens 512)
#   WORK      where all of it lies                         (runs/real)
#   PYTHON    the interpreter                              (.venv/bin/python)
#
# Results go by the names of arms and files, so the files need different names.

# shellcheck disable=SC2086    # variables that hold several flags stand without quotes
set -euo pipefail

if [ $# -lt 3 ]; then
  sed -n '2,/^$/p' "$0"    # the comment above
  exit 2
fi
model=$1
train=$2
held_out=$3
sets=("${@:3}")
if [ -n "$(for set in "${sets[@]}"; do basename "$set"; done | sort | uniq -d)" ]; then
  echo "error: two files of one name; rename one" >&2
  exit 2
fi

cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
work=${WORK:-runs/real}
all_arms=${ARMS:-sft grpo dapo gspo srpo luffy dpo gcpo sft_gcpo}
train_flags=${FLAGS:---prompts 16 --group-size 8 --max-new-tokens 512}
eval_flags=${EVAL:---samples 4 --max-new-tokens 512}
mkdir -p "$work"

evaluate() {    # evaluate NAME MODEL_FOLDER: on every set
  $python docs/evaluate_sets.py "$work/$1" "$2" "${sets[@]}" $eval_flags
}

train_arm() {    # train_arm OUT ALGO STEPS SEED FLAG…
  local out=$1 algo=$2 steps=$3 seed=$4
  local resume=
  if grep -qs "^{\"step\": $steps," "$out/metrics.jsonl"; then
    return    # the log's last line is written after the model
  fi
  if [ -f "$out/run.json" ]; then
    resume=--resume
  else
    rm -rf "$out"
  fi
  $python train.py --model "$model" --data "$train" --eval-data "$held_out" \
    --algo "$algo" --seed "$seed" --steps "$steps" --out "$out" \
    $resume $train_flags "${@:5}"
}

evaluate start "$model"
for seed in ${SEEDS:-0}; do
  for arm in $all_arms; do
    IFS=: read -r algo steps flags <<< "$arm"
    name="${arm//[:\/]/-}-seed$seed"
    train_arm "$work/$name" "$algo" "${steps:-${STEPS:-200}}" "$seed" ${flags:+--${flags//,/ --}}
    evaluate "$name" "$work/$name/model"
  done
done
$python docs/real_tables.py "$work"
