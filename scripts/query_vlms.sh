#!/usr/bin/env bash
# Measures several VLMs: bash scripts/query_vlms.sh [VLM ...] [-- ARGUMENTS of safervlm predict ...]
# A VLM is the name of a file in configs/vlm without its extension, or the path of another such file. The default is all
# files in configs/vlm. Each VLM has the run folder $RUNS/VLM (default of RUNS: runs/query) and the log $RUNS/VLM.log.
# Runs that the same command has completed are skipped, and a failure does not stop the others. At the end a table of
# VLMs and capabilities is printed. The exit code is 1 after a failure, 3 if questions have no response.
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
  wait "$tee"  # tee writes the last line of the log, which the table shows
  case "$code" in
    0) ;;
    3) [ "$ended" = 1 ] || ended=3 ;;  # some questions have no response; the table shows how many
    *)
      ended=1
      echo "$vlm: failed with exit code $code, continuing with the next; see $run.log" >&2
      ;;
  esac
done
python "$scripts/query_matrix.py" "${folders[@]}"
exit "$ended"
