#!/usr/bin/env bash
# Train on several machines under Slurm, one process per GPU. Near its time limit the job saves and requeues itself.
#   sbatch --nodes 2 train/launch/slurm.sh pMF-H/16 runs/h16 --data data/imagenet256 --sharding hybrid
#SBATCH --job-name=pmf
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
preset=${1:?expected PRESET OUT [options]} out=${2:?expected PRESET OUT [options]}
shift 2
if compgen -G "$out/checkpoints/step-*" > /dev/null; then
    run=(--resume "$out")
else
    run=("$preset" --out "$out")
fi
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
again=no
# Slurm signals only this shell; srun forwards the signal to the processes, which save and exit.
trap 'again=yes; kill -USR1 "$!" || true' USR1
# srun gets the job's cores per task only if asked for them. A process that fails must end the others, which would wait.
# shellcheck disable=SC2016 # every process expands its own ranks
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python -m pmf.train train "$@"' train "${run[@]}" "$@" &
status=0
wait $! || wait $! || status=$?
[ "$again" = no ] || scontrol requeue "$SLURM_JOB_ID" # whatever the status: it may have been starting, or saving
exit $status
