#!/usr/bin/env bash
# Two nodes of two ranks on one machine, to try things out: one torchrun agent each. Arguments are train.py's, or those of
# the trainer that TRAIN names.
set -euo pipefail

node() {
    torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint "localhost:${PORT:-29500}" \
        --rdzv-id distopt "${TRAIN:-$(dirname "$0")/train.py}" "$@"
}

node "$@" &
first=$!
node "$@" &
failed=0
wait "$first" || failed=1
wait "$!" || failed=1
exit "$failed"
