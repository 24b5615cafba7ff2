#!/usr/bin/env bash
# Sets up an environment and measures several VLMs; see safervlm measure --help.
# The environment variable RUNS is the option --runs.
#   bash scripts/query_vlms.sh [VLM ...] [ARGUMENTS of safervlm predict]
source "$(dirname "$0")/environment.sh" demo
exec safervlm measure --runs "${RUNS:-runs/query}" "$@"
