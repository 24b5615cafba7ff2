#!/usr/bin/env bash
# Trains the models that eval.sh evaluates: bash scripts/train.sh OBJECTIVE... [-- ARGUMENTS of safervlm fit ...]
# An OBJECTIVE is the name of a file in configs without its extension (sft, dpo, ppo), or the path of such a file. Each
# has the run folder $RUNS/OBJECTIVE (default of RUNS: runs). In ARGUMENTS, {} is replaced by the name of the objective:
# -- --config configs/pictograms/{}.yaml
# Finished runs are kept as they are, a failure does not stop the others, and the same command resumes.
set -uo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \?//p}' "$0"; exit ;; esac
command -v safervlm >/dev/null || { echo "safervlm isn't on the path: activate its environment" >&2; exit 1; }
source "$(dirname "$0")/signals.sh"
objectives=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in -*) echo "$0: unknown option $1: arguments of safervlm stand behind --; see --help" >&2; exit 2 ;; esac
  objectives+=("$1")
  shift
done
[ $# -gt 0 ] && shift
[ "${#objectives[@]}" -gt 0 ] || { echo "no objective: bash scripts/train.sh sft dpo ppo" >&2; exit 2; }
failed=()
for objective in "${objectives[@]}"; do
  file="$objective"
  [ -f "$file" ] || file="configs/$objective.yaml"
  name="$(basename "$objective" .yaml)"
  echo "$name: training into ${RUNS:-runs}/$name"
  play safervlm fit --config "$file" "${@//\{\}/$name}" --run "${RUNS:-runs}/$name"
  code=$?
  [ "$code" = 0 ] || failed+=("$name (exit code $code)")
done
[ "${#failed[@]}" = 0 ] || { printf 'failed: %s\n' "${failed[@]}" >&2; exit 1; }
