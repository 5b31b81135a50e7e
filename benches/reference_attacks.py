"""The original AutoAttack and torchattacks on the shared CIFAR CLIP: what our attacks are compared with.

    pip install torch==2.15.0 transformers==5.23.0 pyautoattack==0.2.0 torchattacks==3.5.1 scipy
    python benches/reference_attacks.py --shared ../shared --out REFERENCE [--n 1000] [--eps 1,2,4] [--attacks ...]

pyautoattack is fra31/auto-attack as a package. Photos are attacked at their own 32x32 pixels, with the resize to
48 (bicubic, antialiased, in f32) and the normalisation inside the model, as `radapt eval classify --native-size`
does. One JSON file per attack and eps, with whether each photo stays correct; what exists is not computed
again, nor is part of a run over more photos.
`standard` is the pointwise worst case over its four attacks, which is its definition.
"""

import argparse
import json
import pathlib
import time

import numpy as np
import torch
from transformers import AutoTokenizer, CLIPModel

STANDARD = ["apgd-ce", "apgd-t", "fab-t", "square"]


class ZeroShot(torch.nn.Module):
    """Pixels (B, 3, 32, 32) in [0, 1] to CLIP's zero-shot logits."""

    def __init__(self, folder, classes):
        super().__init__()
        self.clip = CLIPModel.from_pretrained(folder).eval().requires_grad_(False)
        config = json.loads((folder / "preprocessor_config.json").read_text())
        self.size = config["crop_size"]["height"]
        self.mean = torch.tensor(config["image_mean"]).view(1, 3, 1, 1)
        self.std = torch.tensor(config["image_std"]).view(1, 3, 1, 1)
        tokens = AutoTokenizer.from_pretrained(folder)([f"a photo of a {c}." for c in classes], padding=True, return_tensors="pt")
        text = self.clip.text_projection(self.clip.text_model(**tokens).pooler_output)
        self.head = text / text.norm(dim=-1, keepdim=True) * self.clip.logit_scale.exp()

    def forward(self, x):
        x = torch.nn.functional.interpolate(x, size=(self.size,) * 2, mode="bicubic", antialias=True, align_corners=False)
        x = self.clip.visual_projection(self.clip.vision_model(pixel_values=(x - self.mean) / self.std).pooler_output)
        return x / x.norm(dim=-1, keepdim=True) @ self.head.T


def photos(shared, n):
    raw = np.fromfile(shared / "data/cifar10/test_batch.bin", dtype=np.uint8).reshape(-1, 3073)[:n]
    return torch.tensor(raw[:, 1:].reshape(-1, 3, 32, 32)).float() / 255, torch.tensor(raw[:, 0]).long()


def correct(model, x, y):
    with torch.no_grad():
        return torch.cat([model(a).argmax(1) == b for a, b in zip(x.split(100), y.split(100))])


def attack(name, model, eps, x, y, seed):
    """The adversarial pictures of `name`."""
    if name.startswith("torchattacks-"):
        import torchattacks

        pgd = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=10, random_start=True)
        torch.manual_seed(seed)
        return torch.cat([pgd(a, b) for a, b in zip(x.split(100), y.split(100))])
    from pyautoattack import AutoAttack

    suite = AutoAttack(model, norm="Linf", eps=eps, version="standard", seed=seed, device="cpu")
    suite.attacks_to_run = [name]
    return suite.run_standard_evaluation(x, y, batch_size=100)[0]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shared", type=pathlib.Path, default=pathlib.Path("../shared"))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--eps", default="1,2,4", help="in 1/255")
    parser.add_argument("--attacks", default=",".join(["torchattacks-pgd", *STANDARD]))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    classes = (args.shared / "data/cifar10/batches.meta.txt").read_text().split()
    model = ZeroShot(args.shared / "models/cifar-clip", classes)
    x, y = photos(args.shared, args.n)
    clean = correct(model, x, y)
    print(json.dumps({"attack": None, "n": args.n, "correct": int(clean.sum())}), flush=True)
    for eps in (int(e) for e in args.eps.split(",")):
        robust = clean.clone()
        for name in args.attacks.split(","):
            path = args.out / f"{name}-{eps}-{args.n}.json"
            # A run over more photos holds this one.
            more = [p for p in args.out.glob(f"{name}-{eps}-*.json") if int(p.stem.rsplit("-", 1)[1]) >= args.n]
            if more:
                path = more[0]
            else:
                start = time.time()
                adversarial = x.clone()
                adversarial[clean] = attack(name, model, eps / 255, x[clean], y[clean], 0)
                assert (adversarial - x).abs().max() <= eps / 255 + 1e-6 and adversarial.min() >= 0 and adversarial.max() <= 1
                kept = clean & correct(model, adversarial, y)
                path.write_text(json.dumps({"seconds": time.time() - start, "robust": kept.int().tolist()}))
            kept = torch.tensor(json.loads(path.read_text())["robust"][: args.n]).bool()
            if name in STANDARD:
                robust &= kept
            print(json.dumps({"attack": name, "eps": f"{eps}/255", "n": args.n, "correct": int(kept.sum())}), flush=True)
        if set(STANDARD) <= set(args.attacks.split(",")):
            print(json.dumps({"attack": "standard", "eps": f"{eps}/255", "n": args.n, "correct": int(robust.sum())}), flush=True)


if __name__ == "__main__":
    main()
