#!/usr/bin/env bash
# The test suite, from a bare clone: makes .venv if need be, installs with the test extra, runs pytest.
# Further arguments go to pytest: --all runs the tests marked slow, too; tests/test_advantages.py -x a part of them.
set -euo pipefail
cd "$(dirname "$0")/.."
python_bin="${PYTHON:-python3}"
[ -x .venv/bin/python ] || "$python_bin" -m venv .venv
.venv/bin/python -m pip install --quiet --upgrade pip
.venv/bin/python -m pip install --quiet -e '.[test]'
# Houses and their stepping need the files of alfworld only; the tests that play its own engine beside
# ours are skipped without Fast Downward, whose compilation takes minutes (pip install -e '.[alfworld]').
.venv/bin/python -m pip install --quiet --no-deps 'alfworld>=0.4.2'
exec .venv/bin/python -m pytest "$@"
