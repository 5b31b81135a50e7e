"""`radapt bench anchor` and the same loop in PyTorch in turn: R-Adapt+'s epoch and its peak memory.

    pip install torch==2.15.0 transformers==5.23.0
    python benches/train_vs_pytorch.py --radapt target/release/radapt [--pairs 3] [--n 200] [--batch 50] [--device cuda]

Every figure comes from a process of its own, ours and PyTorch's alternate strictly, and ratios are taken within a
pair. A step: GIF, forward, the cross-entropy of a head with 26 classes, the gradient at the anchor, Adam; weights
frozen and random, nothing is attacked. PyTorch takes a batch as a whole, or --peer-batch pictures at a time with
their gradients added up, whichever suits its memory; its attention is its fused one (SDPA). In bf16 the tower alone
is, not the filter, the head or the anchor. Memory is the process's on the CPU, and the device's elsewhere.
"""

import argparse
import json
import os
import statistics
import sys

from device import CLIP, clip, output, peak_rss_mb, timed_ms


def peer(shape, n, batch, at_once, dtype, device):
    """PyTorch's figures, in this process."""
    import torch

    model = clip(shape, device, {"f32": "float32", "bf16": "bfloat16"}[dtype])
    config, side = model.config, model.config.image_size
    pictures = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)
    labels = torch.randint(0, 26, (n,)).to(device)
    head = torch.nn.functional.normalize(torch.randn(26, config.projection_dim), dim=-1).to(device)
    frequency = torch.fft.fftfreq(side) * side
    taps = torch.fft.ifft(torch.exp(-(frequency**2) / (2 * 40**2))).real
    gif = torch.stack([taps.roll(i) for i in range(side)]).to(device)
    tokens = (side // config.patch_size) ** 2 + 1
    anchor = torch.randn(tokens, config.hidden_size, device=device).mul_(0.1).requires_grad_()

    def hook(module, args, output):
        return ((0.8 * anchor).to(output[0].dtype) + 0.2 * output[0], *output[1:])

    (attention,) = [m for name, m in model.named_modules() if name.endswith("layers.0.self_attn")]
    attention.register_forward_hook(hook)
    optimizer = torch.optim.Adam([anchor], lr=0.01)

    def step(rows):
        optimizer.zero_grad()
        for part in rows.split(at_once):
            x = gif @ (pictures[part].to(device).float() / 255) @ gif
            embeds = model(pixel_values=((x - 0.5) / 0.25).to(model.dtype)).image_embeds.float()
            unit = torch.nn.functional.normalize(embeds, dim=-1)
            loss = torch.nn.functional.cross_entropy(100 * unit @ head.T, labels[part.to(device)], reduction="sum") / batch
            loss.backward()
        optimizer.step()

    times = [timed_ms(lambda: step(rows), device) for rows in torch.randperm(n).split(batch) if len(rows) == batch]
    print(json.dumps({"ms": statistics.median(times[1:]), "peak": peak_rss_mb()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--radapt", default="target/release/radapt")
    parser.add_argument("--shapes", default="vit-b-16-224", help=f"of {', '.join(CLIP)}")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--peer-batch", type=int)
    parser.add_argument("--dtype", default="f32", help="f32, bf16 or f32,bf16")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N, for both sides")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    at_once = options.peer_batch or options.batch
    if options.peer:
        return peer(options.peer, options.n, options.batch, at_once, options.dtype, options.device)
    digits = 0 if options.device == "cpu" else 1
    print(
        "| shape | batch | dtype | ours ms a step | PyTorch ms | times faster | our peak MB | PyTorch's | ratio |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for shape in options.shapes.split(","):
        for dtype in options.dtype.split(","):
            both = ["--n", str(options.n), "--batch", str(options.batch), "--dtype", dtype, "--device", options.device]
            pairs = []
            for pair in range(options.pairs):
                ours = [options.radapt, "bench", "anchor", "--json", "--quiet", "--shape", shape, *both]
                ours, our_mb = output(ours, options.device)
                ours = ours["rows"][0]
                theirs = [sys.executable, __file__, "--peer", shape, "--peer-batch", str(at_once), *both]
                theirs, their_mb = output(theirs, options.device)
                peaks = (ours["peak_rss_mb"], theirs["peak"]) if our_mb is None else (our_mb, their_mb)
                pairs.append((ours["median_ms"], theirs["ms"], *peaks))
                told = [round(value, digits) for value in pairs[-1]]
                print(shape, dtype, pair, told, f"load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
            ours, theirs, memory, peers = ([pair[i] for pair in pairs] for i in range(4))

            def ratio(a, b):
                return statistics.median(x / y for x, y in zip(a, b))

            median = statistics.median
            print(
                f"| {shape} | {options.batch} | {dtype} | {median(ours):.{digits}f} | {median(theirs):.{digits}f} | {ratio(theirs, ours):.2f} "
                f"| {median(memory):.0f} | {median(peers):.0f} | {ratio(memory, peers):.2f} |"
            )


if __name__ == "__main__":
    main()
