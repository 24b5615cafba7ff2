#!/usr/bin/env bash
# Measures several VLMs; see safervlm measure --help. The environment variable RUNS is the option --runs.
#   bash scripts/query_vlms.sh [VLM ...] [ARGUMENTS of safervlm predict]
exec safervlm measure --runs "${RUNS:-runs/query}" "$@"
