#!/usr/bin/env bash
# GRPO, GCPO and others on a real model that solves some problems and not others:
#
#     docs/run_contrast.sh MODEL GSM8K_TRAIN.jsonl [MORE_HELD_OUT.jsonl …]
#
# A small model solves next to nothing of GSM8K as it comes. So: SFT on short problems makes a start
# model; then each arm goes on from it, on other short problems of which a quarter have gold and all
# have answers. docs/run_real.sh runs and evaluates the arms; what is finished is skipped, and what
# was cut off goes on. Several of this with different SEEDS or ARMS (and OMP_NUM_THREADS=1) may run
# side by side once the files start--*.txt are there: the evaluation of the start model. Paths are
# from the repository's root. By environment:
#
#   ARMS      as in docs/run_real.sh      (grpo, gcpo, gcpo without negatives, rft, sft for equal
#                                         steps and for about equal seconds)
#   SEEDS     "0 1"                       (0)
#   STEPS     of an arm                   (30)
#   FLAGS     more flags of the arms' training, as in "--prompts 16"
#   EVAL      more flags of every evaluation, as in "--rows 1024"
#   WORK      where it lies, and the start model in WORK-start      (runs/contrast)
#   PYTHON    the interpreter             (.venv/bin/python)

# shellcheck disable=SC2086    # variables that hold several flags stand without quotes
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,/^$/p' "$0"    # the comment above
  exit 2
fi
model=$1
problems=$2
more=("${@:3}")

cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-.venv/bin/python}
export WORK=${WORK:-runs/contrast}
export STEPS=${STEPS:-30}
data=$WORK/data
common="--max-new-tokens 120"

[ -f "$data/golds.jsonl" ] || $PYTHON docs/contrast_data.py "$problems" "$data"
export EVAL="--samples 8 --temperature 0.6 $common ${EVAL:-}"

# The start model, and how it and the model as it came do on the held-out problems.
[ -s "$WORK-start/sft-seed0--held_out.txt" ] || (
  export ARMS=sft STEPS=100 SEEDS=0 WORK=$WORK-start
  export FLAGS="--prompts 16 --lr 1e-4 --lr-end 0.1 --warmup 8 --max-new-tokens 160
    --save-every 20 --eval-every 100"
  docs/run_real.sh "$model" "$data/start.jsonl" "$data/held_out.jsonl"
)
start=$WORK-start/sft-seed0/model

# SFT twice: as many steps, and five times as many, which take about as long as GCPO's.
golds=data=$data/golds.jsonl
export ARMS=${ARMS:-grpo gcpo gcpo:$STEPS:gold-rivals=zero rft sft:$STEPS:$golds \
  sft:$((5 * STEPS)):$golds}
export FLAGS="--prompts 8 --group-size 8 --lr 1e-5 --eval-every $STEPS $common
  ${FLAGS:-}"
docs/run_real.sh "$start" "$data/rl.jsonl" "$data/held_out.jsonl" \
  ${more[@]+"${more[@]}"}    # bash 3.2 calls an empty list unbound
