#!/usr/bin/env bash
# A real SLURM of one node on this machine, for tests/test_slurm.py. It listens on 127.0.0.1 only; all it writes is in one folder
# outside the project (MECHUNLEARN_SLURM, default: below the folder for temporary files), which everybody must be able to enter
# for the sake of munge. Needs the Debian packages
#     apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
#
#     tests/slurm_node.sh start      starts it; then:  eval "$(tests/slurm_node.sh env)"
#     tests/slurm_node.sh stop       ends it and its jobs, and forgets them
#     tests/slurm_node.sh env        prints what clients need to know
#
# It has two GPUs that are none, to ask for. SLURM_CPUS: cores of the node (default: 1, so that one job runs at a time); jobs are as nice as 5.
set -euo pipefail
R=${MECHUNLEARN_SLURM:-${TMPDIR:-/tmp}/mechunlearn-slurm-$(id -u)}
PATH=$PATH:/usr/sbin:/sbin
HOST=$(hostname -s)
export SLURM_CONF=$R/etc/slurm.conf

configure() {
    mkdir -p "$R"/{etc,state,spool,log,munge}
    chmod 755 "$R" "$R/munge"
    [ -s "$R/munge/munge.key" ] || dd if=/dev/urandom of="$R/munge/munge.key" bs=1 count=128 status=none
    chmod 400 "$R/munge/munge.key"
    printf 'Name=gpu File=/dev/%s\n' null zero > "$R/etc/gres.conf" # two GPUs that nobody computes on
    cat > "$SLURM_CONF" <<EOF
ClusterName=mechunlearn
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$R/munge/munge.sock
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$R/state
SlurmdSpoolDir=$R/spool
SlurmctldPidFile=$R/slurmctld.pid
SlurmdPidFile=$R/slurmd.pid
SlurmctldLogFile=$R/log/slurmctld.log
SlurmdLogFile=$R/log/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MailProg=/bin/true
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=2
InactiveLimit=0
MinJobAge=300
JobRequeue=1
GresTypes=gpu
NodeName=$HOST NodeAddr=127.0.0.1 NodeHostname=$HOST CPUs=${SLURM_CPUS:-1} RealMemory=4000 Gres=gpu:2 Feature=small State=UNKNOWN
PartitionName=debug Nodes=$HOST Default=YES MaxTime=1440 State=UP
EOF
}

start() {
    for tool in munged slurmctld slurmd sbatch; do
        command -v $tool >/dev/null || { echo "there is no $tool: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge" >&2; exit 2; }
    done
    [ -s "$SLURM_CONF" ] && sinfo -h >/dev/null 2>&1 && { echo "it is running"; return; } # without the file it would look for one for a minute
    configure
    munged --socket="$R/munge/munge.sock" --key-file="$R/munge/munge.key" --log-file="$R/munge/munged.log" \
        --pid-file="$R/munge/munged.pid" --seed-file="$R/munge/munged.seed" --num-threads=2 --origin=127.0.0.1
    (setsid slurmctld -c -D >"$R/log/slurmctld.out" 2>&1 </dev/null & echo $! >"$R/ctld.pid")
    sleep 1
    (setsid nice -n 5 slurmd -D >"$R/log/slurmd.out" 2>&1 </dev/null & echo $! >"$R/d.pid")
    for _ in $(seq 100); do
        [ "$(sinfo -h -o %T 2>/dev/null)" = idle ] && { echo "SLURM is up: $(sinfo -h -o '%n, %c cores, %G')"; return; }
        sleep .2
    done
    echo "it did not start: see $R/log" >&2
    exit 1
}

stop() {
    scancel -u "$(id -un)" 2>/dev/null || true
    for _ in $(seq 50); do [ -z "$(squeue -h 2>/dev/null)" ] && break; sleep .2; done
    for pid in "$R"/d.pid "$R"/ctld.pid "$R"/munge/munged.pid; do
        [ -s "$pid" ] && kill "$(cat "$pid")" 2>/dev/null || true
        rm -f "$pid"
    done
}

case ${1:-} in
    start) start ;;
    stop) stop ;;
    env) echo "export SLURM_CONF=$SLURM_CONF" ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
