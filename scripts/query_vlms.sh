#!/usr/bin/env bash
# Measures VLMs one after the other: bash scripts/query_vlms.sh [VLM ...] [-- ARGUMENTS of safervlm predict ...]
# A VLM is a file of configs/vlm without its ending, or the path of another such file; left out, all of configs/vlm are
# measured. Each has the run folder $RUNS/VLM (RUNS: runs/query) and the log $RUNS/VLM.log. What the same command has
# completed is skipped, a failure doesn't stop the others, and the end is a table of VLMs and capabilities; exit code 1
# after a failure, 3 where questions have no answer.
set -uo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \?//p}' "$0"; exit ;; esac
command -v safervlm >/dev/null || { echo "safervlm isn't on the path: activate its environment" >&2; exit 1; }
source "$(dirname "$0")/signals.sh"
runs="${RUNS:-runs/query}"
vlms=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in -*) echo "$0: unknown option $1: arguments of safervlm stand behind --; see --help" >&2; exit 2 ;; esac
  vlms+=("$1")
  shift
done
[ $# -gt 0 ] && shift
if [ "${#vlms[@]}" = 0 ]; then for file in configs/vlm/*.yaml; do vlms+=("$(basename "$file" .yaml)"); done; fi
for vlm in "${vlms[@]}"; do
  [ -f "$vlm" ] || [ -f "configs/vlm/$vlm.yaml" ] || {
    echo "$0: no VLM $vlm: it is neither a file nor one of $(basename -s .yaml -a configs/vlm/*.yaml | paste -sd ' ')" >&2
    exit 2
  }
done
scripts="$(dirname "$0")"
folders=() ended=0
mkdir -p "$runs"
for vlm in "${vlms[@]}"; do
  file="$vlm"
  [ -f "$file" ] || file="configs/vlm/$vlm.yaml"
  run="$runs/$(basename "$vlm" .yaml)"
  folders+=("$run")
  line=(predict --config configs/measure.yaml "$@" --model.vlm "$file" --run "$run")
  if python "$scripts/query_matrix.py" --complete "safervlm ${line[*]}" "$run"; then
    echo "$vlm: complete, skipped"
    continue
  fi
  echo "$vlm: measuring into $run"
  exec {log}> >(trap '' INT TERM; exec tee "$run.log")
  tee=$!
  play safervlm "${line[@]}" >&"$log" 2>&1
  code=$?
  exec {log}>&-
  wait "$tee"  # it writes the last line, which the table shows
  case "$code" in
    0) ;;
    3) [ "$ended" = 1 ] || ended=3 ;;  # some questions have no answer; the table says how many
    *)
      ended=1
      echo "$vlm: failed with exit code $code, going on with the next; see $run.log" >&2
      ;;
  esac
done
python "$scripts/query_matrix.py" "${folders[@]}"
exit "$ended"
