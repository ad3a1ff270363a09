#!/usr/bin/env bash
# Everything that must pass before a change is done: style, types, tests. Sets the environment up if needed.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: tools/test.sh [--all] [pytest arguments]

Runs ruff (check, format), mypy and pytest, and stops at the first that fails. Without --all, of the tests
that take over 10 seconds only the representative ones run. Pytest arguments are passed on, their paths
relative to the repository root:

  tools/test.sh tests/data                  one folder
  tools/test.sh -k "resume and not zero"    by name
  tools/test.sh --all -m browser            the tests that drive a browser

Sets .venv up with tools/setup.sh if it is missing or out of date. The browser tests need Chromium: root on
Debian has it installed here; elsewhere they are left out when it is missing.
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
    *) arguments+=("$argument") ;;
  esac
done

has_chromium() { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null

tools/setup.sh
if ! has_chromium && [[ $EUID == 0 && -f /etc/debian_version ]] && command -v apt-get >/dev/null; then
  echo "Installing Chromium for the browser tests." >&2
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium; } \
    >/dev/null 2>&1 || true
fi
# In CI a missing browser is a failure, which the tests themselves report.
if ! has_chromium && [[ -z ${CI:-} ]]; then
  echo "Left out: the browser tests. Chromium is missing (Debian: apt-get install chromium, as root)." >&2
  selection="${selection:+($selection) and }not browser"
fi

export PATH=$PWD/.venv/bin:$PATH
ruff check .
ruff format --check .
mypy
# Spelt so because bash 4.3 calls an empty array unset.
exec python -m pytest -m "$selection" ${arguments[@]+"${arguments[@]}"}
