# Sourced by the scripts that run several commands in sequence. A shell handles a signal only after its foreground
# command has ended, so commands run in the background. A signal is forwarded to the command and ends the script.
child=
pass_on() {  # pass_on CODE
  if [ -n "$child" ]; then
    kill -s TERM "$child" 2>/dev/null
    wait "$child" 2>/dev/null
  fi
  exit "$1"
}
trap 'pass_on 130' INT
trap 'pass_on 143' TERM
play() {  # play COMMAND...: returns its exit code; exits if the command was ended by a signal
  "$@" &
  child=$!
  wait "$child"
  local code=$?
  child=
  case "$code" in 130 | 143) exit "$code" ;; esac
  return "$code"
}
