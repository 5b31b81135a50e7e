#!/usr/bin/env bash
# Asks a server of OpenAI's API about a picture, with nothing but curl:
#
#   examples/ask.sh http://127.0.0.1:8080 photo.png "What is in the picture?"
#
# RADAPT_KEY   the API key, where the server asks for one
set -euo pipefail
[ $# = 3 ] || { echo "usage: $0 URL PICTURE QUESTION" >&2; exit 2; }

case ${2##*.} in
    png | gif | webp | bmp) kind=${2##*.} ;;
    jpg | jpeg) kind=jpeg ;;
    *) echo "$2: expected a picture such as .png or .jpg" >&2; exit 2 ;;
esac
ask() {
    curl --silent --show-error --fail-with-body "$@" --header "authorization: Bearer ${RADAPT_KEY:-none}"
}
# The first model that it offers.
model=$(ask "$1/v1/models" | grep -oE '"id": ?"[^"]*"' | head -n 1 | cut -d'"' -f4)
# A question may hold what JSON gives a meaning.
question=$(printf '%s' "$3" | sed 's/[\\"]/\\&/g' | tr '\n\t' '  ')
{
    printf '{"model":"%s","messages":' "$model"
    printf '[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:image/%s;base64,' "$kind"
    base64 -w0 "$2"
    printf '"}},{"type":"text","text":"%s"}]}]}' "$question"
} | ask "$1/v1/chat/completions" --header 'content-type: application/json' --data-binary @-
echo
