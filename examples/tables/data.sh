#!/usr/bin/env bash
# Fetches what the tables need and radapt does not fetch by itself, checks it, and prints where it is.
#
#   bash examples/tables/data.sh imagenet-train [TARS]   1,251 training pictures a tar, 150 MB each; needs HF_TOKEN of
#                                                        somebody who accepted ImageNet's terms at timm/imagenet-1k-wds
#   bash examples/tables/data.sh caltech256              1.2 GB
#   bash examples/tables/data.sh flickr30k               4 GB, with Karpathy's splits
#   bash examples/tables/data.sh coco300                 0.8 GB: COCO val2017, V-Attack's three files
#
# Everything goes to $DATA_DIR (data). What is there is not fetched again; a download that was cut off goes on.
# Needs curl, tar, unzip and md5sum or sha256sum. The other sets come by Hub id through `radapt --data NAME`.
set -euo pipefail

DATA_DIR=${DATA_DIR:-data}
HF_ENDPOINT=${HF_ENDPOINT:-https://huggingface.co}
CALTECH_URL=${CALTECH_URL:-https://data.caltech.edu/records/nyy15-4j048/files}
COCO_URL=${COCO_URL:-http://images.cocodataset.org}
KARPATHY_URL=${KARPATHY_URL:-https://cs.stanford.edu/people/karpathy/deepimagesent}
VATTACK_URL=${VATTACK_URL:-https://raw.githubusercontent.com/Summu77/V-Attack/main}

fail() {
    echo "data.sh: $*" >&2
    exit 1
}

# checked FILE SUM: SUM is an MD5 or a SHA-256, by its length.
checked() {
    local tool=sha256sum
    [ ${#2} -ne 32 ] || tool=md5sum
    [ "$($tool "$1" | cut -d' ' -f1)" = "$2" ]
}

# fetch URL FILE [SUM]: a file is under its own name only when it is whole.
fetch() {
    local url=$1 file=$2 sum=${3:-} header=()
    [ ! -e "$file" ] || return 0
    mkdir -p "$(dirname "$file")"
    case $url in "$HF_ENDPOINT"/*) [ -z "${HF_TOKEN:-}" ] || header=(--header "Authorization: Bearer $HF_TOKEN") ;; esac
    echo "fetching $url" >&2
    curl --fail --location --silent --show-error --retry 5 --continue-at - "${header[@]}" \
        --output "$file.part" "$url" || fail "cannot fetch $url"
    if [ -n "$sum" ] && ! checked "$file.part" "$sum"; then
        rm "$file.part"
        fail "$url: expected the checksum $sum, found another; it was removed"
    fi
    mv "$file.part" "$file"
}

# unpacked ARCHIVE FOLDER COUNT PATTERN: into FOLDER, which must then hold at least COUNT files of that name.
unpacked() {
    local archive=$1 folder=$2 count=$3 pattern=$4 found
    if [ ! -e "$folder/.whole" ]; then
        rm -rf "$folder"
        mkdir -p "$folder"
        case $archive in
        *.zip) unzip -q "$archive" -d "$folder" || fail "$archive cannot be unpacked" ;;
        *) tar -xf "$archive" -C "$folder" || fail "$archive cannot be unpacked" ;;
        esac
        # macOS leaves a second file beside each in some archives.
        rm -rf "$folder/__MACOSX"
        found=$(find "$folder" -name "$pattern" ! -name '._*' | wc -l)
        [ "$found" -ge "$count" ] || fail "$archive: expected $count files $pattern or more, found $found"
        touch "$folder/.whole"
    fi
}

case ${1:-} in
imagenet-train)
    folder=$DATA_DIR/imagenet-train
    # Without the classes' names labels mean nothing; these are CLIP's, in the order of the labels.
    fetch "$HF_ENDPOINT/datasets/clip-benchmark/wds_imagenet1k/resolve/main/classnames.txt" "$folder/classnames.txt"
    names=$(grep -c . "$folder/classnames.txt")
    [ "$names" -eq 1000 ] || fail "$folder/classnames.txt: expected 1000 names, found $names"
    for ((i = 0; i < ${2:-2}; i++)); do
        tar=$(printf 'imagenet1k-train-%04d.tar' "$i")
        fetch "$HF_ENDPOINT/datasets/timm/imagenet-1k-wds/resolve/main/$tar" "$folder/$tar"
        tar -tf "$folder/$tar" >/dev/null || fail "$folder/$tar is no whole tar"
    done
    echo "$folder"
    ;;
caltech256)
    tar=$DATA_DIR/256_ObjectCategories.tar
    fetch "$CALTECH_URL/256_ObjectCategories.tar" "$tar" "${CALTECH_SUM:-67b4f42ca05d46448c6bb8ecd2220f6d}"
    unpacked "$tar" "$DATA_DIR/caltech256" "${CALTECH_COUNT:-30607}" '*.jpg'
    echo "$DATA_DIR/caltech256/256_ObjectCategories"
    ;;
flickr30k)
    zip=$DATA_DIR/flickr30k-images.zip
    fetch "$KARPATHY_URL/caption_datasets.zip" "$DATA_DIR/caption_datasets.zip"
    unpacked "$DATA_DIR/caption_datasets.zip" "$DATA_DIR/karpathy" 1 dataset_flickr30k.json
    fetch "$HF_ENDPOINT/datasets/nlphuji/flickr30k/resolve/main/flickr30k-images.zip" "$zip"
    unpacked "$zip" "$DATA_DIR/flickr30k" "${FLICKR_COUNT:-31014}" '*.jpg'
    echo "$DATA_DIR/flickr30k/flickr30k-images"
    ;;
coco300)
    folder=$DATA_DIR/coco300
    fetch "$VATTACK_URL/Data/coco300_object_descriptions_main.json" "$folder/coco300_object_descriptions_main.json" \
        847701bf2979376b6101be7262f406d33764dad4b37d83cf95f4b7df61f9d028
    fetch "$VATTACK_URL/Data/coco300_target_obj_sim.json" "$folder/coco300_target_obj_sim.json" \
        1bb049d969098c8dd209aae293813fe57ad6dcb1ae1c422e27c3c82113ae6cde
    fetch "$VATTACK_URL/Data/coco300_vqa_main.json" "$folder/coco300_vqa_main.json" \
        12364e5e13689e88bf727b850c251bd6d7f1b5368995d476d42401b83993bfe5
    zip=$DATA_DIR/val2017.zip
    fetch "$COCO_URL/zips/val2017.zip" "$zip" "${COCO_SUM:-442b8da7639aecaf257c1dceb8ba8c80}"
    unpacked "$zip" "$DATA_DIR/coco" "${COCO_COUNT:-5000}" '*.jpg'
    echo "$folder"
    ;;
*)
    echo "data.sh: expected imagenet-train, caltech256, flickr30k or coco300, found ${1:-nothing}" >&2
    exit 2
    ;;
esac
