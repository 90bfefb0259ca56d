# What runs/reproduce.sh and runs/ablations.sh share: how a long run goes on where it was.

# step FILE SCRIPT FLAGS: the last file that a step leaves, and the step
step() { [ -e "$1" ] || "${VENV:-.venv}/bin/python" "${@:2}"; }
# copy FROM TO: a folder, whole or not at all
copy() {
  [ -e "$2" ] || { mkdir -p "$2.part" && cp -r "$1/." "$2.part" && mv "$2.part" "$2"; }
}
