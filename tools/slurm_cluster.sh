#!/usr/bin/env bash
# A real Slurm of two nodes on this one machine, to try jobs on: its own munge key, controller, node daemons, ports.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: tools/slurm_cluster.sh start|stop DIR

  start   a controller and the nodes n1 and n2 (16 CPUs and 2 GPUs each, pretended), all state in DIR. Prints the
          line that makes Slurm's commands speak to it:  export SLURM_CONF=DIR/slurm.conf
  stop    ends all of it, jobs included; logs stay in DIR.

The partition `low` is the default; a job of the partition `high` preempts it (5 s of grace, then requeued).
Needs root, and Debian's packages: apt-get install --no-install-recommends slurm-wlm munge
TEXT
}

say() { printf '%s\n' "$*" >&2; }
fail() {
  say "tools/slurm_cluster.sh: $*"
  exit 1
}

# Debian's daemons are in sbin, which the PATH of a user who became root may lack.
PATH=$PATH:/usr/sbin:/sbin
NODES=(n1 n2)

start() {
  [[ $EUID == 0 ]] || fail "the daemons of this cluster need root."
  local program
  for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null ||
      fail "$program is missing: apt-get install --no-install-recommends slurm-wlm munge"
  done
  [[ ! -e $dir/slurm.conf ]] || fail "$dir holds a cluster already: stop it, and remove the folder."
  mkdir -p "$dir/munge" "$dir/state"
  trap stop ERR # half a cluster must not stay behind
  start_munge
  write_configuration
  export SLURM_CONF=$dir/slurm.conf
  slurmctld -i -L "$dir/slurmctld.log"
  local node
  for node in "${NODES[@]}"; do slurmd -N "$node"; done
  wait_until_idle
  trap - ERR
  printf 'export SLURM_CONF=%q\n' "$SLURM_CONF"
}

# A munge of its own: the machine's may be missing, and its key is nobody else's business.
start_munge() {
  chmod 700 "$dir/munge"
  (umask 377 && head -c 1024 /dev/urandom >"$dir/munge/key")
  # --force: the folder's parents (a temporary folder, say) may be writable by others.
  munged --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" --pid-file="$dir/munge/munged.pid" \
    --log-file="$dir/munge/munged.log" --seed-file="$dir/munge/seed" 2>/dev/null
}

write_configuration() {
  local host ports device
  host=$(hostname -s)
  read -r -a ports < <(free_ports)
  # Slurm wants a file for each GPU. These lead to nowhere, as /dev/null does: no program can take them for real.
  for device in 0 1; do mknod "$dir/gpu$device" c 1 3; done
  printf 'Name=gpu File=%s\n' "$dir/gpu[0-1]" >"$dir/gres.conf"
  cat >"$dir/slurm.conf" <<CONF
ClusterName=cctrain
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdSpoolDir=$dir/spool-%n
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmdLogFile=$dir/slurmd-%n.log
# No cgroups, no MPI, no accounting: what a container lacks, and jobs do not need.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/completed.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# The nodes claim more cores than the machine may have.
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[${ports[1]}-${ports[2]}] CPUs=16 RealMemory=128000 Gres=gpu:2
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 GraceTime=5 State=UP
PartitionName=high Nodes=n[1-2] PriorityTier=10 State=UP
CONF
}

# One for the controller and two neighbours for the nodes, nobody's at this moment.
free_ports() {
  local first port taken
  taken=" $(awk 'FNR > 1 { split($2, a, ":"); print a[2] }' /proc/net/tcp /proc/net/tcp6 2>/dev/null |
    while read -r port; do printf '%d ' "0x$port"; done)"
  for ((first = 17000 + RANDOM % 3000; ; first += 3)); do
    for port in "$first" $((first + 1)) $((first + 2)); do
      [[ $taken != *" $port "* ]] || continue 2
    done
    echo "$first $((first + 1)) $((first + 2))"
    return
  done
}

wait_until_idle() {
  local tries
  for ((tries = 0; tries < 60; tries++)); do
    [[ $(sinfo --noheader --Node --format=%T 2>/dev/null | sort -u) != idle ]] || return 0
    sleep 0.5
  done
  say "The nodes did not become idle within 30 s; the logs are in $dir:"
  tail -n 5 "$dir"/*.log >&2
  return 1
}

stop() {
  local pid_file
  export SLURM_CONF=$dir/slurm.conf
  # Jobs first: a node daemon that ends leaves its jobs running.
  if [[ -f $dir/slurmctld.pid ]]; then
    timeout 10 scancel --user=root 2>/dev/null || true
    wait_until_empty
  fi
  for pid_file in "$dir"/slurmd-*.pid "$dir/slurmctld.pid"; do
    [[ ! -f $pid_file ]] || end "$(<"$pid_file")" &
  done
  wait
  # munge would take seconds to leave, and has nothing to lose.
  [[ ! -f $dir/munge/munged.pid ]] || kill -KILL "$(<"$dir/munge/munged.pid")" 2>/dev/null || true
}

wait_until_empty() {
  local tries
  for ((tries = 0; tries < 30; tries++)); do
    timeout 10 squeue --noheader --states=all --format=%T 2>/dev/null | grep -qE 'RUNNING|COMPLETING' || return 0
    sleep 0.5
  done
}

end() { # end PID
  local tries
  kill "$1" 2>/dev/null || return 0
  for ((tries = 0; tries < 50; tries++)); do
    kill -0 "$1" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL "$1" 2>/dev/null || true
}

case ${1:-} in
  -h | --help)
    usage
    exit
    ;;
  start | stop) ;;
  *)
    usage >&2
    exit 2
    ;;
esac
[[ $# == 2 ]] || fail "name the folder of the cluster. See tools/slurm_cluster.sh --help."
mkdir -p "$2"
dir=$(cd "$2" && pwd)
"$1"
