#!/usr/bin/env bash
# sWUGGY, sBLIMP, StoryCloze and SALMon of a checkpoint, on all GPUs of a node or in an array of such jobs:
#
#   sbatch --gpus-per-node=8 scripts/slurm/run_paper_metrics.sh runs/a data.slm21=/data/sLM21-dataset tasks=[swuggy]
#   sbatch --array=0-3 --gpus-per-node=1 scripts/slurm/run_paper_metrics.sh baseline=kyutai/moshiko-pytorch-bf16 ...
#   python -m finetune.submit paper_metrics launch=h100 runs/a data.slm21=/data/sLM21-dataset tasks=[swuggy]
#
# The first argument is a run, a step or a consolidated folder, or baseline=REPOSITORY; the others are those of
# evaluation.paper_metrics. Interrupted or failed: submit the same again, what is finished is kept. Also runs
# without SLURM: bash scripts/slurm/run_paper_metrics.sh ...
#SBATCH --job-name=paper-metrics
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}"
eval "${MOSHI_TTT_SETUP:-}" # shell lines of the site, such as `module load cuda`
model=${1:?"usage: run_paper_metrics.sh CHECKPOINT [SETTING=VALUE ...]"}
shift
[[ $model == checkpoint=* || $model == baseline=* ]] || model=checkpoint=$model
python=${MOSHI_TTT_PYTHON:-.venv/bin/python}
processes=${MOSHI_TTT_PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
launcher=()
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    launcher=(srun --cpu-bind=none)
    # srun of SLURM 22.05 and newer takes the CPUs of a task from here alone.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

if [[ ${MOSHI_TTT_PREFLIGHT:-on} == on ]]; then # before any GPU is used
    "$python" -m evaluation.paper_metrics "$model" "$@" mode=check ||
        { echo "the check of model and data failed, nothing has been scored"; exit 1; }
fi
exec "${launcher[@]}" "$python" -m torch.distributed.run --standalone --nproc-per-node="$processes" \
    -m evaluation.paper_metrics "$model" "$@"
