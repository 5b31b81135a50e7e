"""`radapt bench attack` and PyTorch in turn, on the same shapes: the attack step and its peak memory.

    pip install torch==2.15.0 transformers==5.23.0
    python benches/attack_vs_pytorch.py --radapt target/release/radapt [--pairs 5] [--repeats 3]

Every figure comes from a process of its own, ours and PyTorch's alternate strictly (machines drift), and ratios are
taken within a pair. A step is a forward pass and the gradient of the embeddings' squared length at the pixels,
weights frozen and random. "Ten steps" is ten of them and one f32 forward pass that verifies the result: ours crafts
in bf16 and verifies in f32; PyTorch's do both in f32, or the steps in bf16 and the verification in f32.
Prints Markdown tables; the medians over the pairs.
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


def peer(shape, dtype, batch, repeats):
    """PyTorch's figures, in this process."""
    import resource

    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_act="quick_gelu", **SHAPES[shape])
    model = CLIPVisionModelWithProjection(config).eval().requires_grad_(False).to(getattr(torch, dtype))
    pixels = torch.rand(batch, 3, config.image_size, config.image_size)

    def forward():
        with torch.no_grad():
            model(pixel_values=pixels.to(model.dtype))

    def step():
        x = pixels.clone().requires_grad_()
        model(pixel_values=x.to(model.dtype)).image_embeds.float().pow(2).sum().backward()

    def median_ms(run):
        run()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1e3

    found = {"forward": median_ms(forward), "step": median_ms(step)}
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.024e-3
    print(json.dumps(found))


def output(command):
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def ours(radapt, shape, dtype, batch, repeats):
    command = [radapt, "bench", "attack", "--json", "--quiet", "--shape", shape, "--dtype", dtype]
    rows = output([*command, "--batch", str(batch), "--repeats", str(repeats)])["rows"]
    found = {row["name"]: row["median_ms"] for row in rows}
    return {"forward": found.get("forward", found.get("verify")), "step": found["step"], "peak": rows[0]["peak_rss_mb"]}


def theirs(shape, dtype, batch, repeats):
    dtype = {"f32": "float32", "bf16": "bfloat16"}[dtype]
    return output([sys.executable, __file__, "--peer", shape, dtype, str(batch), str(repeats)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--radapt", default="target/release/radapt")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--batch", default="1,4")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        shape, dtype, batch, repeats = options.peer
        return peer(shape, dtype, int(batch), int(repeats))

    def median(values, digits=2):
        return f"{statistics.median(values):.{digits}f}"

    steps, tens = [], []
    for shape in options.shapes.split(","):
        for batch in map(int, options.batch.split(",")):
            pairs = []
            for pair in range(options.pairs):
                found = {}
                for dtype in ("f32", "bf16"):
                    found["ours", dtype] = ours(options.radapt, shape, dtype, batch, options.repeats)
                    found["theirs", dtype] = theirs(shape, dtype, batch, options.repeats)
                pairs.append(found)
                told = {" ".join(key): {name: round(ms) for name, ms in value.items()} for key, value in found.items()}
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
                    f"| {shape} | {batch} | {dtype} | {median(mine, 0)} | {median(peers, 0)} | {median(ratio(peers, mine))} "
                    f"| {median(memory[0], 0)} | {median(memory[1], 0)} | {median(ratio(memory[0], memory[1]))} | {median(ratio(memory[0], memory[2]))} |"
                )
            mine = ten("ours", "bf16")
            tens.append(
                f"| {shape} | {batch} | {median(mine, 0)} | {median(ten('theirs', 'f32'), 0)} | {median(ten('theirs', 'bf16'), 0)} "
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
