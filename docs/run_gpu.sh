#!/usr/bin/env bash
# All that needs a GPU, in one command and about 20 minutes: the tests, a short run, and the figures
# of docs/speed.md.
#
#     bash docs/run_gpu.sh MODEL DATA    a Hugging Face folder (its tokenizer is used for the shapes
#                                        of random weights, too) and a file of problems
#
# ROUNDS=2 for less exact figures in five minutes. What it prints is also in runs/gpu/log.
set -euo pipefail
cd "$(dirname "$0")/.."
model=$1 data=$2 out=runs/gpu rounds=${ROUNDS:-5} python=${PYTHON:-python}
mkdir -p $out
exec > >(tee $out/log) 2>&1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
$python -c 'import torch; print("torch", torch.__version__)'

# Random weights of a shape, with MODEL's tokenizer
for shape in SmolLM2-135M Qwen2.5-1.5B; do
    [ -d "$out/$shape/model" ] && continue
    mkdir -p "$out/$shape"
    $python -c "import bench; bench.write_random_model('$out/$shape', '$shape')"
    $python -c "from support.folders import copy_tokenizer; copy_tokenizer('$model', '$out/$shape/model')"
done

$python -m pytest tests/test_gpu.py ${TESTS:+-k "$TESTS"} || echo "TESTS FAILED"

echo "== twenty steps: is every gradient finite, and how good was the estimate of memory?"
$python bench.py step --peer none --rounds 20 --model $out/SmolLM2-135M/model --data "$data" 2>/dev/null
$python bench.py step --peer none --rounds 3 --model $out/Qwen2.5-1.5B/model --data "$data" 2>/dev/null

for shape in SmolLM2-135M Qwen2.5-1.5B; do
    for what in sample update; do
        echo "== $what, $shape"
        $python bench.py $what --rounds "$rounds" --model "$out/$shape/model" --data "$data" \
            2>/dev/null
    done
done
