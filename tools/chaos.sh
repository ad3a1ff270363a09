#!/usr/bin/env bash
# Does a training survive SIGKILL at any moment? Kills one again and again, resumes it, compares it bit for bit.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: tools/chaos.sh [--kills N] [--seed S] [--steps N] [--out FILE]

Trains on two ranks with ZeRO 2 and 3, in fp32 and bf16, undisturbed and disturbed: killed with SIGKILL at random
moments (all its processes, one rank, or the launcher alone), and resumed by the same command each time. The history,
the weights and the optimizer state must equal the undisturbed ones bit for bit. Needs two CPU cores; ten seconds a
kill when they are idle.

  --kills N   kills in all, shared among the four kinds of training; 100 by default, 8 at least
  --seed S    decides when and whom; printed, new by default
  --steps N   of each training, 120 by default
  --out FILE  a JSON file for the result, such as tools/results/chaos.json

Exit code 0 if every kill was survived. Otherwise it says what went wrong, and keeps the runs.
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in -h | --help) usage && exit 0 ;; esac

tools/setup.sh
exec .venv/bin/python -m tools.chaos "$@"
