"""Zero-shot classification with open_clip, undefended and defended.

    radapt anchor extract --model openai/clip-vit-large-patch14-336 --out white.safetensors
    radapt anchor export white.safetensors --to open_clip --out defense
    python examples/open_clip_classify.py --model ViT-L-14-336-quickgelu --pretrained openai --defense defense \\
        --labels "a cat,a dog" picture.jpg

Needs torch, open_clip_torch and safetensors. Checked against radapt by check_export.py. OpenAI's
weights, and those tuned from them, want a model called `...-quickgelu`.
"""

import argparse
import sys

import open_clip
import torch
from PIL import Image


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="open_clip's name, or hf-hub:ORGANISATION/NAME")
    parser.add_argument("--pretrained", help="open_clip's tag, or a checkpoint")
    parser.add_argument("--defense", required=True, help="the folder that `radapt anchor export` wrote")
    parser.add_argument("--labels", required=True, help="what to choose from, separated by commas")
    parser.add_argument("image")
    options = parser.parse_args()
    sys.path.insert(0, options.defense)
    import radapt_open_clip

    labels = options.labels.split(",")
    model, _, prepare = open_clip.create_model_and_transforms(options.model, pretrained=options.pretrained)
    model.eval()
    tokenize = open_clip.get_tokenizer(options.model)
    picture = prepare(Image.open(options.image).convert("RGB")).unsqueeze(0)

    @torch.no_grad()
    def scores():
        image = model.encode_image(picture, normalize=True)
        text = model.encode_text(tokenize([f"a photo of {label}." for label in labels]), normalize=True)
        return (model.logit_scale.exp() * image @ text.T).softmax(-1)[0].tolist()

    undefended = scores()
    with radapt_open_clip.attach(model) as defense:
        defended = scores()
    print(defense)
    for label, before, after in zip(labels, undefended, defended):
        print(f"{label:24} undefended {before:6.1%}   defended {after:6.1%}")


if __name__ == "__main__":
    main()
