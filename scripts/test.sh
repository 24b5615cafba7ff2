#!/usr/bin/env bash
# Sets up an environment with the test tools and runs linters and tests. Arguments go to pytest.
#   bash scripts/test.sh                  everything (at most 20 minutes on two cores)
#   bash scripts/test.sh -m "not slow"    the fast part (at most 3)
source "$(dirname "$0")/environment.sh" test
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
