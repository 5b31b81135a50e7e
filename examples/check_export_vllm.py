"""Compares the vision tower of a LLaVA in vLLM, defended by the exported plugin, with radapt's own.

    radapt anchor extract --model pocket/llava --out white.safetensors
    radapt anchor export white.safetensors --to vllm --out plugin && pip install --no-deps ./plugin
    radapt features --model pocket/llava --anchor white.safetensors --out features.safetensors IMAGE...
    python examples/check_export_vllm.py --model pocket/llava features.safetensors

On a CPU, in one process and in f32. It goes by vLLM's own ways from the model's name to its loaded
weights: the plugin, the registry, the configuration, the model loader. It does not start an
engine, so the compiled operations of the language model are not needed: without them (vLLM's source
alone on PYTHONPATH, which is how it was run, vLLM 0.33.0) two are declared so that modules can be
made, and never called. Ends with 1 where a relative difference is above 2e-5.
"""

import argparse
import json
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors import safe_open
from safetensors.torch import load_file


def declare_operations():
    """The compiled operations that the constructors of a CLIP and a Llama look up."""
    library = torch.library.Library("_C", "FRAGMENT")
    for name in ("gelu_quick", "silu_and_mul"):
        if not hasattr(torch.ops._C, name):
            library.define(f"{name}(Tensor! out, Tensor input) -> ()")
    return library


def load(folder):
    """The model as vLLM's worker loads it."""
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config = EngineArgs(model=folder, dtype="float32", max_model_len=256, enforce_eager=True).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29517", 0, "gloo")
        initialize_model_parallel(1, 1)
        loader = get_model_loader(config.load_config)
        return loader.load_model(vllm_config=config, model_config=config.model_config), config


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the LLaVA's folder")
    parser.add_argument("features", help="what `radapt features` wrote, defended by the plugin's anchor")
    options = parser.parse_args()
    library = declare_operations()
    model, config = load(os.path.abspath(options.model))
    from vllm.config import set_current_vllm_config

    ours = load_file(options.features)
    with safe_open(options.features, framework="pt") as file:
        about = json.loads(file.metadata()["radapt.features"])
    mean, std = (torch.tensor(about[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    tower, found = model.vision_tower.vision_model, {}

    def keep(name):
        return lambda module, args, output: found.update({name: output})

    tower.pre_layrnorm.register_forward_hook(keep("block.0"))
    for k, block in enumerate(tower.encoder.layers, 1):
        block.register_forward_hook(keep(f"block.{k}"))
    with torch.no_grad(), set_current_vllm_config(config):
        model.vision_tower((ours["pixels"] - mean) / std, feature_select_strategy="default")
    worst = max(((ours[k] - v).abs().max() / ours[k].abs().max()).item() for k, v in found.items())
    print(f"{type(model).__module__}.{type(model).__name__}: {model._radapt.defense}")
    print(f"{len(found)} blocks of {len(ours['pixels'])} pictures, largest relative difference {worst:.2e}")
    sys.exit(0 if worst <= 2e-5 else 1)


if __name__ == "__main__":
    main()
