#!/usr/bin/env bash
# The quick start, from a bare clone: makes .venv if need be, installs, runs the main job.
# Further arguments go to the program: tools/run.sh --config=configs/textworld_smoke.py --workdir=runs/smoke
set -euo pipefail
cd "$(dirname "$0")/.."
python_bin="${PYTHON:-python3}"
[ -x .venv/bin/python ] || "$python_bin" -m venv .venv
.venv/bin/python -m pip install --quiet --upgrade pip
.venv/bin/python -m pip install --quiet -e .
if [ $# -eq 0 ]; then
  set -- --config=configs/textworld_quickstart.py --workdir=runs/quickstart
fi
exec .venv/bin/python -m jaxagentrl.main "$@"
