"""Zero-shot classification with a CLIP of transformers, undefended and defended.

    radapt anchor extract --model openai/clip-vit-large-patch14-336 --out white.safetensors
    radapt anchor export white.safetensors --to transformers --out defense
    python examples/transformers_clip.py --model openai/clip-vit-large-patch14-336 --defense defense \\
        --labels "a cat,a dog" picture.jpg

Needs torch, transformers, safetensors and Pillow. Checked against radapt by check_export.py.
"""

import argparse
import sys

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hub id or a folder")
    parser.add_argument("--defense", required=True, help="the folder that `radapt anchor export` wrote")
    parser.add_argument("--labels", required=True, help="what to choose from, separated by commas")
    parser.add_argument("image")
    options = parser.parse_args()
    sys.path.insert(0, options.defense)
    import radapt_transformers

    labels = options.labels.split(",")
    model = AutoModel.from_pretrained(options.model).eval()
    processor = AutoProcessor.from_pretrained(options.model)
    picture = Image.open(options.image).convert("RGB")
    texts = [f"a photo of {label}." for label in labels]
    inputs = processor(text=texts, images=picture, return_tensors="pt", padding=True)

    @torch.no_grad()
    def scores():
        return model(**inputs).logits_per_image.softmax(-1)[0].tolist()

    undefended = scores()
    with radapt_transformers.attach(model) as defense:
        defended = scores()
    print(defense)
    for label, before, after in zip(labels, undefended, defended):
        print(f"{label:24} undefended {before:6.1%}   defended {after:6.1%}")


if __name__ == "__main__":
    main()
