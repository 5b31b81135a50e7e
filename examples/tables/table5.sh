#!/usr/bin/env bash
# Table 5: captions and answers of LLaVA-1.5 about 300 COCO pictures, clean and under V-Attack at 16/255.
#
#   bash examples/tables/table5.sh             the paper's model and set
#   bash examples/tables/table5.sh --pocket    the same way on built-in models, within a minute
#
# Makes    R-Adapt+'s anchors at 4/255, 8/255 and 16/255, trained on LLaVA's own CLIP (an anchor fits both);
#          V-Attack's pictures (300 steps), transfer (crafted on that CLIP, undefended) and adaptive (through
#          each anchor); and a run in which LLaVA is asked for a caption and three answers of each.
# Needs    V-Attack's coco300 files with COCO val2017 (data.sh coco300, 0.8 GB), two ImageNet training tars
#          (data.sh; HF_TOKEN), CLIP ViT-L/14-336 and llava-hf/llava-1.5-7b-hf (14 GB). Memory: 16 GB for LLaVA
#          in 16 bits, 30 in f32; ISQ=q4k quantises its language model as it loads.
# Cost     684,000 attack steps at 336 pixels: 266 hours on two cores, 1.4 on a GPU that sustains 100 TFLOP/s
#          (`--cost`; recipe.sh says from which measured step). Beside it 13,200 answers of a 7B model, which
#          were not timed here.
# Judge    whether a response names the object is judged by words here (radapt eval judge); the paper does not
#          say who judged. JUDGE=URL JUDGE_MODEL=NAME ask a language model as well.
# SURROGATE, EPS, ISQ, OBJECTIVE   the CLIP; the radius; --isq; ce (the paper's) or embedding, which on the
#          pocket LLaVA costs less on clean pictures and recovers more (README.md)
# shellcheck source=recipe.sh disable=SC2034,SC2153
. "$(dirname "$0")/recipe.sh"

default MODEL llava-hf/llava-1.5-7b-hf pocket
default SURROGATE openai/clip-vit-large-patch14-336 pocket-clip
default N 300 3
default SETTINGS "4 8 16" "8 16"
default DATA "" pocket
EPS=${EPS:-16/255}
OBJECTIVE=${OBJECTIVE:-ce}
count=$(wc -w <<<"$SETTINGS")
work "$((N * 300 * (1 + count) + count * TRAINING))" 336

pictures=()
if [ -z "$DATA" ]; then
    DATA=$(bash "$tables/data.sh" coco300)
    pictures=(--pictures "$DATA_DIR/coco/val2017")
fi
from=(--data "$DATA" "${pictures[@]}")

CLIP=$SURROGATE
[ "$OBJECTIVE" = ce ] || CLIP=$MODEL
names=()
crafted=$OUT/crafted/transfer
craft=(attack v-attack --model "$SURROGATE" "${from[@]}" --n "$N" "${on[@]}" --eps "$EPS" "${attacking[@]}")
evaluate "$crafted" "${craft[@]}" --threat transfer
for setting in $SETTINGS; do
    name=plus-$setting
    plus "$name" --eps "$setting/255" --objective "$OBJECTIVE"
    evaluate "$OUT/crafted/adaptive-$setting" "${craft[@]}" --threat adaptive --anchor "$OUT/anchors/$name.safetensors"
    crafted=$crafted,$OUT/crafted/adaptive-$setting
    names+=("$name")
done
ask=(--device "$DEVICE" --dtype "$ANSWERS")
[ -z "${ISQ:-}" ] || ask+=(--isq "$ISQ")
[ -z "${JUDGE:-}" ] || ask+=(--judge "$JUDGE" --judge-model "$JUDGE_MODEL" --judge-cache "$OUT/verdicts.jsonl")
# Of what was crafted there is nothing to report but what is said of it.
runs=()
evaluate "$OUT/said" eval coco --model "$MODEL" "${from[@]}" --n "$N" "${ask[@]}" --crafted "$crafted" \
    --anchor none --also "$(files "${names[@]}")"

finish <<'PAPER'
| V-Attack 16/255 | CAP clean | CAP robust | VQA clean | VQA robust |
|---|---|---|---|---|
| no defence (`none`) | 100.0 | 21.3 | 100.0 | 22.6 |
| R-Adapt+ at 4/255 (`plus-4`) | 100.0 | 38.7 | 100.0 | 36.3 |
| 8/255 (`plus-8`) | 100.0 | 64.3 | 98.7 | 61.9 |
| 16/255 (`plus-16`) | 99.3 | 85.3 | 98.3 | 79.4 |
PAPER
