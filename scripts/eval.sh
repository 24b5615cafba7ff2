#!/usr/bin/env bash
# Evaluates the original model and trained ones; see safervlm evaluate --help. The environment variables ORIGINAL and OUT
# are the options of these names.
#   bash scripts/eval.sh RUN... [ARGUMENTS of safervlm predict]
exec safervlm evaluate --original "${ORIGINAL:-runs/original}" --out "${OUT:-runs/evaluation.html}" "$@"
