#!/usr/bin/env bash
# Evaluates the original model and models trained from it on every dataset, and writes one table:
#   bash scripts/eval.sh RUN... [-- ARGUMENTS of safervlm predict ...]
# The adapter of each RUN is evaluated into RUN/evaluation, the original model into $ORIGINAL/evaluation (default of
# ORIGINAL: runs/original). In ARGUMENTS, {} is replaced by the name of the run. The table is $OUT (default:
# runs/evaluation.html), with .csv, .xlsx and .tex files beside it. Complete evaluations are not repeated, a failed one
# does not stop the others, unavailable datasets are skipped with a warning, and the same command resumes.
set -uo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \?//p}' "$0"; exit ;; esac
command -v safervlm >/dev/null || { echo "safervlm isn't on the path: activate its environment" >&2; exit 1; }
source "$(dirname "$0")/signals.sh"
original="${ORIGINAL:-runs/original}"
runs=("$original")
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in -*) echo "$0: unknown option $1: arguments of safervlm stand behind --; see --help" >&2; exit 2 ;; esac
  known=
  for run in "${runs[@]}"; do [ "$(realpath -m "$run")" = "$(realpath -m "$1")" ] && known=1; done
  [ -n "$known" ] || runs+=("${1%/}")
  shift
done
[ $# -gt 0 ] && shift
failed=() partial=() evaluated=("$original")  # the first is the baseline of the comparison, whether it exists or not
for run in "${runs[@]}"; do
  adapter=()
  if [ "$run" != "$original" ]; then
    if [ ! -f "$run/adapter/adapter_config.json" ]; then
      failed+=("$run: no adapter in it; train one: bash scripts/train.sh")
      continue
    fi
    adapter=(--model.vlm.adapter "$run/adapter")
  fi
  echo "$run: evaluating into $run/evaluation"
  play safervlm predict --config configs/evaluate.yaml "${@//\{\}/$(basename "$run")}" "${adapter[@]}" --run "$run/evaluation"
  code=$?
  case "$code" in
    0) ;;
    3) partial+=("$run: some of it has no answer, see above; the same command asks it again") ;;
    *) failed+=("$run: exit code $code") ;;
  esac
  [ "$run" = "$original" ] || evaluated+=("$run")
done
play safervlm evaluation "${evaluated[@]}" --out "${OUT:-runs/evaluation.html}"
case "$?" in 0) ;; 3) partial+=("the table: a run is skipped, see above") ;; *) failed+=("the table") ;; esac
for line in "${partial[@]}"; do echo "incomplete: $line" >&2; done
for line in "${failed[@]}"; do echo "failed: $line" >&2; done
[ "${#failed[@]}" = 0 ] || exit 1
[ "${#partial[@]}" = 0 ] || exit 3
