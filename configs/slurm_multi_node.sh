#!/bin/bash
# Several machines under SLURM. Arguments go to `t2v-turbo distill`; --out and the data lie where all machines see them:
#
#   sbatch configs/slurm_multi_node.sh --out /shared/runs/turbo --data /shared/tars --batch 16 --dtype bfloat16
#   CONFIG=configs/fsdp2.yaml sbatch --nodes=4 configs/slurm_multi_node.sh --out /shared/runs/turbo --batch 32
#
# Two minutes before the time is up SLURM sends SIGTERM. The run ends after its step, saves (the launcher allows it 30 s for that), and is
# put into the queue again, to go on from its checkpoint; so it is when a machine was lost.
#SBATCH --job-name=t2v-turbo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

CONFIG=${CONFIG:-configs/ddp.yaml}
PER_NODE=${PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}         # processes on each machine
MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=${PORT:-$((10000 + SLURM_JOB_ID % 20000))}
export CONFIG PER_NODE MAIN PORT LAUNCH=${LAUNCH:-}     # LAUNCH: more options of `accelerate launch`
if [ "${SLURM_CPUS_PER_TASK:-}" ]; then                 # since SLURM 22.05 srun does not take --cpus-per-task from the job
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

stopped=
trap 'stopped=1; kill -TERM "$job"' TERM                # srun hands it on to all machines
srun --kill-on-bad-exit=0 bash -c '
    exec accelerate launch --config_file "$CONFIG" --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
        --num_processes $((SLURM_NNODES * PER_NODE)) --main_process_ip "$MAIN" --main_process_port "$PORT" $LAUNCH \
        -m t2v_turbo.cli distill "$@"' distill "$@" &
job=$!
wait "$job"; code=$?
if [ "$stopped" ]; then
    wait "$job"; code=$?                                # the first wait ended with the signal
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
