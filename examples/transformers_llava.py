"""Asks a LLaVA of transformers about a picture, undefended and defended.

    radapt anchor extract --model llava-hf/llava-1.5-7b-hf --out white.safetensors
    radapt anchor export white.safetensors --to transformers --out defense
    python examples/transformers_llava.py --model llava-hf/llava-1.5-7b-hf --defense defense \\
        picture.jpg "What is in the image?"

Needs torch, transformers, safetensors and Pillow. Checked against radapt by check_export.py.
transformers crops pictures to a square where radapt pads them unless told `--contract llava-crop`.
"""

import argparse
import sys

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hub id or a folder")
    parser.add_argument("--defense", required=True, help="the folder that `radapt anchor export` wrote")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("image")
    parser.add_argument("question")
    options = parser.parse_args()
    sys.path.insert(0, options.defense)
    import radapt_transformers

    # As stored: bfloat16 would round the weights that the fingerprint is taken of.
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto").eval().to(options.device)
    processor = AutoProcessor.from_pretrained(options.model)
    content = [{"type": "image"}, {"type": "text", "text": options.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    picture = Image.open(options.image).convert("RGB")
    inputs = processor(text=prompt, images=picture, return_tensors="pt").to(options.device, model.dtype)

    @torch.no_grad()
    def answer():
        tokens = model.generate(**inputs, max_new_tokens=options.max_tokens, do_sample=False)
        return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    print("undefended:", answer())
    with radapt_transformers.attach(model):
        print("defended:  ", answer())


if __name__ == "__main__":
    main()
