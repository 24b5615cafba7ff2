#!/usr/bin/env bash
# Sets up an environment and trains with several objectives; see safervlm train --help.
# The environment variable RUNS is the option --runs.
#   bash scripts/train.sh sft dpo ppo [ARGUMENTS of safervlm fit]
source "$(dirname "$0")/environment.sh" demo
exec safervlm train --runs "${RUNS:-runs}" "$@"
