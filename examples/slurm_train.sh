#!/bin/bash
# Train the tokenizer on several nodes under Slurm, over preemptions and time limits until it is done:
#
#     sbatch examples/slurm_train.sh run.toml runs/stage1
#     sbatch --nodes 4 --gpus-per-node 4 examples/slurm_train.sh run.toml runs/stage1 --set batch_size=96
#
# run.toml is a run file (docs/training.md#run-files) whose [data] names the pictures; they and the run's folder lie on
# a file system that all nodes see. Further arguments go to `alitok-fast train tokenizer`.
#
# Before a node is taken away (preemption with a GraceTime) and before the time limit (--signal), Slurm sends SIGTERM to
# each torchrun, which passes it on: the step is finished and saved, within 30 seconds, after which torchrun kills. The
# job then queues itself again and resumes, as it does after a crash, provided that this attempt has saved something:
# one that cannot start, or always ends at the same step, stops for good.

#SBATCH --job-name=alitok-tokenizer
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue

set -u
config=$1 out=$2
shift 2

saved() { stat --format %y "$out/checkpoint/state.pt" 2>/dev/null; }
before=$(saved)

srun --cpus-per-task "$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${NPROC_PER_NODE:-gpu}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((29500 + SLURM_JOB_ID % 1000))" \
    -m alitok_fast.cli train tokenizer --config "$config" --out "$out" --resume --device cuda --no-progress "$@"
status=$?

if [ "$status" -ne 0 ] && [ "$(saved)" != "$before" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
