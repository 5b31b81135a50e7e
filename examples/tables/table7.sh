#!/usr/bin/env bash
# Table 7: how many pictures R-Adapt+'s anchor is trained on, and its robustness at 4/255 on four sets.
#
#   bash examples/tables/table7.sh             the paper's model and sets
#   bash examples/tables/table7.sh --pocket    the same way on built-in models, within a minute
#
# Makes    an anchor for every number of PICTURES (10 epochs, the last kept, nothing held out), trained once for
#          all sets, and a run of every set with all of them under APGD-CE (100 steps); transfer, whose
#          pictures are crafted once, and adaptive.
# Needs    what table6.sh needs, and nine ImageNet training tars (data.sh imagenet-train 9). Memory about 3 GB.
# Cost     with N=1000 3.23 million attack steps at 224 pixels: 533 hours on two cores, 2.9 on a GPU that
#          sustains 100 TFLOP/s (`--cost`; recipe.sh says from which measured step).
# PICTURES, ATTACK, EPS   the numbers, the attack, its radius
# shellcheck source=recipe.sh disable=SC2034,SC2153
. "$(dirname "$0")/recipe.sh"

default CLIP "${MODEL:-openai/clip-vit-large-patch14}" pocket
default DATA "caltech256 food101 sun397 eurosat" pocket
default N 1000 4
default PICTURES "500 1000 2000 3000 5000 10000" "20 40"
ATTACK=${ATTACK:-apgd-ce}
EPS=${EPS:-4/255}
total=0 count=0
for pictures in $PICTURES; do total=$((total + pictures)) count=$((count + 1)); done
work "$(($(wc -w <<<"$DATA") * N * 100 * (1 + count) + total * (10 + EPOCHS)))" 224

$pocket || TRAIN=${TRAIN:-$(bash "$tables/data.sh" imagenet-train 9)}
names=()
held=(--held-out 0 --validate 0)
for pictures in $PICTURES; do
    N_TRAIN=$pictures
    plus "images-$pictures" --eps 4/255
    names+=("images-$pictures")
done
TECOA='' TGA='' FARE=''
classification "$(files "${names[@]}")"

finish <<'PAPER'
| right at 4/255 | 500 | 1000 | 2000 | 3000 | 5000 | 10000 |
|---|---|---|---|---|---|---|
| Caltech256 | 76.8 | 80.4 | 82.7 | 82.6 | 82.0 | 83.5 |
| Food101 | 58.6 | 65.2 | 70.2 | 70.6 | 69.8 | 70.8 |
| SUN397 | 46.8 | 51.8 | 58.3 | 59.7 | 60.1 | 60.6 |
| EuroSAT | 29.4 | 33.5 | 37.3 | 36.1 | 35.5 | 35.0 |
PAPER
