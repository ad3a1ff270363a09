#!/usr/bin/env bash
# Is criss-cross attention as good as dense attention at equal cost? Trains both, judges both, writes the table.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: tools/quality.sh [--datasets retina pbmc3k] [--seeds 0 1 2] [--steps S ...] [--learning-rates R ...]
                        [--dry-run] [--out PATH] ...

Trains criss-cross models (16, 64 and 256 latents) and a dense one of as many parameters for equal numbers of
steps, equal FLOPs and equal time, short and long, and criss-cross on contexts cut to 500, 1,000 and 2,000 tokens;
judges all on the same hidden counts of held-out cells; writes PATH.json, PATH.md and PATH.png (default:
tools/results/quality).
With --learning-rates, also criss-cross (64 latents) and dense at these peaks, of the first seed.
Takes hours on two CPU cores; --dry-run says how many. It goes on from what PATH.json holds: without arguments, from
the result in the repository.

  --help-all  every option
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in
  -h | --help) usage && exit 0 ;;
  --help-all) set -- --help ;;
esac

tools/setup.sh
exec .venv/bin/python -m tools.quality "$@"
