# Sourced by other scripts: creates the virtual environment .venv once and puts it on the path.
# Set SAFERVLM_VENV to use another folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${SAFERVLM_VENV:-.venv}"
extras="$1"
stamp="$venv/.installed-$extras"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ scripts/constraints.txt -nt "$stamp" ]; then
  python="${PYTHON:-python3}"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "SaferVLM needs Python 3.11 or newer; $python is $("$python" --version). Set PYTHON to a newer one." >&2
    exit 1
  }
  echo "Setting up $venv (once) ..."
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --upgrade pip
  # Exact versions, so that a result can be repeated; the package itself allows a range.
  "$venv/bin/python" -m pip install --quiet --constraint scripts/constraints.txt --editable ".[$extras]"
  touch "$stamp"
fi
PATH="$(cd "$venv/bin" && pwd):$PATH"
export PATH
