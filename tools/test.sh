#!/usr/bin/env bash
# Everything that must pass before a change is done: style, types, tests. Sets the environment up if needed.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: tools/test.sh [--all | --slurm] [pytest arguments]

Runs ruff (check, format), mypy and pytest, and stops at the first that fails. Without --all, of the tests
that take over 10 seconds only the representative ones run; --slurm runs all those, and only those, that
submit jobs to a real Slurm of two nodes on this machine. Pytest arguments are passed on, their paths
relative to the repository root:

  tools/test.sh tests/data                  one folder
  tools/test.sh -k "resume and not zero"    by name
  tools/test.sh --all -m browser            the tests that drive a browser

Sets .venv up with tools/setup.sh if it is missing or out of date. The browser tests need Chromium, the Slurm
tests root and Debian's slurm-wlm and munge, the test of the batch scripts shellcheck: root on Debian has them
installed here; elsewhere such tests are left out when they are missing.
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."

selection="not slow or representative"
arguments=()
for argument in "$@"; do
  case $argument in
    -h | --help)
      usage
      exit 0
      ;;
    --all) selection="" ;;
    --slurm) selection="slurm" ;;
    *) arguments+=("$argument") ;;
  esac
done

has_chromium() { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null
# Its daemons need root, and are in sbin.
has_slurm() { [[ $EUID == 0 && -x /usr/sbin/slurmctld && -x /usr/sbin/munged ]]; }
has_shellcheck() { command -v shellcheck; } >/dev/null

# try_to_install WHAT FOR PACKAGES
try_to_install() {
  [[ $EUID == 0 && -f /etc/debian_version ]] && command -v apt-get >/dev/null || return 0
  echo "Installing $1 for $2." >&2
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${@:3}"; } \
    >/dev/null 2>&1 || true
}

# leave_out MARKER WHICH REASON
leave_out() {
  echo "Left out: $2. $3" >&2
  selection="${selection:+($selection) and }not $1"
}

tools/setup.sh
has_chromium || try_to_install Chromium "the browser tests" chromium
has_slurm || try_to_install Slurm "the tests of jobs" slurm-wlm munge
has_shellcheck || try_to_install shellcheck "the tests of the batch scripts" shellcheck
# In CI what is missing is a failure, which the tests themselves report.
if [[ -z ${CI:-} ]]; then
  has_chromium || leave_out browser "the browser tests" "Chromium is missing (Debian: apt-get install chromium)."
  has_slurm || leave_out slurm "the Slurm tests" "They need root, and Debian's slurm-wlm and munge."
fi

export PATH=$PWD/.venv/bin:$PATH
ruff check .
ruff format --check .
mypy
# Spelt so because bash 4.3 calls an empty array unset.
exec python -m pytest -m "$selection" ${arguments[@]+"${arguments[@]}"}
