"""`radapt bench attack` and PyTorch in turn, on the same shapes: the attack step and its peak memory.

    pip install torch==2.15.0 transformers==5.23.0
    python benches/attack_vs_pytorch.py --radapt target/release/radapt [--pairs 5] [--repeats 3] [--device cuda]

Every figure comes from a process of its own, ours and PyTorch's alternate strictly (machines drift), and ratios are
taken within a pair. A step is a forward pass and the gradient of the embeddings' squared length at the pixels,
weights frozen and random; of Qwen3-VL's tower, of all that the language model reads. PyTorch's attention is its fused
one (SDPA). "Ten steps" is ten of them and one f32 forward pass that verifies the result: ours crafts in bf16 and
verifies in f32; PyTorch's do both in f32, or the steps in bf16 and the verification in f32.
Prints Markdown tables; the medians over the pairs. Memory is the process's on the CPU, and the device's elsewhere.
"""

import argparse
import json
import os
import statistics
import sys

from device import CLIP, QWEN, clip, median_ms, output, peak_rss_mb, qwen


def peer(shape, dtype, batch, repeats, device):
    """PyTorch's figures, in this process."""
    import torch

    if shape == QWEN:
        model = qwen(device, dtype)
        side, patch, merge, frames = 448, 16, 2, 2
        grid = torch.tensor([[1, side // patch, side // patch]] * batch, device=device)

        def embeddings(x):
            n = side // patch // merge
            x = x.unsqueeze(1).repeat(1, frames, 1, 1, 1).reshape(batch, frames, 3, n, merge, patch, n, merge, patch)
            x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * frames * patch**2)
            found = model(x.to(model.dtype), grid_thw=grid)
            return torch.stack([found.pooler_output, *found.deepstack_features])

    else:
        model = clip(shape, device, dtype)
        side = model.config.image_size

        def embeddings(x):
            return model(pixel_values=x.to(model.dtype)).image_embeds

    pixels = torch.rand(batch, 3, side, side).to(device)

    def forward():
        with torch.no_grad():
            embeddings((pixels - 0.5) / 0.25)

    def step():
        x = pixels.clone().requires_grad_()
        embeddings((x - 0.5) / 0.25).float().pow(2).sum().backward()

    found = {"forward": median_ms(forward, repeats, device), "step": median_ms(step, repeats, device)}
    print(json.dumps({**found, "peak": peak_rss_mb()}))


def ours(options, shape, dtype, batch):
    command = [options.radapt, "bench", "attack", "--json", "--quiet", "--shape", shape, "--dtype", dtype]
    command += ["--batch", str(batch), "--repeats", str(options.repeats), "--device", options.device]
    found, device_mb = output(command, options.device)
    rows = found["rows"]
    times = {row["name"]: row["median_ms"] for row in rows}
    peak = rows[0]["peak_rss_mb"] if device_mb is None else device_mb
    return {"forward": times.get("forward", times.get("verify")), "step": times["step"], "peak": peak}


def theirs(options, shape, dtype, batch):
    dtype = {"f32": "float32", "bf16": "bfloat16"}[dtype]
    command = [sys.executable, __file__, "--peer", shape, dtype, str(batch), str(options.repeats)]
    found, device_mb = output([*command, "--device", options.device], options.device)
    return found if device_mb is None else {**found, "peak": device_mb}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--radapt", default="target/release/radapt")
    parser.add_argument("--shapes", default=",".join(CLIP), help=f"of {', '.join([*CLIP, QWEN])}")
    parser.add_argument("--batch", default="1,4")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N, for both sides")
    parser.add_argument("--peer", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        shape, dtype, batch, repeats = options.peer
        return peer(shape, dtype, int(batch), int(repeats), options.device)

    def median(values, digits=2):
        return f"{statistics.median(values):.{digits}f}"

    # A device's steps take few milliseconds.
    digits = 0 if options.device == "cpu" else 1
    steps, tens = [], []
    for shape in options.shapes.split(","):
        for batch in map(int, options.batch.split(",")):
            pairs = []
            for pair in range(options.pairs):
                found = {}
                for dtype in ("f32", "bf16"):
                    found["ours", dtype] = ours(options, shape, dtype, batch)
                    found["theirs", dtype] = theirs(options, shape, dtype, batch)
                pairs.append(found)
                told = {" ".join(key): {name: round(ms, digits) for name, ms in value.items()} for key, value in found.items()}
                print(shape, batch, pair, json.dumps(told), f"load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)

            def each(who, dtype, what):
                return [pair[who, dtype][what] for pair in pairs]

            def ten(who, craft):
                verify = "bf16" if who == "ours" and craft == "bf16" else "f32"
                return [10 * a + b for a, b in zip(each(who, craft, "step"), each(who, verify, "forward"))]

            def ratio(a, b):
                return [x / y for x, y in zip(a, b)]

            for dtype in ("f32", "bf16"):
                mine, peers = each("ours", dtype, "step"), each("theirs", dtype, "step")
                memory = each("ours", dtype, "peak"), each("theirs", dtype, "peak"), each("theirs", "f32", "peak")
                steps.append(
                    f"| {shape} | {batch} | {dtype} | {median(mine, digits)} | {median(peers, digits)} | {median(ratio(peers, mine))} "
                    f"| {median(memory[0], 0)} | {median(memory[1], 0)} | {median(ratio(memory[0], memory[1]))} | {median(ratio(memory[0], memory[2]))} |"
                )
            mine = ten("ours", "bf16")
            tens.append(
                f"| {shape} | {batch} | {median(mine, digits)} | {median(ten('theirs', 'f32'), digits)} | {median(ten('theirs', 'bf16'), digits)} "
                f"| {median(ratio(ten('theirs', 'f32'), mine))} | {median(ratio(ten('theirs', 'bf16'), mine))} |"
            )
    print(
        "One step. Our bf16 process holds the f32 tower as well.\n\n"
        "| shape | batch | dtype | ours ms | PyTorch ms | times faster | our peak MB | PyTorch's | ratio | ratio to its f32 |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    print("\n".join(steps))
    print(
        "\nTen steps and an f32 verification, ours crafted in bf16.\n\n"
        "| shape | batch | ours ms | PyTorch f32 ms | PyTorch bf16 ms | times f32 | times bf16 |\n|---|---|---|---|---|---|---|"
    )
    print("\n".join(tens))


if __name__ == "__main__":
    main()
