#!/usr/bin/env bash
# Sets up an environment with the test tools and runs linters and tests. Arguments go to pytest.
#   bash scripts/test.sh                  everything (about 20 minutes on two cores)
#   bash scripts/test.sh -m "not slow"    the fast part
#   bash scripts/test.sh -n 0 -k NAME     in one process, some tests
source "$(dirname "$0")/environment.sh" test
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ruff check .
ruff format --check .
mypy
# All tests of a file run in one process, because they share slow fixtures.
exec python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
