#!/usr/bin/env bash
# What only a GPU shows, on a machine that may have no registry: its tests, and the profile of the paper's shapes.
#
#   python scripts/pack_wheels.py           here, once: what the machine lacks, into .whl/
#   scripts/gpu_check.sh [tests] [profile]  there, in the checkout with .whl/ in it; both if neither is named
#
# PYTHON names the interpreter (python3). Logs and tables go to OUT (runs/gpu). PYTEST_WORDS are further words for pytest, tests among
# them ("-n 4 tests/gpu"; all of tests/gpu by default), PROFILE_WORDS for the profile ("--rounds 1").
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-runs/gpu}
mkdir -p "$out"
if compgen -G '.whl/*.whl' > /dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --upgrade --target "$site" .whl/*.whl || exit
  # The checkout first: of the package's own wheel only the entry points count.
  export PYTHONPATH=$PWD:$site
fi
export PYTHONUNBUFFERED=1
status=0
for part in "${@:-tests profile}"; do
  for each in $part; do
    case $each in
      tests)
        # shellcheck disable=SC2086
        "$python" -m pytest -m gpu --durations=20 -rs -p no:cacheprovider ${PYTEST_WORDS:-tests/gpu} 2>&1 | tee "$out/pytest.log" || status=1
        ;;
      profile)
        # shellcheck disable=SC2086
        "$python" -m harness profile --suite paper --out "$out/paper.csv" ${PROFILE_WORDS:-} 2>&1 | tee "$out/profile.log" || status=1
        ;;
      *)
        echo "gpu_check.sh: $each: say tests or profile" >&2
        exit 2
        ;;
    esac
  done
done
exit $status
