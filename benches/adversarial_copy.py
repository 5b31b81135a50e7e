"""An adversarially fine-tuned copy of a small CLIP, to guide anchors and to compare with.

TeCoA (Mao et al. 2023): the vision tower alone is trained, by the cross-entropy of the zero-shot
head on pictures that PGD crafts against the tower as it stands. The copy is a model folder in the
layout of the original, and `visual.pt` in it is its tower as FARE and TeCoA publish theirs (names
of OpenCLIP).

    python benches/adversarial_copy.py MODEL DATA OUT [--eps 4] [--pictures 8000] [--epochs 2]

DATA is a tar or folder of CLASS/*.jpg or *.png. Needs torch, transformers and Pillow.
"""

import argparse
import io
import random
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel


def members(data):
    if data.is_dir():
        for path in sorted(data.rglob("*")):
            if path.suffix in (".jpg", ".png"):
                yield f"{path.parent.name}/{path.name}", path.read_bytes
        return
    archive = tarfile.open(data)
    for member in archive.getmembers():
        if Path(member.name).suffix in (".jpg", ".png"):
            parts = member.name.split("/")
            yield "/".join(parts[-2:]), lambda member=member: archive.extractfile(member).read()


def open_clip_names(model):
    """The vision tower's state in OpenCLIP's names."""
    state = {name: value.detach().clone() for name, value in model.vision_model.state_dict().items()}
    out = {
        "class_embedding": state["embeddings.class_embedding"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "conv1.weight": state["embeddings.patch_embedding.weight"],
        "proj": model.visual_projection.weight.detach().T.contiguous(),
    }
    for ours, theirs in (("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")):
        for part in ("weight", "bias"):
            out[f"{theirs}.{part}"] = state[f"{ours}.{part}"]
    for i in range(model.config.vision_config.num_hidden_layers):
        ours, theirs = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for part in ("weight", "bias"):
            heads = [state[f"{ours}self_attn.{x}_proj.{part}"] for x in "qkv"]
            out[f"{theirs}attn.in_proj_{part}"] = torch.cat(heads)
            out[f"{theirs}attn.out_proj.{part}"] = state[f"{ours}self_attn.out_proj.{part}"]
            for a, b in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2")):
                out[f"{theirs}{b}.{part}"] = state[f"{ours}{a}.{part}"]
            for a, b in (("fc1", "c_fc"), ("fc2", "c_proj")):
                out[f"{theirs}mlp.{b}.{part}"] = state[f"{ours}mlp.{a}.{part}"]
    return out


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--eps", type=float, default=4, help="of 255")
    parser.add_argument("--pictures", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="of PGD")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--template", default="a photo of a {}.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    model = CLIPModel.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    processor = AutoImageProcessor.from_pretrained(args.model)
    mean = torch.tensor(processor.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(processor.image_std).view(1, 3, 1, 1)
    side = model.config.vision_config.image_size

    every = list(members(args.data))
    random.Random(args.seed).shuffle(every)
    every = every[: args.pictures]
    classes = sorted({name.split("/")[0] for name, _ in every})
    labels = torch.tensor([classes.index(name.split("/")[0]) for name, _ in every])
    pictures = []
    for _, read in every:
        picture = Image.open(io.BytesIO(read())).convert("RGB").resize((side, side), Image.BICUBIC)
        pictures.append(np.asarray(picture))
    pictures = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    print(f"{len(every)} pictures of {len(classes)} classes at {side} pixels", flush=True)

    with torch.no_grad():
        prompts = [args.template.format(name.replace("_", " ")) for name in classes]
        tokens = tokenizer(prompts, padding=True, return_tensors="pt")
        states = model.text_model(**tokens).pooler_output
        head = torch.nn.functional.normalize(model.text_projection(states), dim=-1)
    scale = model.logit_scale.exp().item()

    def logits(x):
        pooled = model.vision_model(pixel_values=(x - mean) / std).pooler_output
        return scale * torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1) @ head.T

    loss_of = torch.nn.functional.cross_entropy
    eps = args.eps / 255

    def attack(x, y):
        at = (x + (torch.rand_like(x) * 2 - 1) * eps).clamp(0, 1)
        for _ in range(args.steps):
            at.requires_grad_(True)
            gradient = torch.autograd.grad(loss_of(logits(at), y, reduction="sum"), at)[0]
            at = at.detach() + 2 * eps / args.steps * gradient.sign()
            at = torch.minimum(torch.maximum(at, x - eps), x + eps).clamp(0, 1)
        return at.detach()

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=args.rate, weight_decay=1e-4)
    total = args.epochs * ((len(every) + args.batch - 1) // args.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    begun, done, sums = time.time(), 0, [0.0, 0, 0]
    for epoch in range(args.epochs):
        for rows in torch.randperm(len(every)).split(args.batch):
            x, y = pictures[rows].float() / 255, labels[rows]
            adversarial = attack(x, y)
            for parameter in trained:
                parameter.requires_grad_(True)
            out = logits(adversarial)
            loss = loss_of(out, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            for parameter in trained:
                parameter.requires_grad_(False)
            sums = [sums[0] + loss.item() * len(rows), sums[1] + (out.argmax(1) == y).sum().item(), sums[2] + len(rows)]
            done += 1
            if done % 20 == 0 or done == total:
                print(
                    f"epoch {epoch + 1}, step {done} of {total}: loss {sums[0] / sums[2]:.3f}, "
                    f"adversarial {100 * sums[1] / sums[2]:.1f} %, {time.time() - begun:.0f} s",
                    flush=True,
                )
                sums = [0.0, 0, 0]

    model.save_pretrained(args.out)
    for path in args.model.iterdir():
        if path.is_file() and not (args.out / path.name).exists() and path.suffix in (".json", ".txt", ".jinja"):
            shutil.copyfile(path, args.out / path.name)
            (args.out / path.name).chmod(0o644)
    torch.save(open_clip_names(model), args.out / "visual.pt")


main()
