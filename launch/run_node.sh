#!/usr/bin/env bash
# Runs a recipe on this node, on every node of a hostfile, or as one node of several.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/status.sh"

# From the run's end, or a rank's failure, to SIGKILL. The last upload to MLflow may take 60 s.
KILL_SECONDS=90
# Variables that the other nodes need from this one, besides those that DeepSpeed forwards.
EXPORTS=(PATH VIRTUAL_ENV DS_ACCELERATOR OMP_NUM_THREADS TORCH_EXTENSIONS_DIR GLOO_SOCKET_IFNAME
  HF_HOME HF_HUB_OFFLINE)

usage() {
  cat <<'END'
usage: launch/run_node.sh [OPTION]... RECIPE [KEY=VALUE]...

On this node alone:
  launch/run_node.sh --gpus 8 RECIPE
On every node of a hostfile, over ssh and pdsh (a line `HOST slots=GPUS` per node):
  launch/run_node.sh --hostfile FILE RECIPE
Without ssh, the same command on every node, each with its own --node-rank:
  launch/run_node.sh --nodes 4 --node-rank 0 --master-addr HOST0 --gpus 8 RECIPE

  --gpus N          ranks on this node (default: its GPUs, or 1)
  --master-addr A   address of node 0 that every node reaches
  --master-port P   free port on node 0 (default 29500)
  --ssh-port P      ssh port for --hostfile (default 22)
  --dry-run         make every check of a start on every rank; write nothing

Paths in the recipe are relative to the working directory, which every node must see. The same
command again resumes from the last checkpoint. On SIGTERM, SIGUSR1 or Ctrl-C the run saves a
checkpoint and ends; a second Ctrl-C kills it. Exit codes: 0 done, 2 a mistake in the recipe or
data, 3 stopped with a checkpoint, 1 anything else. More: docs/cluster.md
END
}

# parse ARGUMENT...: sets the options, and RECIPE to the recipe with its overrides.
parse() {
  HOSTFILE='' NODES=1 NODE_RANK=0 MASTER_ADDR='' MASTER_PORT='' SSH_PORT='' GPUS='' DRY_RUN=''
  while [[ ${1:-} == -* ]]; do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --dry-run) DRY_RUN=$1 && shift && continue ;;
    esac
    [[ $# -ge 2 ]] || fail "$1 needs a value; see launch/run_node.sh --help"
    case $1 in
      --hostfile) HOSTFILE=$2 ;;
      --nodes) NODES=$2 ;;
      --node-rank) NODE_RANK=$2 ;;
      --master-addr) MASTER_ADDR=$2 ;;
      --master-port) MASTER_PORT=$2 ;;
      --ssh-port) SSH_PORT=$2 ;;
      --gpus) GPUS=$2 ;;
      *) fail "unknown option $1; see launch/run_node.sh --help" ;;
    esac
    shift 2
  done
  [[ $# -gt 0 ]] || fail "no recipe given; see launch/run_node.sh --help"
  RECIPE=("$@")
  [[ -z $HOSTFILE || -f $HOSTFILE ]] || fail "hostfile $HOSTFILE does not exist"
  ((NODES == 1)) || [[ -n $MASTER_ADDR ]] || fail "--nodes $NODES needs --master-addr, node 0's address"
  ((NODE_RANK < NODES)) || fail "--node-rank $NODE_RANK is not below --nodes $NODES"
}

free_port() {
  python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

hosts() {
  sed -nE 's/^\s*([^#[:space:]]+)\s+slots=.*/\1/p' "$HOSTFILE"
}

# over_ssh HOST COMMAND
over_ssh() {
  ssh -n -o BatchMode=yes -o ConnectTimeout=10 ${SSH_PORT:+-p "$SSH_PORT"} "$@"
}

# Every host must answer to ssh and have this folder and python. Prints a line per host that fails.
check_hosts() {
  local host python checks=() failed=0
  python=$(command -v python)
  for host in $(hosts); do
    {
      over_ssh "$host" "cd '$PWD' && test -x '$python'" 2>/dev/null ||
        case $? in
          255) fail "$host does not answer to ssh without a password" ;;
          *) fail "$host has no $PWD or no $python; they must be on a shared file system" ;;
        esac
    } &
    checks+=($!)
  done
  for check in "${checks[@]}"; do wait "$check" || failed=1; done
  ((failed == 0)) || exit 2
}

# Prints a .deepspeed_env: EXPORTS and the user's lines, without the blank lines and comments that
# DeepSpeed cannot parse.
write_environment() {
  local name
  grep -hsE '^[A-Za-z_][A-Za-z0-9_]*=' .deepspeed_env ~/.deepspeed_env || true
  for name in "${EXPORTS[@]}"; do
    [[ -z ${!name:-} ]] || echo "$name=${!name}"
  done
}

warn_of_secrets() {
  local name
  for name in $(compgen -e | grep -E '^MLFLOW_.*(PASSWORD|TOKEN|SECRET|KEY)'); do
    echo "warning: DeepSpeed puts $name on the nodes' command lines, where every user sees it;" \
      "unset it and keep it in ~/.mlflow/credentials" >&2
  done
}

# Starts a command in a session of its own, so that the terminal's Ctrl-C reaches only this script.
start() {
  setsid "$@" &
  STARTED+=($!)
}

start_everywhere() {
  check_hosts
  warn_of_secrets
  ENVIRONMENT=$(mktemp)
  write_environment >"$ENVIRONMENT"
  export DS_ENV_FILE=$ENVIRONMENT
  # Without these, ssh to an unreachable host would wait forever, and pdsh with it.
  export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=4"
  start deepspeed --hostfile "$HOSTFILE" --log_level error --master_port "${MASTER_PORT:-29500}" \
    ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} ${SSH_PORT:+--ssh_port "$SSH_PORT"} \
    --module s2t2_dist.train "${RECIPE[@]}" $DRY_RUN
}

start_here() {
  local port=$MASTER_PORT local_rank
  if [[ -z $port ]]; then
    port=29500
    ((NODES > 1)) || port=$(free_port)
  fi
  export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=$port LOCAL_SIZE=$GPUS
  export WORLD_SIZE=$((NODES * GPUS))
  for ((local_rank = 0; local_rank < GPUS; local_rank++)); do
    export LOCAL_RANK=$local_rank RANK=$((NODE_RANK * GPUS + local_rank))
    start python -u -m s2t2_dist.train "${RECIPE[@]}" $DRY_RUN
  done
}

# Tells the run to save and end. With a hostfile only rank 0 gets the signal; all ranks stop after
# the same step.
stop() {
  local now host pid
  ((STOPS += 1))
  if ((STOPS > 1)) && [[ $1 == INT ]]; then
    kill_all
  elif [[ -z $HOSTFILE ]]; then
    kill -TERM "${STARTED[@]}" 2>/dev/null || true
  else
    now=$(status_of "$RUN_DIR") host=$(field host "$now") pid=$(field pid "$now")
    if [[ $now == "$BEFORE" ]]; then # nothing to save yet
      kill -TERM "${STARTED[@]}" 2>/dev/null || true
    elif [[ $(field state "$now") == running && $host == "$(hostname)" ]]; then
      kill -TERM "$pid" || true
    elif [[ $(field state "$now") == running ]]; then
      over_ssh "$(hosts | head -n 1)" "kill -TERM $pid" || true
    fi
  fi
}

kill_all() {
  local leader
  for leader in "${STARTED[@]}"; do kill -KILL -- "-$leader" 2>/dev/null || true; done
}

# Waits for all started processes. Sets CODE to 0, or to the lowest exit code of those that failed:
# 2 and 3 say more than the codes of killed processes.
wait_for_end() {
  local leader code deadline=0 i
  local -A alive=()
  for leader in "${STARTED[@]}"; do alive[$leader]=1; done
  CODE=0
  while ((${#alive[@]})); do
    sleep 1 &
    wait $! || true
    for leader in "${!alive[@]}"; do
      kill -0 "$leader" 2>/dev/null && continue
      code=0
      wait "$leader" || code=$?
      unset "alive[$leader]"
      if ((CODE == 0 || (code != 0 && code < CODE))); then CODE=$code; fi
    done
    if ((deadline == 0)) && { ((CODE > 0)) || has_ended; }; then
      deadline=$((SECONDS + KILL_SECONDS))
    fi
    if ((deadline > 0 && SECONDS > deadline)); then kill_all; fi
  done
  # Rank 0 on another node may write its status a moment later.
  for ((i = 0; i < 10 && (CODE == 0 || CODE == 3); i++)); do
    [[ -z $DRY_RUN && $(field state "$(status_of "$RUN_DIR")") == running ]] || break
    sleep 1
  done
}

# Whether this job has written to status.json that the run has ended.
has_ended() {
  local now
  now=$(status_of "$RUN_DIR")
  [[ $now != "$BEFORE" && $(field state "$now") != running ]]
}

main() {
  parse "$@"
  command -v s2t2 >/dev/null || ensure_installed run
  RUN_DIR=$(output_dir "${RECIPE[@]}") || exit 2
  GPUS=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)}
  if ((GPUS == 0)); then GPUS=1; fi
  BEFORE=$(status_of "$RUN_DIR")
  STARTED=() STOPS=0 ENVIRONMENT=''
  trap 'rm -f "$ENVIRONMENT"' EXIT
  trap 'stop TERM' TERM USR1 HUP
  trap 'stop INT' INT
  if [[ -n $HOSTFILE ]]; then start_everywhere; else start_here; fi
  wait_for_end
  if ((STOPS > 0)) && [[ $(status_of "$RUN_DIR") == "$BEFORE" ]]; then
    echo "stopped before the first step: nothing to save" >&2
    exit 3
  fi
  [[ -z $DRY_RUN ]] || exit "$CODE" # status.json says nothing of it
  exit "$(exit_code "$RUN_DIR" "$BEFORE" "$CODE")"
}

main "$@"
