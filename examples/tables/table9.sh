#!/usr/bin/env bash
# Table 9: alpha, beta and the cutoff of every way to an anchor.
#
#   bash examples/tables/table9.sh             the paper's models
#   bash examples/tables/table9.sh --pocket    the same way on built-in models, within a minute
#
# Makes    an anchor file of every preset there is a model for (TGA=FOLDER for the one without a Hub id), reads
#          what each recommends, and fails where that is not the paper's. No robust figure, so no threat
#          model. R-Adapt+'s are the defaults of `anchor train`, read from `radapt anchor presets`.
# Needs    CLIP ViT-L/14, chs20/fare4-clip, chs20/tecoa4-clip (1.7 GB each).
# Cost     seconds: one forward pass each.
# FARE, TECOA, TGA   the robust models
# shellcheck source=recipe.sh disable=SC2034,SC2153
. "$(dirname "$0")/recipe.sh"

robust_models
if $cost; then
    echo "no attack steps: a forward pass for each anchor"
    exit 0
fi
anchor clip extract --model "$CLIP" --preset clip
guided

# What a file recommends: the cutoff is 40 (30) bins of 224 pixels, and their share of a smaller picture.
mkdir -p "$OUT"
{
    echo "| | alpha | beta | cutoff | of pixels | the paper's |"
    echo "|---|---|---|---|---|---|"
    for name in clip tecoa tga fare; do
        file=$OUT/anchors/$name.safetensors
        [ -e "$file" ] || continue
        "$RADAPT" --quiet anchor show "$file" | LC_ALL=C awk -v name="$name" '
            { value[$1] = $2 }
            END {
                beta = name == "clip" ? -0.8 : 0; bins = name == "tga" ? 30 : 40
                size = value["radapt.image_size"]
                # Above 224 pixels the tool keeps the 40 bins.
                cutoff = size < 224 ? bins * size / 224 : bins
                printf "| `%s` | %s | %s | %s | %s | 1.2, %s, %s of 224 |\n", name, value["radapt.alpha"],
                    value["radapt.beta"], value["radapt.cutoff"], size, beta, bins
                off = value["radapt.cutoff"] - cutoff
                if (value["radapt.alpha"] != 1.2 || value["radapt.beta"] != beta || off * off > 1e-12) exit 1
            }' || {
            echo "table9: $file does not recommend the paper's settings" >&2
            exit 1
        }
    done
    "$RADAPT" --quiet anchor presets | LC_ALL=C awk '$1 == "plus" {
        printf "| `plus` | %s | %s | %s | 224 | 0.8, 0.2, 40 of 224 |\n", $3, $4, $5
        found = $3 == 0.8 && $4 == 0.2 && $5 == 40
    } END { exit !found }'
} >"$OUT/table9.md"
cat "$OUT/table9.md"
echo "table9: $OUT/table9.md; anchors: $OUT/anchors"
