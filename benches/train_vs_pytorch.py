"""`radapt bench anchor` and the same loop in PyTorch in turn: R-Adapt+'s epoch and its peak memory.

    pip install torch==2.15.0 transformers==5.23.0
    python benches/train_vs_pytorch.py --radapt target/release/radapt [--pairs 3] [--n 200] [--batch 50]

Every figure comes from a process of its own, ours and PyTorch's alternate strictly, and ratios are taken within a
pair. A step: GIF, forward, the cross-entropy of a head with 26 classes, the gradient at the anchor, Adam; weights
frozen and random, f32, nothing is attacked. PyTorch takes a batch as a whole, or --peer-batch pictures at a time with
their gradients added up, whichever suits its memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SHAPES = {
    "vit-b-16-224": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=16, projection_dim=512),
    "vit-l-14-336": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14, projection_dim=768),
}


def peer(shape, n, batch, at_once):
    """PyTorch's figures, in this process."""
    import resource

    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_act="quick_gelu", **SHAPES[shape])
    model = CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
    side = config.image_size
    pictures = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)
    labels = torch.randint(0, 26, (n,))
    head = torch.nn.functional.normalize(torch.randn(26, config.projection_dim), dim=-1)
    frequency = torch.fft.fftfreq(side) * side
    taps = torch.fft.ifft(torch.exp(-(frequency**2) / (2 * 40**2))).real
    gif = torch.stack([taps.roll(i) for i in range(side)])
    tokens = (side // config.patch_size) ** 2 + 1
    anchor = torch.randn(tokens, config.hidden_size).mul_(0.1).requires_grad_()

    def hook(module, args, output):
        return (0.8 * anchor + 0.2 * output[0], *output[1:])

    (attention,) = [m for name, m in model.named_modules() if name.endswith("layers.0.self_attn")]
    attention.register_forward_hook(hook)
    optimizer = torch.optim.Adam([anchor], lr=0.01)
    times = []
    for rows in torch.randperm(n).split(batch):
        if len(rows) < batch:
            break
        start = time.perf_counter()
        optimizer.zero_grad()
        for part in rows.split(at_once):
            x = gif @ (pictures[part].float() / 255) @ gif
            unit = torch.nn.functional.normalize(model(pixel_values=(x - 0.5) / 0.25).image_embeds, dim=-1)
            loss = torch.nn.functional.cross_entropy(100 * unit @ head.T, labels[part], reduction="sum") / batch
            loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    found = {"ms": statistics.median(times[1:]) * 1e3, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.024e-3}
    print(json.dumps(found))


def output(command):
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--radapt", default="target/release/radapt")
    parser.add_argument("--shapes", default="vit-b-16-224")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--peer-batch", type=int)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    at_once = options.peer_batch or options.batch
    if options.peer:
        return peer(options.peer, options.n, options.batch, at_once)
    numbers = ["--n", str(options.n), "--batch", str(options.batch)]
    print("| shape | batch | ours ms a step | PyTorch ms | times faster | our peak MB | PyTorch's | ratio |\n|---|---|---|---|---|---|---|---|")
    for shape in options.shapes.split(","):
        pairs = []
        for pair in range(options.pairs):
            ours = output([options.radapt, "bench", "anchor", "--json", "--quiet", "--shape", shape, *numbers])["rows"][0]
            theirs = output([sys.executable, __file__, "--peer", shape, "--peer-batch", str(at_once), *numbers])
            pairs.append((ours["median_ms"], theirs["ms"], ours["peak_rss_mb"], theirs["peak"]))
            print(shape, pair, [round(value) for value in pairs[-1]], f"load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
        ours, theirs, memory, peers = ([pair[i] for pair in pairs] for i in range(4))

        def ratio(a, b):
            return statistics.median(x / y for x, y in zip(a, b))

        median = statistics.median
        print(
            f"| {shape} | {options.batch} | {median(ours):.0f} | {median(theirs):.0f} | {ratio(theirs, ours):.2f} "
            f"| {median(memory):.0f} | {median(peers):.0f} | {ratio(memory, peers):.2f} |"
        )


if __name__ == "__main__":
    main()
