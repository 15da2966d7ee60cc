#!/usr/bin/env bash
# Get a first answer without a download: write tiny random weights in the original's file layouts, convert them, render a
# clip, and ask about it. The steps are those for published weights; the answer of random weights is meaningless.
#
#     bash examples/first_answer.sh [DIR]        (default: first_answer)
set -euo pipefail
out=${1:-first_answer}
here=$(dirname "$0")

python -P -m vllama_jax.convert.tiny "$out/weights"
vllama convert \
    --llama "$out/weights/llama" \
    --eva-vit "$out/weights/eva_vit_g.safetensors" \
    --blip2 "$out/weights/blip2.safetensors" \
    --imagebind "$out/weights/imagebind.safetensors" \
    --vl "$out/weights/vl.safetensors" \
    --al "$out/weights/al.safetensors" \
    --config "$out/weights/config.json" \
    --out "$out/model"
python "$here/render_clip.py" "$out/clip.mp4"
vllama chat "$out/clip.mp4" "What is happening?" --model "$out/model" --max-new-tokens 40
