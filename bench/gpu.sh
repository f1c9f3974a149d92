#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the tests of the ops on it, the single numbers behind
# the kernel designs, the training step at scale (two minutes), then the table of ops.
#   bench/gpu.sh OUT            (OUT/tests.log, questions.md, train.md, ops.csv, ops.md, ops.svg)
#   bench/gpu.sh OUT --dry      tiny shapes on whatever device there is: does it run?
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bench/gpu.sh OUT [--dry]}
mkdir -p "$out"
export PYTHONPATH=.:tests${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python3}
# Warnings of other versions than the gate's must not end a long run on a GPU.
"$python" -m pytest -q -p no:cacheprovider -W default tests/test_topk_encode.py \
  tests/test_sparse_decode.py tests/test_affine_chain.py tests/test_online_step.py \
  tests/test_tuning.py 2>&1 \
  | tee "$out/tests.log"
"$python" bench/questions.py --out "$out" "${@:2}"
"$python" bench/train.py --out "$out" --rounds 1 "${@:2}"
"$python" bench/ops.py --out "$out" --compile "${@:2}"
