#!/usr/bin/env bash
# Sets up an environment and runs the whole pipeline on the pictograms: measure, judge, align, measure again, report.
# After an interruption the same command resumes; a second run reuses existing results. Arguments are passed to
# `safervlm demo`.
source "$(dirname "$0")/environment.sh" demo
exec safervlm demo "$@"
