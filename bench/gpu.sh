#!/usr/bin/env bash
# Measures on one GPU, within 8 minutes, what docs/benchmarks.md calls not measured, and prints it as Markdown;
# where there are several GPUs, also a training on all of them, for one minute more.
#
#     bench/gpu.sh > gpu.md          --smoke: the smallest form, on a CPU, to see that every command runs
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
device=cuda
patience=1
tests=(tests/test_gpu.py tests/test_fusion.py tests/test_losses.py tests/test_instance_losses.py tests/test_decoder.py
       tests/test_sparse_unet.py -k "cuda or test_gpu")
main=(--clip-warmup "10,20" --workers 8)
long=(--epochs 94 --val-rooms 1 --workers 8)  # 94 epochs of 32 steps
step=(--device cuda --repeats 5)
batches=(--batches 1 4 8 16 32)
scale=()
encode=()
if [[ ${1:-} == --smoke ]]; then
    device=cpu
    patience=20
    tiny="--num-points 200 --image-size 32,48 --clip-model ViT-S-16-alt"
    tests=(tests/test_losses.py -k warm_up)
    read -ra words <<< "$tiny"
    main=("${words[@]}" --rooms 1 --epochs 1 --workers 0 --clip-pretrained none)
    long=("${main[@]}")
    step=(--device cpu --repeats 2)
    batches=(--batches 1 --threads 1 --options "$tiny")
    scale=(--max-points 12000 --threads 1)
    encode=(--batch 1 --threads 1)
fi

section() { printf '\n## %s\n\n' "$1"; }

# limited SECONDS COMMAND...: the command, the end of its output, how long it took, and how it ended
limited() {
    local start=$SECONDS status=0 seconds=$(($1 * patience))
    shift
    printf '    %s\n\n~~~\n' "$*"
    timeout --kill-after 10 "$seconds" "$@" 2> "$folder/errors" | tail -n 60 || status=$?
    if [[ $status != 0 ]]; then tail -n 20 "$folder/errors"; fi
    printf '~~~\n\n%s s, status %s\n\n' "$((SECONDS - start))" "$status"
}

if [[ $device == cuda ]]; then
    nvidia-smi --query-gpu=name,power.limit,driver_version --format=csv,noheader
fi

section "Tests of what a GPU computes"
limited 45 python -m pytest -q "${tests[@]}"

section "Training in bf16: its time and table"
limited 70 python train.py --device "$device" --amp bf16 --runs "$folder/bf16" --cache "$folder/cache" "${main[@]}"
python -m bench gpu --of "$folder"/bf16/* || true

section "3,000 steps in fp16: its bad steps"
limited 95 python train.py --device "$device" --amp fp16 --runs "$folder/fp16" --cache "$folder/cache" "${long[@]}"
python -m bench gpu --of "$folder"/fp16/* || true

section "The step by batch and dtype"
timeout $((50 * patience)) python -m bench gpu "${step[@]}" "${batches[@]}" 2> "$folder/errors" | grep -v ^encoding \
    || tail -n 20 "$folder/errors"

if [[ $device == cuda ]]; then
    section "The step against the 3D baseline, eager and compiled"
    limited 20 python -m bench step "${step[@]}"
    limited 60 python -m bench step "${step[@]}" --compile
    section "Sparse convolution"
    limited 10 python -m bench sparse --device cuda --repeats 8
    section "Volt"
    limited 20 python -m bench volt --device cuda
    section "A tower with meaning, as far as the time reaches"
    limited 65 python -m bench meaning --device cuda --seeds 1 --tower "$folder/tower" --out "$folder/meaning"
    gpus=$(nvidia-smi --list-gpus | wc -l)
    if ((gpus > 1)); then
        section "Training on $gpus GPUs: its time and table"
        limited 60 torchrun --nproc-per-node "$gpus" train.py --runs "$folder/several" --cache "$folder/cache" "${main[@]}"
    fi
fi

section "Encoder: share of the peak of a matrix product"
limited 15 python -m bench encode --device "$device" --repeats 3 "${encode[@]}"

section "Sampling"
limited 10 python -m bench sample --device "$device" --repeats 3

section "Projection, sampling and gate by points"
limited 10 python -m bench scale --device "$device" "${scale[@]}"
