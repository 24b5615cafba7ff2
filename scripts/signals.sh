# Sourced by the scripts that play one command after the other. The shell hears of a signal only when a command in the
# foreground has ended, so commands are played in the background; a signal is passed on, and ends the script.
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
play() {  # play COMMAND...: its exit code; a command that was asked to end ends the script
  "$@" &
  child=$!
  wait "$child"
  local code=$?
  child=
  case "$code" in 130 | 143) exit "$code" ;; esac
  return "$code"
}
