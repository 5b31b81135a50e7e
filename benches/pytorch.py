"""The peer of benches/tower.rs: CLIP ViT-L/14-336 of transformers with random weights on the CPU.

    python benches/pytorch.py    (torch==2.15.0 transformers==5.23.0)

Prints the median of five forward passes and of five steps (forward and the gradient at the pixels), f32,
batch 1. Run it between two runs of `cargo bench --bench tower` and compare: machines drift.
"""

import json
import os
import statistics
import time

import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

CONFIG = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    hidden_act="quick_gelu",
    projection_dim=768,
)


def median_ms(run, repeats=5):
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times) * 1e3, 1)


def main():
    torch.set_num_threads(os.cpu_count())
    model = CLIPVisionModelWithProjection(CONFIG).eval().requires_grad_(False)
    pixels = torch.rand(1, 3, 336, 336)

    def forward():
        with torch.no_grad():
            model(pixel_values=pixels)

    def step():
        x = pixels.clone().requires_grad_()
        model(pixel_values=x).image_embeds.pow(2).sum().backward()

    for name, run in (("forward", forward), ("step", step)):
        print(json.dumps({"name": f"pytorch {name}", "shape": "ViT-L/14-336", "median_ms": median_ms(run)}))


if __name__ == "__main__":
    main()
