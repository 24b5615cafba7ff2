#!/usr/bin/env bash
# Sets up an environment and evaluates the original model and trained ones; see safervlm evaluate --help. The environment
# variables ORIGINAL and OUT are the options of these names.
#   bash scripts/eval.sh RUN... [ARGUMENTS of safervlm predict]
source "$(dirname "$0")/environment.sh" demo
exec safervlm evaluate --original "${ORIGINAL:-runs/original}" --out "${OUT:-runs/evaluation.html}" "$@"
