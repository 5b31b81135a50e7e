#!/usr/bin/env bash
# Runs an evaluation as a Slurm array, and merges it:
#
#   bash examples/slurm/submit.sh SHARDS RUN COMMAND...
#   bash examples/slurm/submit.sh 8 runs/dtd eval classify --model openai/clip-vit-large-patch14 --data dtd \
#       --attack apgd-ce --eps 4/255
#
# RUN is a folder that all nodes see; the whole is in RUN/whole. COMMAND is one that takes --shard: `eval classify`,
# `eval retrieve`, `eval coco`, `eval vqa`, `eval suspicion`, `attack ATTACK`. Flags for sbatch go into SBATCH_FLAGS
# ("--partition=gpu --gres=gpu:1"), the binary into RADAPT. Nodes without a way out need models and data in the
# Hub's cache beforehand (HF_HOME, HF_HUB_OFFLINE=1). A shard that was lost for good is sent once more by
# `sbatch --array=3 shard.sbatch 8 RUN COMMAND...`, then merge.sbatch.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if [ $# -lt 3 ]; then
    echo "submit.sh: expected SHARDS RUN COMMAND..., found $# arguments" >&2
    exit 2
fi
shards=$1
mkdir -p "$2"
run=$(cd "$2" && pwd)
shift 2
# shellcheck disable=SC2086 # several flags in one variable
array=$(sbatch --parsable ${SBATCH_FLAGS:-} --array="1-$shards" "$here/shard.sbatch" "$shards" "$run" "$@")
# After any end: a shard with a picture that could not be read ends with exit code 1 and is whole all the same.
# shellcheck disable=SC2086
merge=$(sbatch --parsable ${SBATCH_FLAGS:-} --dependency="afterany:$array" "$here/merge.sbatch" "$shards" "$run")
echo "shards: job $array; merge: job $merge; the whole will be in $run/whole"
