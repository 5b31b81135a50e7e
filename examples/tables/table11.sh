#!/usr/bin/env bash
# Table 11: captions and answers of Qwen3-VL about 300 COCO pictures, clean and attacked at 16/255.
#
#   bash examples/tables/table11.sh             the paper's model and set
#   bash examples/tables/table11.sh --pocket    the same way on a tiny random Qwen3-VL, within a minute: it
#                                               answers nothing that makes sense
#
# Makes    R-Adapt+'s anchors at 4/255, 8/255 and 16/255, trained on Qwen3-VL's own tower (on its features: it has
#          no text tower, so the paper's cross-entropy is not defined there); pictures of
#          - V-Attack, 300 steps, crafted on a CLIP: transfer, the paper's. V-Attack looks for an object by a
#            CLIP's text tower, so there is none through a Qwen-VL's defence;
#          - PGD on what Qwen3-VL's language model reads, 100 steps: transfer (crafted on its undefended tower)
#            and adaptive (through each anchor);
#          and a run in which Qwen3-VL is asked for a caption and three answers of each.
# Needs    coco300 and two ImageNet training tars (data.sh), CLIP ViT-L/14-336, Qwen/Qwen3-VL-8B-Instruct (18 GB).
#          Memory: 20 GB in 16 bits; ISQ=q4k quantises its language model as it loads.
# Cost     V-Attack: 90,000 steps at 336 pixels of CLIP, 35 hours on two cores, 0.2 on a GPU that sustains
#          100 TFLOP/s (`--cost`). PGD and training: 264,000 steps of Qwen3-VL's tower at 448 pixels, and 16,500
#          answers of an 8B model, neither of which was timed here.
# SURROGATE, EPS, SIZE, ISQ   the CLIP; the radius; the pictures' size for training and PGD; --isq
# shellcheck source=recipe.sh disable=SC2034,SC2153
. "$(dirname "$0")/recipe.sh"

default MODEL Qwen/Qwen3-VL-8B-Instruct "$tables/../../tests/fixtures/qwen_chat/qwen3_vl"
[ "$MODEL" != pocket ] || MODEL=$tables/../../tests/fixtures/qwen_chat/qwen3_vl
default SURROGATE openai/clip-vit-large-patch14-336 pocket-clip
default N 300 2
default SETTINGS "4 8 16" "16"
default SIZE 448 64
default PGD_STEPS 100 2
EPS=${EPS:-16/255}
work "$((N * 300))" 336

mkdir -p "$OUT"
default DATA "" pocket
if [ "$DATA" = pocket ]; then
    DATA=$OUT/drawn PICTURES=$OUT/drawn/images
    [ -e "$DATA" ] || radapt pocket draw --n "$N" --out "$DATA" >/dev/null
elif [ -z "$DATA" ]; then
    DATA=$(bash "$tables/data.sh" coco300) PICTURES=$DATA_DIR/coco/val2017
fi
from=(--data "$DATA" --pictures "$PICTURES" --n "$N")

evaluate "$OUT/crafted/v-attack" attack v-attack --model "$SURROGATE" "${from[@]}" "${on[@]}" --eps "$EPS" \
    --threat transfer "${attacking[@]}"

# `attack pgd` takes classes of pictures: one class, of the pictures that V-Attack attacked.
mkdir -p "$OUT/pictures/all"
grep -oE '"id": ?"[^"]*"' "$OUT/crafted/v-attack/items.jsonl" | cut -d'"' -f4 | sort -u | while read -r name; do
    ln -sfn "$(realpath "$PICTURES/$name")" "$OUT/pictures/all/$name"
done
pgd() {
    local name=$1
    shift
    evaluate "$OUT/crafted/$name" attack pgd --model "$MODEL" --data "$OUT/pictures" --device "$DEVICE" \
        --size "$SIZE" --eps "$EPS" --steps "$PGD_STEPS" "$@"
    crafted=$crafted$OUT/crafted/$name,
}
crafted=
pgd transfer --threat transfer --anchor none

CLIP=$MODEL
# Its pictures are small squares here and there.
on=(--device "$DEVICE")
names=()
for setting in $SETTINGS; do
    name=plus-$setting
    plus "$name" --eps "$setting/255" --objective embedding --size "$SIZE"
    pgd "adaptive-$setting" --threat adaptive --anchor "$OUT/anchors/$name.safetensors"
    names+=("$name")
done
ask=(--device "$DEVICE" --dtype "$ANSWERS")
[ -z "${ISQ:-}" ] || ask+=(--isq "$ISQ")
# Of what was crafted there is nothing to report but what is said of it.
runs=()
# The first set's size is that at which `eval coco` builds the defences, to know those crafted through again.
evaluate "$OUT/said" eval coco --model "$MODEL" "${from[@]}" "${ask[@]}" --crafted "$crafted$OUT/crafted/v-attack" \
    --anchor none --also "$(files "${names[@]}")"

finish <<'PAPER'
| V-Attack 16/255 | CAP clean | CAP robust | VQA clean | VQA robust |
|---|---|---|---|---|
| no defence (`none`) | 100.0 | 28.7 | 100.0 | 37.9 |
| R-Adapt+ at 4/255 (`plus-4`) | 100.0 | 76.7 | 100.0 | 73.8 |
| 8/255 (`plus-8`) | 100.0 | 73.3 | 99.3 | 71.3 |
| 16/255 (`plus-16`) | 100.0 | 75.3 | 98.3 | 72.4 |
PAPER
