#!/usr/bin/env bash
# Sets up an environment and plays the whole line on the pictograms: measure, judge, align, measure again, report.
# Interrupted, it goes on where it stopped; a second run reuses what is there. Arguments go to `safervlm demo`.
source "$(dirname "$0")/environment.sh" demo
exec safervlm demo "$@"
