"""V-Attack's step, `radapt bench v-attack` and PyTorch in turn: seconds and peak memory on the same shape.

    pip install torch==2.15.0 transformers==5.23.0
    python benches/vattack_vs_pytorch.py --radapt target/release/radapt [--pairs 5] [--steps 3]

PyTorch's is the loop of the authors' notebook, on transformers' CLIP with random weights: the mask from the last
crop's values by 20 rounds of the clean picture's keys, the crop around the best of the soft map, the values of the
last four blocks, the gradient's sign resized to the crop. As in the notebook its forward pass runs through every
block. `--preset paper` is the paper's: self-values of the last block on a random crop, gradient through the resize.
Every figure comes from a process of its own, ours and PyTorch's alternate strictly, and ratios are taken within a
pair. f32 and bf16; PyTorch's bf16 has weights and activations in it. Prints a Markdown table; medians over the pairs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from attack_vs_pytorch import SHAPES

EPS, KEY_BLOCK, ROUNDS = 16 / 255, 8, 20


def peer(shape, preset, dtype, batch, steps, threads):
    """PyTorch's figures, in this process."""
    import resource

    import torch
    import torch.nn.functional as F
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_act="quick_gelu", **SHAPES[shape])
    model = CLIPVisionModelWithProjection(config).eval().requires_grad_(False).to(getattr(torch, dtype))
    side, grid, heads = config.image_size, config.image_size // config.patch_size, config.num_attention_heads
    key_block = KEY_BLOCK * config.num_hidden_layers // 24
    layers = model.vision_model.encoder.layers

    def keys_and_values(x):
        states = model(pixel_values=x.to(model.dtype), output_hidden_states=True).hidden_states
        found = []
        for layer, state in zip(layers, states):
            normal = layer.layer_norm1(state)
            found.append((layer.self_attn.k_proj(normal), layer.self_attn.v_proj(normal)))
        return found

    def attend(q, k, v):
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        weights = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, dim=-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def tokens(block, values):
        out = model.vision_model.post_layernorm(layers[block].self_attn.out_proj(values))
        return F.normalize(model.visual_projection(out)[:, 1:].float(), dim=-1)

    def scores(values, keys):
        if preset == "paper":
            return tokens(-1, attend(values, values, values)) @ source
        for _ in range(ROUNDS):
            values = attend(keys, keys, values)
        return tokens(-1, values) @ source

    def window(soft):
        """Around the best 15 % in the notebook, anywhere in the paper's."""
        height, width = (int(side * (0.75 + 0.25 * float(torch.rand(())))) for _ in "hw")
        low = [0, 0]
        high = [side - height, side - width]
        if preset == "notebook":
            best = soft >= torch.topk(soft.flatten(), int(0.15 * soft.numel())).values[-1]
            spans = [torch.where(best.any(dim))[0][[0, -1]].tolist() for dim in (1, 0)]
            height, width = (max(x, b - a + 1) for x, (a, b) in zip((height, width), spans))
            low = [max(0, b + 1 - x) for x, (_, b) in zip((height, width), spans)]
            high = [min(a, side - x) for x, (a, _) in zip((height, width), spans)]
        top, left = (int(torch.randint(a, b + 1, ())) for a, b in zip(low, high))
        return top, left, height, width

    def resize(x, height, width, **more):
        return F.interpolate(x[None], size=(height, width), mode="bilinear", align_corners=False, **more)[0]

    def masks(score):
        middle = (score.min() + score.max()) / 2
        square = score.reshape(1, grid, grid)
        mask = F.interpolate((square > middle).float()[None], size=(side, side), mode="nearest")[0, 0]
        return mask, resize(square, side, side)[0]

    source, target = (F.normalize(torch.randn(config.projection_dim), dim=0) for _ in "st")
    clean = torch.rand(batch, 3, side, side)
    alpha = (3 if preset == "notebook" else 1) / 255
    with torch.no_grad():
        found = keys_and_values(clean)
        keys = found[key_block][0]
        score = scores(found[-1][1], keys)
        del found
    adversarial = clean + alpha * (2 * torch.rand_like(clean) - 1) if preset == "notebook" else clean.clone()

    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        with torch.no_grad():
            parts = [masks(one) for one in score]
        windows = [window(soft) for _, soft in parts]
        whole = adversarial.detach().requires_grad_()
        shown, kept = [], []
        for x, (mask, _), (top, left, height, width) in zip(whole, parts, windows):
            shown.append(resize(x[:, top : top + height, left : left + width], side, side))
            part = mask[None, None, top : top + height, left : left + width]
            kept.append(F.interpolate(part, size=(grid, grid), mode="nearest").flatten())
        shown, kept = torch.stack(shown), torch.stack(kept)
        if preset == "notebook":
            shown = shown.detach().requires_grad_()
        found = keys_and_values(shown)
        if preset == "notebook":
            features = [tokens(block, found[block][1]) for block in range(-4, 0)]
        else:
            features = [tokens(-1, attend(*[found[-1][1]] * 3))]
        loss = sum((kept * (x @ target - x @ source)).sum() for x in features)
        loss.backward()
        with torch.no_grad():
            if preset == "notebook":
                score = scores(found[-1][1], keys)
                move = torch.zeros_like(clean)
                for one, gradient, (top, left, height, width) in zip(move, shown.grad, windows):
                    one[:, top : top + height, left : left + width] = resize(alpha * gradient.sign(), height, width)
            else:
                move = alpha * whole.grad.sign()
            adversarial = (clean + (adversarial + move - clean).clamp(-EPS, EPS)).clamp(0, 1)
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.024e-3
    print(json.dumps({"step": statistics.median(times[1:]) * 1e3, "peak": peak}))


def output(command):
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def ours(options, dtype, batch):
    command = [options.radapt, "bench", "v-attack", "--json", "--quiet", "--shape", options.shape, "--dtype", dtype]
    command += ["--preset", options.preset, "--batch", str(batch), "--steps", str(options.steps)]
    [row] = output(command)["rows"]
    return {"step": row["median_ms"], "peak": row["peak_rss_mb"]}


def theirs(options, dtype, batch):
    dtype = {"f32": "float32", "bf16": "bfloat16"}[dtype]
    case = [options.shape, options.preset, dtype, str(batch), str(options.steps), str(options.threads)]
    return output([sys.executable, __file__, "--peer", *case])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--radapt", default="target/release/radapt")
    parser.add_argument("--shape", default="vit-l-14-336", choices=SHAPES)
    parser.add_argument("--preset", default="notebook", choices=["notebook", "paper"])
    parser.add_argument("--dtypes", default="f32,bf16")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that does not count")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="PyTorch's; ours takes RAYON_NUM_THREADS")
    parser.add_argument("--peer", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        shape, preset, dtype, batch, steps, threads = options.peer
        return peer(shape, preset, dtype, int(batch), int(steps), int(threads))

    rows = []
    for batch in map(int, options.batch.split(",")):
        for dtype in options.dtypes.split(","):
            pairs = []
            for pair in range(options.pairs):
                pairs.append((ours(options, dtype, batch), theirs(options, dtype, batch)))
                told = [{name: round(value) for name, value in found.items()} for found in pairs[-1]]
                print(dtype, batch, pair, json.dumps(told), f"load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)

            def median(of, digits):
                return f"{statistics.median([of(*pair) for pair in pairs]):.{digits}f}"

            per_hour = 3.6e6 * batch / {"notebook": 200, "paper": 300}[options.preset]
            rows.append(
                f"| {options.preset} | {batch} | {dtype} | {median(lambda a, b: a['step'], 0)} | {median(lambda a, b: b['step'], 0)} "
                f"| {median(lambda a, b: b['step'] / a['step'], 2)} | {median(lambda a, b: per_hour / a['step'], 1)} "
                f"| {median(lambda a, b: per_hour / b['step'], 1)} | {median(lambda a, b: a['peak'], 0)} "
                f"| {median(lambda a, b: b['peak'], 0)} | {median(lambda a, b: a['peak'] / b['peak'], 2)} |"
            )
    print(
        f"{options.shape}\n\n| preset | batch | dtype | ours ms a step | PyTorch ms | times faster | ours pictures an hour "
        "| PyTorch's | ours peak MB | PyTorch's | ratio |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
