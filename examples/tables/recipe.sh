# shellcheck shell=bash disable=SC2034 # the scripts use what is set here, and it what they set
# What the table*.sh scripts share; each sources it. They all take
#
#   --pocket    run on what is built in, a few pictures and steps: the way through, not the figures
#   --cost      say how much work it is, and do none
#
# and these variables, of which those in capitals in a script's own header are further ones:
#
#   RADAPT      the binary                                     radapt
#   MODEL       the model; `pocket` is the same as --pocket    the paper's, by Hub id
#   DATA        the sets, in one word-split string             the paper's
#   N           pictures of each set                           the paper's, where it says
#   STEPS       steps of the attacks                           their own
#   OUT         where everything goes                          runs/tables/tableN
#   DATA_DIR    where downloads go (data.sh)                   data
#   TRAIN       labelled pictures that anchors are trained on  two tars of ImageNet's training pictures
#   DEVICE, DTYPE   as --device and --dtype                    cpu, bf16 (gradients; f32 decides)
#   ANSWERS     --dtype of the language model                  f16 on a CPU, bf16 elsewhere
#   STEP        seconds of one picture's attack step, for --cost
#
# A script that was killed goes on where it was when it is started again. Memory: `radapt bench attack` has a peak of
# 2.2 GB for ViT-L/14-336 in bf16 with the f32 tower that decides; the text side is 0.5 GB more.
set -euo pipefail

tables=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipe=$(basename "$0" .sh)
pocket=false
cost=false
if [ "${MODEL:-}" = pocket ] || [ "${DATA:-}" = pocket ]; then pocket=true; fi
for argument in "$@"; do
    case $argument in
    --pocket) pocket=true ;;
    --cost) cost=true ;;
    *)
        echo "$recipe: expected --pocket or --cost, found $argument" >&2
        exit 2
        ;;
    esac
done

# default VARIABLE VALUE POCKET: what a variable is where it was not given.
default() {
    local value=$2
    if $pocket; then value=$3; fi
    [ -n "${!1+x}" ] || printf -v "$1" %s "$value"
}

RADAPT=${RADAPT:-radapt}
OUT=${OUT:-runs/tables/$recipe}
default DATA_DIR data "$OUT"
default DEVICE cpu cpu
default DTYPE bf16 f32
default STEPS "" 2
default N_TRAIN 2000 60
default EPOCHS 10 1

on=(--device "$DEVICE" --dtype "$DTYPE")
# A language model on a CPU takes f16 or f32.
if [ "$DEVICE" = cpu ]; then default ANSWERS f16 f32; else default ANSWERS bf16 f32; fi
attacking=()
if [ -n "$STEPS" ]; then attacking+=(--steps "$STEPS"); fi
runs=()

# How much of the paper's work this is: `work PICTURE_STEPS SIDE`, steps of one picture at a ViT-L/14 of that side.
#
# 1.40 s is the step of README.md, "What a language model says of attacked pictures": V-Attack in bf16 at
# ViT-L/14-336 makes 12.9 pictures of 200 steps an hour on two cores (AVX-512 with bf16 products); in f32 it
# is 2.90 s. It is one pass forward and back through the tower, as a step of every attack here. At 224 pixels
# a pass has 0.424 of the arithmetic: 24 (12 N D^2 + 2 N^2 D) with N 257 and 577, D 1024. No step was timed
# on a GPU; for one the arithmetic is given.
work() {
    $cost || return 0
    LC_ALL=C awk -v steps="$1" -v side="$2" -v given="${STEP:-}" 'BEGIN {
        n = (side / 14) ^ 2 + 1; d = 1024
        tflop = 24 * 4 * (12 * n * d * d + 2 * n * n * d) / 1e12
        whole = 24 * 4 * (12 * 577 * d * d + 2 * 577 * 577 * d) / 1e12
        step = given == "" ? 1.40 * tflop / whole : given
        printf "%.3g attack steps of one picture at %d pixels\n", steps, side
        printf "  %.0f hours on two cores at %.2f s each (%s)\n", steps * step / 3600, step,
            given == "" ? "README.md, V-Attack in bf16" : "STEP"
        printf "  %.3g TFLOP in all, %.2f each: %.1f hours on a GPU that sustains 100 TFLOP/s (not measured)\n",
            steps * tflop, tflop, steps * tflop / 100 / 3600
    }'
    exit 0
}

# Runs the binary and says what it runs.
radapt() {
    echo "+ radapt $*" >&2
    "$RADAPT" --quiet "$@"
}

# The same for a run folder, which is the first argument: resumed, and kept for the report.
evaluate() {
    local folder=$1
    shift
    mkdir -p "$(dirname "$folder")"
    radapt "$@" --out "$folder" --resume >"$folder.txt"
    runs+=("$folder")
}

# anchor NAME COMMAND...: an anchor file that is made once.
anchor() {
    local file=$OUT/anchors/$1.safetensors
    shift
    mkdir -p "$OUT/anchors"
    [ -e "$file" ] || radapt anchor "$@" --out "$file" >/dev/null
}

# Pictures that choose the epoch and validate, beside those trained on.
held=()
if $pocket; then held=(--held-out 20 --validate 0); fi

# Its steps: crafting 2,400 pictures, one a picture and epoch, and APGD-CE on the 200 that validate, undefended,
# filtered and defended.
TRAINING=$((2400 * (10 + EPOCHS) + 200 * 100 * 3))

# plus NAME [FLAGS]: R-Adapt+ on $CLIP as in section 5.1: 2,000 pictures, 10 epochs, alpha 0.8, beta 0.2.
plus() {
    local name=$1 batch=()
    shift
    default TRAIN "" pocket:train
    [ -n "$TRAIN" ] || TRAIN=$(bash "$tables/data.sh" imagenet-train)
    if $pocket; then batch=(--batch 20 "${attacking[@]}"); fi
    anchor "$name" train --model "$CLIP" "${on[@]}" --data "$TRAIN" --n "$N_TRAIN" --epochs "$EPOCHS" \
        --resume "${held[@]}" "${batch[@]}" "$@"
}

# The robust models that the paper compares with, and takes anchors from. No robust copy of the pocket CLIP
# is built in; it stands in for one itself.
robust_models() {
    default CLIP "${MODEL:-openai/clip-vit-large-patch14}" pocket
    default FARE chs20/fare4-clip pocket-clip
    default TECOA chs20/tecoa4-clip ""
    # TGA-ZSR's authors publish no Hub id: a folder or a checkpoint. Left out where not given.
    default TGA "" ""
}

# Anchors for $CLIP from the robust models there are, of the paper's settings.
guided() {
    local robust
    for robust in FARE TECOA TGA; do
        [ -z "${!robust}" ] || anchor "${robust,,}" guide --model "$CLIP" --from "${!robust}" --preset "${robust,,}"
    done
}

# The files of these anchors, of those there are, as `--also` takes them.
files() {
    local name all=
    for name in "$@"; do
        [ ! -e "$OUT/anchors/$name.safetensors" ] || all=$all,$OUT/anchors/$name.safetensors
    done
    echo "${all#,}"
}

# classification ANCHORS: a run of every set in $DATA with CLIP and these anchors, and one of each robust model.
# Its transfer pictures are CLIP's as well: the attacker knows of neither defence.
classification() {
    local set path named robust
    local attack=(--n "$N" "${on[@]}" --attack "$ATTACK" --eps "$EPS" --threat both "${attacking[@]}")
    for set in $DATA; do
        path=$(dataset "$set")
        named=()
        [ "$set" = pocket ] || named=(--dataset "$set")
        evaluate "$OUT/$set/clip" eval classify --model "$CLIP" --data "$path" "${named[@]}" "${attack[@]}" \
            --anchor none --also "$1"
        for robust in FARE TECOA TGA; do
            [ -z "${!robust}" ] || evaluate "$OUT/$set/${robust,,}" eval classify --model "${!robust}" \
                --anchor none --surrogate "$CLIP" --data "$path" "${named[@]}" "${attack[@]}"
        done
    done
}

# The paper's sets.
SIXTEEN="imagenet1k cifar10 cifar100 stl10 caltech101 caltech256 pets flowers food101 cars sun397 country211
fgvc_aircraft eurosat dtd pcam"

# A data set's path: a registered one is fetched by radapt itself, Caltech-256 has no Hub id.
dataset() {
    case $1 in
    caltech256) bash "$tables/data.sh" caltech256 ;;
    *) echo "$1" ;;
    esac
}

# The mean over the sets, of each model, defence, attack, radius and threat model: the column Avg of the paper.
# Rows of the worst of several attacks have commas in their names and are left out.
averages() {
    LC_ALL=C awk -F, -v sets="$(wc -w <<<"$DATA")" -v runs="$(basename -a "${runs[@]}" | tr '\n' ' ')" '
        BEGIN { split(runs, run, " ") }
        NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; next }
        /"/ { next }
        {
            key = run[$at["run"]] "\t" $at["defense"] "\t" $at["attack"] "\t" $at["eps"] "\t" $at["threat"]
            if (!(key in count)) order[++keys] = key
            sum[key] += $at["value"]; count[key]++
        }
        END {
            print "\n## Averages over the sets\n"
            print "| model | defence | attack | eps | threat | sets | mean, % |\n|---|---|---|---|---|---|---|"
            for (i = 1; i <= keys; i++) {
                split(order[i], part, "\t")
                printf "| %s | %s | %s | %s | %s | %d of %d | %.1f |\n", part[1], part[2],
                    part[3] == "" ? "clean" : part[3], part[4], part[5], count[order[i]], sets,
                    sum[order[i]] / count[order[i]]
            }
        }' "$OUT/$recipe.csv"
}

# The report, with what is on stdin (the paper's figures) below it.
finish() {
    local format
    for format in csv html md; do
        "$RADAPT" --quiet eval report "${runs[@]}" --out "$OUT/report.$format" >/dev/null
    done
    cp "$OUT/report.csv" "$OUT/$recipe.csv"
    {
        cat "$OUT/report.md"
        if [ "${AVERAGES:-}" ]; then averages; fi
        echo
        echo "## The paper's figures (arXiv 2603.12799)"
        echo
        echo "The paper does not name its threat model. Its robust figures are to be set beside \`transfer\` (some are"
        echo "above the clean ones, and APGD-CE is weaker than PGD); for \`adaptive\` it has none."
        echo
        cat
        if $pocket; then
            echo
            echo "This run is of the built-in models with a few pictures and steps: it shows that the recipe works and"
            echo "says nothing about the paper."
        fi
    } >"$OUT/$recipe.md"
    echo "$recipe: $OUT/$recipe.md, $OUT/report.html, $OUT/$recipe.csv; runs: ${runs[*]}"
}
