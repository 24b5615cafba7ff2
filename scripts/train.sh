#!/usr/bin/env bash
# Trains with several objectives; see safervlm train --help. The environment variable RUNS is the option --runs.
#   bash scripts/train.sh sft dpo ppo [ARGUMENTS of safervlm fit]
exec safervlm train --runs "${RUNS:-runs}" "$@"
