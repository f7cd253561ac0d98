#!/usr/bin/env bash
# The whole course on a Slurm cluster, on one node or several, each with one GPU or several.
#
#   sbatch scripts/slurm.sh                                    profile paper, one node, four GPUs
#   sbatch --nodes=2 --gpus-per-node=8 scripts/slurm.sh        sixteen GPUs
#   PROFILE=mine.yaml sbatch --time=04:00:00 scripts/slurm.sh  a profile of your own
#
# Run it from the clone, after `make env` (or in an environment that holds the package), with the
# clone and TOMJERRY_RUNS (runs/ in the clone) on a disk that all nodes share. Notebooks and stages
# run on the first node with one GPU; stage 04, the longest, on all of them by `accelerate launch`,
# where a step sees as many of the profile's batches as there are GPUs: divide `ldm.batch_size` by
# their number to keep the step what it is.
#
# Compute nodes often cannot reach the internet. Then do first, where you log in:
#   tomjerry course --profile paper --only 01 02               pictures and captions
#   hf download stable-diffusion-v1-5/stable-diffusion-v1-5
#   hf download Salesforce/blip-image-captioning-base
# and submit with HF_HUB_OFFLINE=1.
#
# It may be stopped and queued again at any time: what is finished is skipped, a training goes on
# from its last checkpoint. Three minutes before its time is up it queues itself again.
#
#SBATCH --job-name=tomjerry
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail
: "${SLURM_JOB_ID:?submit this with sbatch}"
cd "${SLURM_SUBMIT_DIR:-.}"
if [[ -d .venv/bin ]]; then
  export PATH="$PWD/.venv/bin:$PATH"
fi

profile=${PROFILE:-paper}
nodes=${SLURM_JOB_NUM_NODES:-1}
gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-1}}
gpus=${gpus##*:} # "a100:4" is four
processes=$((nodes * gpus))
hosts=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}")
main=${hosts%%$'\n'*} # not through `head`, which can close the pipe while scontrol still writes
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one node do not meet
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((${SLURM_CPUS_PER_TASK:-1} + gpus - 1) / gpus))}

# A shell that waits for a background job hears signals at once. Queued again, Slurm sends SIGTERM
# to what runs, and a training answers with a checkpoint.
trap 'echo "time is up: queued again"; scontrol requeue "$SLURM_JOB_ID"' USR1
run() {
  srun --kill-on-bad-exit=1 "$@" &
  wait $!
}

launch=(accelerate launch --num_processes "$processes" --num_machines "$nodes"
  --main_process_ip "$main" --main_process_port "$port"
  --mixed_precision no --dynamo_backend no) # the profile's precision is what counts
if ((processes > 1)); then
  launch+=(--multi_gpu)
fi

echo "profile $profile on $processes processes: $nodes nodes with $gpus GPUs each, first $main:$port"
run --nodes=1 --ntasks=1 tomjerry course --profile "$profile" --only 00 01 02 03
# shellcheck disable=SC2016  # each node's own number, known only there
run --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
  bash -c 'exec "$@" --machine_rank "$SLURM_NODEID" scripts/stage.py 04 --profile "$0"' \
  "$profile" "${launch[@]}"
run --nodes=1 --ntasks=1 tomjerry course --profile "$profile"
