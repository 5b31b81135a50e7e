#!/usr/bin/env bash
# Table 10: the models and their vision encoders.
#
#   bash examples/tables/table10.sh             llava-hf/llava-1.5-7b-hf and Qwen/Qwen3-VL-8B-Instruct
#   bash examples/tables/table10.sh --pocket    the pocket LLaVA and a tiny random Qwen3-VL
#
# Makes    a training-free anchor of each, checks that it fits the model it is of, and writes what it says of the
#          encoder: kind, grid of patches, width, whether there is a class token. No robust figure.
# Needs    the models by Hub id (14 and 18 GB). Memory: the vision encoder alone is loaded, 1.3 and 2.4 GB in f32.
# Cost     seconds: one forward pass each.
# MODELS   others
# shellcheck source=recipe.sh disable=SC2034,SC2153
. "$(dirname "$0")/recipe.sh"

default MODELS "llava-hf/llava-1.5-7b-hf Qwen/Qwen3-VL-8B-Instruct" \
    "pocket $tables/../../tests/fixtures/qwen_chat/qwen3_vl"
if $cost; then
    echo "no attack steps: a forward pass for each model"
    exit 0
fi
mkdir -p "$OUT"
{
    echo "| model | anchor, tokens and width | grid | class token | picture |"
    echo "|---|---|---|---|---|"
    number=0
    for model in $MODELS; do
        number=$((number + 1))
        size=()
        case $model in */tests/fixtures/*) size=(--size 64) ;; esac
        anchor "white-$number" extract --model "$model" "${size[@]}"
        file=$OUT/anchors/white-$number.safetensors
        "$RADAPT" --quiet anchor check "$file" --model "$model" >/dev/null
        "$RADAPT" --quiet anchor show "$file" | awk -v model="$model" '
            { key = $1; $1 = ""; value[key] = substr($0, 2) }
            END {
                printf "| %s | %s | %s | %s | %s |\n", model, value["shape"], value["radapt.grid"],
                    value["radapt.class_token"], value["radapt.image_size"]
            }'
    done
    cat <<'PAPER'

The paper's: LLaVA, CLIP-L/14@336, llava-hf/llava-1.5-7b-hf; Qwen3-VL, ViT with DeepStack, Qwen/Qwen3-VL-8B-Instruct.
PAPER
} >"$OUT/table10.md"
cat "$OUT/table10.md"
echo "table10: $OUT/table10.md; anchors: $OUT/anchors"
