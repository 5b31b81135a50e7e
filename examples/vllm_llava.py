"""Asks a LLaVA in vLLM about a picture, defended by the plugin that `radapt anchor export` writes.

    radapt anchor extract --model llava-hf/llava-1.5-7b-hf --out white.safetensors
    radapt anchor export white.safetensors --to vllm --out plugin
    pip install ./plugin
    python examples/vllm_llava.py --model llava-hf/llava-1.5-7b-hf picture.jpg "What is in the image?"
    VLLM_PLUGINS="" python examples/vllm_llava.py ...      # the same undefended

NOT RUN: this script needs a vLLM engine, and none was at hand. The plugin was checked in vLLM 0.33.0
on a CPU up to the vision tower's features (check_export_vllm.py).
"""

import argparse

from PIL import Image
from vllm import LLM, SamplingParams


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hub id or a folder")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("image")
    parser.add_argument("question")
    options = parser.parse_args()
    # bfloat16 would round the weights that the fingerprint is taken of.
    model = LLM(model=options.model, dtype="float16", max_model_len=4096)
    request = {
        "prompt": f"USER: <image>\n{options.question} ASSISTANT:",
        "multi_modal_data": {"image": Image.open(options.image).convert("RGB")},
    }
    answers = model.generate(request, SamplingParams(temperature=0.0, max_tokens=options.max_tokens))
    print(answers[0].outputs[0].text.strip())


if __name__ == "__main__":
    main()
