"""`radapt analyze`'s numbers on real towers against NumPy's, from features by transformers in f64.

    radapt analyze cka --model STANDARD --robust ROBUST --data TEST_BATCH --n N --first --batch N --out OUT
    radapt analyze spectrum --model STANDARD --robust ROBUST --out OUT
    radapt analyze insensitivity --model STANDARD --robust ROBUST --data TEST_BATCH --n N --first --out OUT
    radapt analyze attention --model STANDARD --robust ROBUST --data TEST_BATCH --n N --first --draw N --out OUT
    python benches/analyze_vs_numpy.py STANDARD ROBUST TEST_BATCH OUT

TEST_BATCH is a file of CIFAR-10 in the official binary format. With one minibatch of all pictures the
order in which they are gone through does not matter. Needs torch, transformers, NumPy and Pillow.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, CLIPModel

torch.set_num_threads(1)


@torch.no_grad()
def answers(model, pixels, mean, std):
    """Hidden states by layer, the first attention's output and the class token's weights in it."""
    layers, first, weights = [], [], []
    attention = model.vision_model.encoder.layers[0].self_attn
    for part in pixels.split(50):
        seen = []
        hook = attention.register_forward_hook(lambda module, args, out: seen.append(out))
        out = model.vision_model(pixel_values=(part - mean) / std, output_hidden_states=True, output_attentions=True)
        hook.remove()
        layers.append([h.numpy() for h in out.hidden_states])
        first.append(seen[0][0].numpy())
        weights.append(seen[0][1][:, :, 0].mean(1).numpy())
    return [np.concatenate(h) for h in zip(*layers)], np.concatenate(first), np.concatenate(weights)


def grams(layers):
    flat = [h.reshape(len(h), -1) for h in layers]
    return [x @ x.T for x in flat]


def exact(k, l):
    n = len(k)
    h = np.eye(n) - np.ones((n, n)) / n
    return np.trace(k @ h @ l @ h)


def song(k, l):
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))
    one = np.ones(n)
    third = 2 / (n - 2) * (one @ k @ l @ one)
    second = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return (np.sum(k * l.T) + second - third) / (n * (n - 3))


def cka(hsic, a, b):
    own = lambda grams: [hsic(k, k) for k in grams]
    return np.array([[hsic(k, l) / math.sqrt(x * y) for l, y in zip(b, own(b))] for k, x in zip(a, own(a))])


def main():
    parser = argparse.ArgumentParser()
    for name in ("standard", "robust", "data", "out"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    read = lambda name: json.loads((args.out / f"{name}.json").read_text())
    n = read("cka")["data"]["n"]

    raw = np.fromfile(args.data, dtype=np.uint8).reshape(-1, 3073)[:n, 1:]
    pictures = [Image.fromarray(row.reshape(3, 32, 32).transpose(1, 2, 0)) for row in raw]
    found = {}
    for name in ("standard", "robust"):
        folder = getattr(args, name)
        model = CLIPModel.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
        processor = AutoImageProcessor.from_pretrained(folder)
        side = (model.config.vision_config.image_size,) * 2
        # By Pillow: the processor's own resize differs from it where torchvision is installed.
        prepared = np.stack([np.asarray(picture.resize(side, Image.BICUBIC)) for picture in pictures])
        pixels = torch.tensor(prepared).permute(0, 3, 1, 2).double() / 255
        mean, std = (torch.tensor(v).double()[:, None, None] for v in (processor.image_mean, processor.image_std))
        layers, first, weights = answers(model, pixels, mean, std)
        white = answers(model, torch.ones_like(pixels[:1]), mean, std)[1]
        kernels = model.vision_model.embeddings.patch_embedding.weight.detach().numpy()
        magnitude = np.fft.fftshift(np.abs(np.fft.fft2(kernels)).mean((0, 1)))
        found[name] = dict(grams=grams(layers), first=first, white=white, weights=weights, magnitude=magnitude)

    def compare(what, ours, theirs):
        print(f"{what:32} largest difference {np.abs(np.array(ours) - theirs).max():.1e}")

    a, b = found["standard"], found["robust"]
    maps = read("cka")
    for estimate, hsic in (("minibatch", song), ("exact", exact)):
        for name, x, y in (("cross", a, b), ("standard", a, a), ("robust", b, b)):
            compare(f"cka {estimate} {name}", maps[estimate][name], cka(hsic, x["grams"], y["grams"]))
    spectrum = read("spectrum")
    compare("spectrum shift", spectrum["shift"], b["magnitude"] - a["magnitude"])
    unit = lambda x: x.reshape(len(x), -1) / np.linalg.norm(x.reshape(len(x), -1), axis=1, keepdims=True)
    cosines = read("insensitivity")
    for pair in cosines["between_pictures"]:
        u, v = (unit(found[pair[side]]["first"]) for side in ("first", "second"))
        every = u @ v.T
        mean = (every.sum() - np.trace(every)) / (n * (n - 1))
        compare(f"cosine {pair['first']}-{pair['second']}", pair["value"], mean)
    for pair in cosines["with_white"]:
        mean = (unit(found[pair["first"]]["first"]) @ unit(found[pair["second"]]["white"])[0]).mean()
        compare(f"white {pair['first']}-{pair['second']}", pair["value"], mean)
    for name in ("standard", "robust"):
        drawn = [[picture[name]["class"], *picture[name]["patches"]] for picture in read("attention")["drawn"]]
        compare(f"attention {name}", drawn, found[name]["weights"][: len(drawn)])


main()
