#!/usr/bin/env bash
# Several algorithms on a real model, from the same weights, and the table: docs/run_real.sh MODEL TRAIN.jsonl HELD_OUT.jsonl [MORE.jsonl …]
#
# What is finished is skipped and what was cut off goes on, so it may be stopped and started at will; two of it, with different ARMS, may run
# side by side once the start model has been evaluated. Paths are from the repository's root. By environment:
#   ARMS      arms to run                                  (sft grpo dapo gspo srpo luffy dpo gcpo sft_gcpo)
#             each "preset", "preset:its steps" or "preset:its steps:flag=value,flag=value" (no / in values): gcpo:200:lr=5e-5
#             (results go by the names of arms and files, so the files need different names)
#   STEPS     steps of an arm that names none              (200)
#   SEEDS     "0 1"                                        (0)
#   FLAGS     of every training run                        (--prompts 16 --group-size 8 --max-new-tokens 512)
#   EVAL      of every evaluation                          (--samples 4 --max-new-tokens 512)
#   WORK      where all of it lies                         (runs/real)
#   PYTHON    the interpreter                              (.venv/bin/python)
set -euo pipefail
[ $# -ge 3 ] || { sed -n 2,14p "$0"; exit 2; }
[ "$(printf '%s\n' "${@:3}" | xargs -n1 basename | sort | uniq -d)" = "" ] || { echo "error: two files of one name; rename one" >&2; exit 2; }
cd "$(dirname "$0")/.."
model=$1 train=$2 held_out=$3 sets=("${@:3}")
python=${PYTHON:-.venv/bin/python} work=${WORK:-runs/real}
mkdir -p "$work"

evaluate() {    # evaluate NAME MODEL_FOLDER: on every set, each result a file that is there once it is whole
  for set in "${sets[@]}"; do
    result="$work/$1--$(basename "${set%.jsonl}").txt"
    [ -s "$result" ] && continue
    # shellcheck disable=SC2086
    $python evaluate.py --model "$2" --data "$set" ${EVAL:---samples 4 --max-new-tokens 512} > "$result.$$.writing"
    mv "$result.$$.writing" "$result"
  done
}
trap 'rm -f "$work"/*."$$".writing' EXIT

evaluate base "$model"
for seed in ${SEEDS:-0}; do
  for arm in ${ARMS:-sft grpo dapo gspo srpo luffy dpo gcpo sft_gcpo}; do
    IFS=: read -r algo steps flags <<< "$arm"
    steps=${steps:-${STEPS:-200}} name="${arm//:/-}-seed$seed" out="$work/${arm//:/-}-seed$seed"
    if ! grep -qs "^{\"step\": $steps," "$out/metrics.jsonl"; then    # its last line is written after its model
      resume=; if [ -f "$out/run.json" ]; then resume=--resume; else rm -rf "$out"; fi
      # shellcheck disable=SC2086
      $python train.py --model "$model" --data "$train" --eval-data "$held_out" --algo "$algo" --seed "$seed" --steps "$steps" --out "$out" $resume \
        ${FLAGS:---prompts 16 --group-size 8 --max-new-tokens 512} ${flags:+--${flags//,/ --}}
    fi
    evaluate "$name" "$out/model"
  done
done
$python docs/experiments.py real --work "$work"
