#!/usr/bin/env bash
# Answers to many recordings as a SLURM job, with arguments in a fixed order:
#
#   submit_batch_inference.sh CHECKPOINT INPUTS OUTPUT [HF_REPO] [MAX_LENGTH] [PERPLEXITY] [GENERATE_AUDIO]
#                             [DIAGNOSTICS] [DIAGNOSTIC_FREQUENCY]
#
#   1 CHECKPOINT            a run, a step or a consolidated folder
#   2 INPUTS                a file, a quoted glob, a folder, a .txt or .jsonl list; several with commas between
#   3 OUTPUT                folder of the answers
#   4 HF_REPO               another place with the base model's files, a hub repo or folder ("" = of the checkpoint)
#   5 MAX_LENGTH            seconds of each recording ("" = all)
#   6 PERPLEXITY            true or false (false)
#   7 GENERATE_AUDIO        true or false (true)
#   8 DIAGNOSTICS           of the TTT layers: true or false (false)
#   9 DIAGNOSTIC_FREQUENCY  frames between records (100)
#
# MOSHI_TTT_LAUNCH holds settings of the site, see docs/slurm.md: "launch=h100 launch.array=0-7".
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
if [[ $# -lt 3 || $# -gt 9 ]]; then
    sed -n '/^#   submit/,/^# MOSHI/s/^# \{0,2\}//p' "${BASH_SOURCE[0]}" >&2
    echo "error: expected 3 to 9 arguments, got $#" >&2
    exit 2
fi
checkpoint=$1 inputs=$2 output=$3 repo=${4:-} max_length=${5:-}
perplexity=${6:-false} generate=${7:-true} diagnostics=${8:-false} frequency=${9:-100}

for flag in perplexity generate diagnostics; do
    [[ ${!flag} == true || ${!flag} == false ]] || {
        echo "error: $flag must be true or false, got '${!flag}'" >&2
        exit 2
    }
done
[[ $frequency =~ ^[1-9][0-9]*$ ]] || {
    echo "error: the diagnostic frequency is a number of frames, such as 100; got '$frequency'" >&2
    exit 2
}
[[ -z $max_length || $max_length =~ ^[0-9]+(\.[0-9]+)?$ ]] || {
    echo "error: the maximum length is a number of seconds, such as 600; got '$max_length'" >&2
    exit 2
}
[[ $diagnostics == true ]] && every=$frequency || every=0

# A value as Hydra's grammar has it, whatever is in it.
quoted() { printf "'%s'" "${1//\'/\\\'}"; }
list=
IFS=, read -ra names <<<"$inputs"
for name in "${names[@]}"; do list+=${list:+,}$(quoted "$name"); done

arguments=(
    "checkpoint=$(quoted "$checkpoint")" "inputs=[$list]" "output=$(quoted "$output")"
    "perplexity.enable=$perplexity" "generate=$generate" "diagnostics.every_frames=$every"
)
[[ -z $repo ]] || arguments+=("base=$(quoted "$repo")")
[[ -z $max_length ]] || arguments+=("max_sec=$max_length")

cat <<EOF
checkpoint:   $checkpoint
inputs:       $inputs
output:       $output
base model:   ${repo:-of the checkpoint}
max length:   ${max_length:-unlimited}${max_length:+ s}
perplexity:   $perplexity
audio:        $generate
diagnostics:  $diagnostics$([[ $every == 0 ]] || echo ", every $every frames")
EOF
read -ra launch <<<"${MOSHI_TTT_LAUNCH:-}"
command=("${MOSHI_TTT_PYTHON:-$here/../../.venv/bin/python}" -m finetune.submit batch_inference)
command+=("${launch[@]}" "${arguments[@]}")
printf 'running:     '
printf ' %q' "${command[@]}"
echo
exec "${command[@]}"
