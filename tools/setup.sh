#!/usr/bin/env bash
# Makes the Python environment .venv in the repository root and installs cctrain into it (editable, with what
# the tests need), every package in the version that tools/constraints.txt names. A second call returns at once.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: tools/setup.sh [--device auto|cpu|cuda] [--extra figures] [--dry-run]

Makes .venv in the repository root: Python 3.11 or newer, and cctrain with everything it needs. Takes one to
three minutes the first time, under a second when nothing has changed. A half-made .venv is made again.

  --device cpu    PyTorch without CUDA: about 2 GB
  --device cuda   PyTorch with CUDA: about 7 GB. Works on a login node too, which has no GPU itself
  --device auto   what .venv was made for before; else cuda where nvidia-smi finds a GPU, else cpu. The default
  --extra figures also umap-learn, for embeddings drawn as UMAP
  --dry-run       say what would be done, do nothing

PYTHON=/path/to/python3.12 chooses the interpreter. pip's own configuration (index, proxy, certificates) is
honoured. What pip says is kept in .venv/setup.log.
TEXT
}

say() { printf '%s\n' "$*" >&2; }
fail() { # fail STATUS MESSAGE
  say "tools/setup.sh: $2"
  exit "$1"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=$root/.venv
log=$venv/setup.log
stamp=$venv/setup.done # exists only in a complete .venv: digest, device, extras
constraints=tools/constraints.txt

main() {
  read_options "$@"
  read_stamp
  choose_device
  digest=$({ printf '%s\n' "$root" && cat pyproject.toml "$constraints"; } | sha256sum | cut -d' ' -f1)
  if is_unchanged; then
    say "The environment .venv ($device) is up to date."
    return
  fi
  find_python
  torch_version=$(sed -n 's/^torch==//p' "$constraints")
  if ((dry_run)); then
    say "Would make .venv with $python for $device: torch $torch_version, cctrain with the extras $extras."
    return
  fi
  check_disk
  local started=$SECONDS
  make_venv
  install_torch
  install_cctrain
  printf '%s %s %s\n' "$digest" "$device" "$extras" >"$stamp"
  say "Done in $((SECONDS - started)) s, $(du -sh "$venv" | cut -f1). Use it: source .venv/bin/activate"
}

read_options() {
  device=auto extras=test dry_run=0
  while (($#)); do
    case $1 in
      --device | --extra)
        (($# > 1)) || fail 2 "$1 needs a value. See tools/setup.sh --help."
        set_option "$1" "$2"
        shift
        ;;
      --device=* | --extra=*) set_option "${1%%=*}" "${1#*=}" ;;
      --dry-run) dry_run=1 ;;
      -h | --help)
        usage
        exit 0
        ;;
      *) fail 2 "unknown option $1. See tools/setup.sh --help." ;;
    esac
    shift
  done
}

set_option() {
  case $1=$2 in
    --device=auto | --device=cpu | --device=cuda) device=$2 ;;
    --extra=figures) extras=figures,test ;;
    --device=*) fail 2 "--device is auto, cpu or cuda, not '$2'." ;;
    *) fail 2 "there is no extra '$2'. There is: figures." ;;
  esac
}

read_stamp() {
  made_digest='' made_device='' made_extras=''
  # A .venv whose interpreter is gone (an upgraded or moved Python) counts as half made.
  if [[ -f $stamp ]] && "$venv/bin/python" -c pass 2>/dev/null; then
    read -r made_digest made_device made_extras <"$stamp"
  fi
  # What has once been asked for stays: tools/test.sh does not know of it.
  if [[ $made_extras == figures,test ]]; then extras=figures,test; fi
}

choose_device() {
  [[ $device == auto ]] || return 0
  if [[ -n $made_device ]]; then
    device=$made_device
  elif nvidia-smi -L >/dev/null 2>&1; then
    device=cuda
    say "A GPU is visible: installing for cuda. (tools/setup.sh --device cpu chooses otherwise.)"
  elif is_login_node; then
    device=cpu
    say "Slurm is here and no GPU is visible, as on a login node: installing for cpu."
    say "If the jobs will run on GPUs, choose otherwise: tools/setup.sh --device cuda"
  else
    device=cpu
    say "No GPU is visible: installing for cpu. (tools/setup.sh --device cuda chooses otherwise.)"
  fi
}

is_login_node() {
  [[ -n ${SLURM_CONF:-} ]] || command -v sbatch >/dev/null || command -v scontrol >/dev/null
}

is_unchanged() {
  [[ $made_digest == "$digest" && $made_device == "$device" && $made_extras == "$extras" ]]
}

find_python() {
  local candidate seen='' candidates=(python3.11 python3.12 python3.13 python3)
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    seen=$candidate
    if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
      python=$(command -v "$candidate")
      return
    fi
  done
  [[ -z $seen ]] || fail 1 "$seen cannot make environments: its venv module is missing.
On Debian and Ubuntu: apt-get install ${seen##*/}-venv. Or choose another Python: PYTHON=/path/to/python3.12 $0"
  fail 1 "no Python 3.11 or newer was found (looked for: ${candidates[*]}).
On a cluster: module avail python. Or choose one: PYTHON=/path/to/python3.12 $0"
}

check_disk() {
  local needed=5 free
  [[ $device == cpu ]] || needed=12
  free=$(df -Pk "$root" | awk 'NR == 2 { print int($4 / 1048576) }')
  ((free >= needed)) || fail 1 "only $free GB are free here, $device needs $needed GB. Free some space."
}

make_venv() {
  if [[ -e $venv && $made_device != "$device" ]]; then
    [[ -f $log ]] || fail 1 ".venv is there already and was not made by this script. Move it away."
    say "Removing .venv: it was ${made_device:+made for }${made_device:-left half made}."
    rm -rf "$venv"
  fi
  say "1/3 Python: $("$python" --version 2>&1) in .venv"
  mkdir -p "$venv"
  : >"$log"
  rm -f "$stamp"
  run "$python" -m venv "$venv"
}

install_torch() {
  say "2/3 PyTorch $torch_version for $device"
  if [[ $device == cuda ]]; then
    # pip takes 2.13.0+cpu for newer than 2.13.0 where its configuration offers both.
    run pip_install --no-deps "torch==$torch_version,!=$torch_version+cpu"
  elif ! pip_install --no-deps "torch==$torch_version+cpu"; then
    say "No CPU build where pip looks, so the CUDA build is taken: larger by some GB, and it runs on CPUs too."
    say "(PyTorch's own index for CPU builds, in PIP_EXTRA_INDEX_URL, would change that.)"
    run pip_install "torch==$torch_version"
  fi
}

install_cctrain() {
  say "3/3 cctrain with the extras $extras (the longest part: a minute or two)"
  # DeepSpeed builds its compiled operations when one is used, so that its installation needs no compiler.
  DS_BUILD_OPS=0 run pip_install -c "$constraints" -e ".[$extras]"
  run "$venv/bin/python" -m pip check
  run "$venv/bin/python" -c "
import cctrain, torch
assert '$device' == 'cpu' or torch.version.cuda, f'torch {torch.__version__} is not for $device'"
}

pip_install() {
  "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off "$@" >>"$log" 2>&1
}

# Runs a command into the log; when it fails, shows the end of the log and says what to do.
run() {
  "$@" >>"$log" 2>&1 && return
  say "The end of .venv/setup.log:"
  tail -n 20 "$log" >&2
  if logged 'NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|from versions: none'; then
    fail 1 "the package index could not be reached, or lacks what is named above. Check the network and
\`python3 -m pip config list\`, then call this again."
  elif logged 'No space left on device|Disk quota exceeded'; then
    fail 1 "the disk or the quota is full. Free some space and call this again."
  elif logged 'command .*(gcc|cc|g\+\+).* failed|Python\.h'; then
    fail 1 "a package had to be compiled. Choose a Python that has it ready-made (PYTHON=python3.11 $0), or
install a compiler and the Python headers (Debian: apt-get install build-essential python3-dev)."
  elif [[ $device == cuda ]] && logged 'No matching distribution found for torch'; then
    fail 2 "pip is configured where no CUDA build of torch $torch_version for this Python is to be had (a CPU
build does not count). Add an index that has it (PIP_EXTRA_INDEX_URL), or choose --device cpu."
  elif logged 'No matching distribution found|ResolutionImpossible'; then
    fail 1 "a version in $constraints is not to be had for this Python. Choose another: PYTHON=python3.11 $0"
  fi
  fail 1 "that failed. Read .venv/setup.log, then call this again: it makes the environment anew."
}

logged() { grep -qE "$1" "$log"; }

main "$@"
