#!/usr/bin/env bash
# From a fresh clone to a criss-cross transformer trained on real cells, and an answer to "did it learn?".
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: tools/quickstart.sh [--device auto|cpu|cuda]

Sets .venv up, fetches 1,000 human retina nuclei (13 MB), prepares a token store, trains a small model, stopping
once on the way to resume, and compares it with baselines on cells that it never saw. Five to ten minutes on two
CPU cores with installation. What is there already is not made again: a second call goes on where the first one
ended. To train anew, move runs/quickstart away.
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in -h | --help) usage && exit 0 ;; esac

run=runs/quickstart
store=data/retina-store

step() { printf '\n\033[1m%s\033[0m\n' "$*" >&2; }

step "1/5 Set-up"
tools/setup.sh "$@"
PATH=$PWD/.venv/bin:$PATH

step "2/5 Fetch: 1,000 retina nuclei, all 70,116 genes"
cctrain fetch retina --out data/retina

step "3/5 Prepare: token store"
[[ -f $store/manifest.json ]] || cctrain prepare data/retina/retina.h5ad --out $store

# Behind the first checkpoint, asks the training to save and leave, as a preempted job is asked.
stop_once() {
  until [[ -f $run/checkpoints/latest ]]; do sleep 1; done
  touch $run/stop
}

step "4/5 Train: criss-cross attention over whole cells, stopped once and resumed"
if [[ ! -f $run/checkpoints/latest ]]; then
  stop_once &
  watcher=$!
  trap 'kill $watcher 2>/dev/null || true' EXIT
  cctrain train configs/quickstart.yaml
  kill $watcher 2>/dev/null || true
  cctrain inspect $run
fi
rm -f $run/stop # a stop that came too late
cctrain train configs/quickstart.yaml

step "5/5 Evaluate: held-out cells, beside baselines"
cctrain evaluate $run
# Where MLflow's database may not lie (network file systems), the run is in its journal all the same.
cctrain sync $run || true

cat <<TEXT

Three commands to go on with. Your own cells (raw counts, .h5ad or a 10x folder), from file to model:

  .venv/bin/cctrain prepare mine.h5ad --out data/mine && .venv/bin/cctrain train configs/cell.yaml data.store=data/mine

The same on Slurm, with these cells; this shows the batch script and submits nothing:

  .venv/bin/cctrain submit configs/cell.yaml data.store=$store --profile gpu --nodes 2 --gpus-per-node 4 --dry-run

The run that you have just trained, its restart, its loss and its n·M cost:

  .venv/bin/cctrain ui $run
TEXT
