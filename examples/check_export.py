"""Compares the vision tower of transformers or open_clip, defended by an exported anchor, with radapt's own.

    python examples/check_export.py --model pocket/clip IMAGE...
    python examples/check_export.py --model pocket/llava --radapt target/release/radapt IMAGE...

It runs `radapt anchor extract`, `anchor export` and `features` into a temporary folder, gives the
prepared pixels to the host's own model, and prints for each host and attention the largest
difference over the largest value, of every block's output and of the pooled embedding. It ends
with 1 where one is above --most. A CLIP is also run as an open_clip model, its weights renamed;
open_clip is left out with a line that says so where it is not installed.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors import safe_open
from safetensors.torch import load_file

torch.set_num_threads(1)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a CLIP's or LLaVA's folder in the Hugging Face layout")
    parser.add_argument("--radapt", default="radapt", help="the radapt command")
    parser.add_argument("--anchor", help="an anchor file or a built-in name; a training-free one where not given")
    parser.add_argument("--most", type=float, default=2e-5, help="the largest relative difference allowed")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    return parser.parse_args()


def exported(folder, host, radapt, anchor):
    """The module that `radapt anchor export` writes."""
    run([radapt, "anchor", "export", anchor, "--to", host, "--out", folder])
    sys.path.insert(0, str(folder))
    return importlib.import_module(f"radapt_{host}")


def run(command):
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


def difference(ours, theirs):
    """The largest difference over the largest value."""
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


def normalised(ours, about):
    mean, std = (torch.tensor(about[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (ours["pixels"] - mean) / std


def compare(what, ours, theirs, most):
    """Prints one line; whether all is within `most`."""
    worst = {name: difference(ours[name], theirs[name]) for name in theirs}
    name = max(worst, key=worst.get)
    fine = worst[name] <= most
    verdict = "ok" if fine else "TOO FAR"
    print(f"{what:52} {len(theirs):2} outputs, largest relative difference {worst[name]:.2e} ({name})  {verdict}")
    return fine


def transformers_model(folder, attention):
    import transformers
    from transformers import AutoConfig, CLIPModel, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

    transformers.utils.logging.disable_progress_bar()
    kinds = {"clip": CLIPModel, "llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}
    kind = kinds[AutoConfig.from_pretrained(folder).model_type]
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


def transformers_features(model, pixels):
    """Every block's output, by the tower's own way of returning hidden states."""
    vision = getattr(model, "vision_model", None)
    if vision is None:
        vision = getattr(model, "vision_tower", None) or model.model.vision_tower
    output = vision(pixels, output_hidden_states=True)
    features = {f"block.{k}": hidden for k, hidden in enumerate(output.hidden_states)}
    features["pooled"] = output.pooler_output
    if hasattr(model, "visual_projection"):
        features["embeds"] = model.visual_projection(output.pooler_output)
    return features


def open_clip_model(folder):
    """An open_clip model with the weights of a transformers CLIP, its vision part filled."""
    import open_clip

    config = json.loads((folder / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    settings = open_clip.model.CLIPVisionCfg(
        layers=vision["num_hidden_layers"],
        width=vision["hidden_size"],
        head_width=vision["hidden_size"] // vision["num_attention_heads"],
        mlp_ratio=vision["intermediate_size"] / vision["hidden_size"],
        patch_size=vision["patch_size"],
        image_size=vision["image_size"],
    )
    words = open_clip.model.CLIPTextCfg(width=text["hidden_size"], heads=text["num_attention_heads"], layers=1)
    quick = vision.get("hidden_act", "quick_gelu") == "quick_gelu"
    model = open_clip.model.CLIP(config["projection_dim"], settings, words, quick_gelu=quick).eval()
    theirs = load_file(folder / "model.safetensors")
    model.visual.load_state_dict(open_clip_weights(theirs, vision["num_hidden_layers"]))
    return model.float()


def open_clip_weights(weights, blocks):
    """transformers' names to open_clip's, for the vision part."""
    own = {name.removeprefix("vision_model."): tensor for name, tensor in weights.items()}
    renamed = {
        "class_embedding": own["embeddings.class_embedding"],
        "positional_embedding": own["embeddings.position_embedding.weight"],
        "conv1.weight": own["embeddings.patch_embedding.weight"],
        "proj": weights["visual_projection.weight"].T,
    }
    parts = [("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")]
    for i in range(blocks):
        there, here = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            packed = [own[f"{here}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            renamed[f"{there}.attn.in_proj_{kind}"] = torch.cat(packed)
        names = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
        names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
        parts += [(f"{there}.{a}", f"{here}.{b}") for a, b in names.items()]
    renamed |= {f"{a}.{kind}": own[f"{b}.{kind}"] for a, b in parts for kind in ("weight", "bias")}
    return {name: tensor.float() for name, tensor in renamed.items()}


def open_clip_features(model, pixels):
    found = {}
    blocks = model.visual.transformer.resblocks
    hooks = [
        block.register_forward_hook(lambda m, a, output, k=k: found.update({f"block.{k}": output}))
        for k, block in enumerate(blocks, 1)
    ]
    found["embeds"] = model.encode_image(pixels)
    for hook in hooks:
        hook.remove()
    # (N, B, D) where its transformer runs tokens first.
    first = not model.visual.transformer.batch_first
    return {name: t.transpose(0, 1) if first and t.dim() == 3 else t for name, t in found.items()}


def check_linear(module, ours, about, cutoff):
    """Filtering the normalised picture gives what normalising the filtered one gives, in f64."""
    pixels = {"pixels": ours["pixels"].double()}
    side = pixels["pixels"].shape[-1]
    gif = module.Gif(side, side, cutoff, torch.device("cpu"))
    filtered = {"pixels": gif.filter(pixels["pixels"])}
    worst = difference(normalised(filtered, about), gif.filter(normalised(pixels, about)))
    print(f"{'GIF before against after normalisation, f64':52} relative difference {worst:.2e}")
    return worst <= 1e-6


def check_gradient(model, module, anchor, pixels):
    """The gradient through the hooks against a central difference, in f64."""
    model = model.double()
    pixels = pixels[:1].double().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    with module.attach(model, anchor):
        last = lambda x: list(transformers_features(model, x).values())[-1].square().sum()
        (gradient,) = torch.autograd.grad(last(pixels), pixels)
        step = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            slope = (last(pixels + 1e-6 * step) - last(pixels - 1e-6 * step)) / 2e-6
    found = (gradient * step).sum()
    worst = ((found - slope).abs() / slope.abs()).item()
    print(f"{'gradient through GIF and FRA, f64':52} against a central difference {worst:.2e}")
    return worst <= 1e-6


def main():
    options = arguments()
    model_folder = Path(options.model)
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        anchor = options.anchor
        if anchor is None:
            anchor = folder / "white.safetensors"
            run([options.radapt, "anchor", "extract", "--model", model_folder, "--out", anchor])
        features = folder / "features.safetensors"
        base = [options.radapt, "features", "--model", model_folder, *options.images, "--out"]
        run([*base, features, "--anchor", anchor])
        run([*base, folder / "none.safetensors", "--anchor", "none"])
        ours, undefended = load_file(features), load_file(folder / "none.safetensors")
        with safe_open(features, framework="pt") as file:
            about = json.loads(file.metadata()["radapt.features"])
        pixels = normalised(ours, about)
        print(f"{options.model}: {len(pixels)} pictures, {about['defense']}")
        last = max(name for name in ours if name.startswith("block."))
        print(f"{'what the defence changes':52} relative difference {difference(undefended[last], ours[last]):.2e} ({last})")

        module = exported(folder / "transformers", "transformers", options.radapt, anchor)
        for attention in ("eager", "sdpa"):
            model = transformers_model(model_folder, attention)
            name = f"transformers {type(model).__name__} {attention}"
            with torch.no_grad():
                with module.attach(model):
                    theirs = transformers_features(model, pixels)
                fine &= compare(name, ours, theirs, options.most)
                plain = transformers_features(model, pixels)
            fine &= compare("  the same after remove()", undefended, plain, options.most)
        fine &= check_linear(module, ours, about, about["defense"]["cutoff"])
        fine &= check_gradient(model, module, folder / "transformers/anchor.safetensors", pixels)

        if "embeds" in ours:
            try:
                import open_clip
            except ImportError:
                print("SKIPPED: open_clip is not installed (pip install open_clip_torch)")
            else:
                module = exported(folder / "open_clip", "open_clip", options.radapt, anchor)
                model = open_clip_model(model_folder)
                for first in (True, False):
                    model.visual.transformer.batch_first = first
                    for block in model.visual.transformer.resblocks:
                        block.attn.batch_first = first
                    with torch.no_grad(), module.attach(model):
                        theirs = open_clip_features(model, pixels)
                    name = f"open_clip {open_clip.__version__} {'(B, N, D)' if first else '(N, B, D)'}"
                    fine &= compare(name, ours, theirs, options.most)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
