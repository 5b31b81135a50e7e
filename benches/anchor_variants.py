"""Variants of the anchor on the small CIFAR CLIP, in PyTorch: what would be worth building.

    python benches/anchor_variants.py ../shared/models/cifar-clip ../shared/data/cifar10

Static examples (PGD-10 on the undefended model at 4/255, 1200 pictures, 6 epochs, Adam 0.03 along a cosine, 0.3 of the
loss on clean pictures, GIF at 6 bins of 48). `transfer` is PGD-20 crafted on the undefended model, 400 test photos,
`adaptive` PGD-20 through the defence on the first 150 of them. Variants: a factor beta per channel learnt with the
anchor, an anchor after the second block as well or instead, the mean of the logits of two anchors. Half an hour on one
core. Needs torch, transformers and Pillow.
"""

import io
import random
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

torch.set_num_threads(1)
MODEL, DATA = map(Path, sys.argv[1:3])
EPS, CUTOFF, SIDE = 4 / 255, 6.0, 48

classes = [line for line in (DATA / "batches.meta.txt").read_text().split("\n") if line]
model = CLIPModel.from_pretrained(MODEL).eval().requires_grad_(False)
processor = AutoImageProcessor.from_pretrained(MODEL)
mean = torch.tensor(processor.image_mean).view(1, 3, 1, 1)
std = torch.tensor(processor.image_std).view(1, 3, 1, 1)
tokens = AutoTokenizer.from_pretrained(MODEL)([f"a photo of a {name}." for name in classes], padding=True, return_tensors="pt")
with torch.no_grad():
    states = model.text_model(**tokens).pooler_output
    head = torch.nn.functional.normalize(model.text_projection(states), dim=-1)
scale = model.logit_scale.exp().item()
vision, layers = model.vision_model, model.vision_model.encoder.layers
cross_entropy = torch.nn.functional.cross_entropy
generator = torch.Generator().manual_seed(0)


def resized(picture):
    return np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.BICUBIC))


def training_pictures(n):
    archive = tarfile.open(DATA / "train-20k.tar")
    names = sorted(member.name for member in archive.getmembers() if member.name.endswith(".jpg"))
    random.Random(0).shuffle(names)
    pictures = [resized(Image.open(io.BytesIO(archive.extractfile(name).read()))) for name in names[:n]]
    return pictures, [classes.index(name.split("/")[-2]) for name in names[:n]]


def test_pictures(n):
    rows = np.fromfile(DATA / "test_batch.bin", dtype=np.uint8).reshape(-1, 3073)[:n]
    pictures = [resized(Image.fromarray(row[1:].reshape(3, 32, 32).transpose(1, 2, 0))) for row in rows]
    return pictures, rows[:, 0].astype(int)


def tensors(pictures, labels):
    return torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255, torch.tensor(labels)


def gif(x, cutoff):
    frequency = np.fft.fftfreq(SIDE) * SIDE
    taps = np.fft.ifft(np.exp(-(frequency**2) / (2 * cutoff**2))).real
    matrix = torch.tensor(np.stack([np.roll(taps, i) for i in range(SIDE)]), dtype=torch.float32)
    return matrix @ x @ matrix.T


def attention(layer, h):
    return layer.self_attn(layer.layer_norm1(h))[0]


def logits(x, defence):
    """`defence`: a list of defences whose logits are averaged; each {cutoff, anchors: {block: tensor}, beta: {block: ...}}."""
    found = []
    for one in defence:
        h = gif(x, one["cutoff"]) if "cutoff" in one else x
        h = vision.pre_layrnorm(vision.embeddings((h - mean) / std))
        for i, layer in enumerate(layers):
            out = attention(layer, h)
            if i in one.get("anchors", {}):
                out = one["anchors"][i] + one["beta"][i] * out
            h = h + out
            h = h + layer.mlp(layer.layer_norm2(h))
        unit = torch.nn.functional.normalize(model.visual_projection(vision.post_layernorm(h[:, 0])), dim=-1)
        found.append(scale * unit @ head.T)
    return sum(found) / len(found)


def pgd(x, y, defence, steps):
    crafted = []
    for clean, labels in zip(x.split(100), y.split(100)):
        at = (clean + (torch.rand(clean.shape, generator=generator) * 2 - 1) * EPS).clamp(0, 1)
        best, most = at.clone(), torch.full((len(clean),), -1e9)
        for step in range(steps + 1):
            at = at.detach().requires_grad_(True)
            loss = cross_entropy(logits(at, defence), labels, reduction="none")
            up = loss.detach() > most
            best[up] = at.detach()[up]
            most = torch.maximum(most, loss.detach())
            if step == steps:
                break
            (gradient,) = torch.autograd.grad(loss.sum(), at)
            at = at.detach() + 2.5 * EPS / steps * gradient.sign()
            at = torch.minimum(torch.maximum(at, clean - EPS), clean + EPS).clamp(0, 1)
        crafted.append(best)
    return torch.cat(crafted)


def right(x, y, defence):
    with torch.no_grad():
        found = [logits(part, defence).argmax(1) for part in x.split(250)]
    return 100 * (torch.cat(found) == y).float().mean().item()


def report(name, defence):
    adaptive = right(pgd(test_x[:150], test_y[:150], defence, 20), test_y[:150], defence)
    clean, transfer = right(test_x, test_y, defence), right(transferred, test_y, defence)
    print(f"{name:24} clean {clean:.1f}, transfer {transfer:.1f}, adaptive {adaptive:.1f}", flush=True)


def white(block):
    with torch.no_grad():
        h = vision.pre_layrnorm(vision.embeddings((torch.ones(1, 3, SIDE, SIDE) - mean) / std))
        for layer in layers[:block]:
            h = h + attention(layer, h)
            h = h + layer.mlp(layer.layer_norm2(h))
        return attention(layers[block], h)[0]


def train(name, blocks=(0,), per_channel=False, epochs=6, batch=50, share=0.3):
    width = model.config.vision_config.hidden_size
    anchors = {i: white(i).clone().requires_grad_(True) for i in blocks}
    beta = {i: torch.full((width,), 0.2).requires_grad_(per_channel) for i in blocks}
    optimizer = torch.optim.Adam([*anchors.values(), *(beta.values() if per_channel else [])], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(train_x) // batch))
    for _ in range(epochs):
        for rows in torch.randperm(len(train_x), generator=generator).split(batch):
            defence = [dict(cutoff=CUTOFF, anchors={i: 0.8 * anchors[i] for i in blocks}, beta=beta)]
            loss = (1 - share) * cross_entropy(logits(examples[rows], defence), train_y[rows])
            loss = loss + share * cross_entropy(logits(train_x[rows], defence), train_y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    done = dict(cutoff=CUTOFF, anchors={i: 0.8 * anchors[i].detach() for i in blocks}, beta={i: b.detach() for i, b in beta.items()})
    report(name, [done])
    return done


train_x, train_y = tensors(*training_pictures(1200))
test_x, test_y = tensors(*test_pictures(400))
transferred = pgd(test_x, test_y, [{}], 20)
examples = pgd(train_x, train_y, [{}], 10)
report("undefended", [{}])
report("GIF", [dict(cutoff=CUTOFF)])
first = train("anchor")
train("beta per channel", per_channel=True)
train("blocks 1 and 2", blocks=(0, 1))
train("block 2 alone", blocks=(1,))
second = train("anchor, another draw")
report("mean of two anchors", [first, second])
