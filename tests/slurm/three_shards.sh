#!/usr/bin/env bash
# three_shards.sh RADAPT FOLDER CONTROLLER-PORT NODE-PORT: starts a Slurm of one node with daemons, keys and sockets of
# its own in FOLDER, runs examples/slurm there with three shards, kills one, and compares with a run in one piece.
set -euo pipefail
radapt=$1 folder=$2 controller=$3 node=$4
repository=$(cd "$(dirname "$0")/../.." && pwd)
user=$(id -un)
mkdir -p "$folder"/{state,spool,munge}
chmod 755 "$folder/munge"
dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
chmod 600 "$folder/munge/key"

cat >"$folder/slurm.conf" <<CONF
ClusterName=radapt
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$controller
SlurmdPort=$node
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# How long a requeued job waits, besides.
AuthInfo=socket=$folder/munge/socket,cred_expire=10
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
ReturnToService=2
KillWait=5
# More tasks than there may be cores: the test is of the order of things.
SlurmdParameters=config_overrides
NodeName=one NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 CPUs=3 State=UNKNOWN
PartitionName=all Nodes=one Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf

daemons=()
stop() {
    # Those started here, by their ids.
    for pid in "${daemons[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${daemons[@]}"; do wait "$pid" 2>/dev/null || true; done
}
trap stop EXIT
fail() {
    echo "three_shards.sh: $*" >&2
    tail -n 20 "$folder"/*.log >&2 || true
    exit 1
}
# soon SECONDS COMMAND...: waits for a command to succeed.
soon() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || fail "waited in vain: $*"
        sleep 0.2
    done
}

PATH=$PATH:/usr/sbin
munged --foreground --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
    --pid-file="$folder/munge/pid" --log-file="$folder/munged.log" --seed-file="$folder/munge/seed" \
    >"$folder/munged.out.log" 2>&1 &
daemons+=($!)
soon 20 test -S "$folder/munge/socket"
slurmctld -D -i >"$folder/slurmctld.log" 2>&1 &
daemons+=($!)
slurmd -D -N one >"$folder/slurmd.log" 2>&1 &
daemons+=($!)
idle() { sinfo --noheader --format=%t | grep -qx idle; }
soon 60 idle
sinfo

evaluation=(eval classify --n 36 --attack apgd-ce --steps 60 --eps 4/255 --batch 1)
cd "$folder"
export RADAPT=$radapt SBATCH_FLAGS="--cpus-per-task=1 --mem=0"
bash "$repository/examples/slurm/submit.sh" 3 "$folder/run" "${evaluation[@]}" | tee submitted
array=$(sed 's/shards: job \([0-9]*\);.*/\1/' submitted)
merge=$(sed 's/.*merge: job \([0-9]*\);.*/\1/' submitted)

begun() { [ "$(wc -l <run/shard-2/items.jsonl)" -ge 2 ]; }
soon 300 begun
squeue
# The evaluation of the second shard, by the folder that is its own.
victim=$(ps -eo pid=,args= | awk -v out="--out $folder/run/shard-2 " \
    'index($0, out) && index($0, "--shard 2/3") && !/sbatch|slurm_script|awk/ { print $1 }')
[ "$(wc -w <<<"$victim")" -eq 1 ] || fail "expected one process of shard 2, found: $victim"
had=$(wc -l <run/shard-2/items.jsonl)
kill -KILL "$victim"
echo "killed process $victim of shard 2 after $had pictures"
back() { grep -q 'killed by signal 9, back into the queue' "radapt-${array}_2.log"; }
soon 60 back
ended() { scontrol --oneliner show job "$merge" | grep -qE ' JobState=(COMPLETED|FAILED|CANCELLED|TIMEOUT) '; }
soon 500 ended
for task in 1 2 3; do sed "s/^/  /" "radapt-${array}_$task.log"; done
grep -q 'shard 2/3 on .*, start 2' "radapt-${array}_2.log" || fail "shard 2 was not started again"
[ -e run/whole/summary.json ] || { cat "radapt-merge-$merge.log" >&2; fail "nothing was merged"; }

"$radapt" --quiet "${evaluation[@]}" --out single >/dev/null
for file in items.jsonl summary.json run.json; do
    cmp "single/$file" "run/whole/$file" || fail "$file differs"
done
echo "shards of $(wc -l <run/shard-1/items.jsonl), $(wc -l <run/shard-2/items.jsonl) and $(wc -l <run/shard-3/items.jsonl) pictures, merged: equal to the single run byte for byte"
