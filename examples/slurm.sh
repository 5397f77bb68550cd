#!/bin/bash
# Train on several nodes of a SLURM cluster: one task a GPU. sbatch examples/slurm.sh 7b data.sources.corpus.path=/data/text
# The run directory, the data and this environment lie on a disk that all nodes share.
#SBATCH --job-name=megalodon
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

# Five minutes before the end, and when the job is preempted, srun sends the signal to every rank: they agree on a step,
# save it and end with 75.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

srun --kill-on-bad-exit=1 megalodon pretrain "$@"
code=$?
# 75: stopped and saved; the same command continues where it was.
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
