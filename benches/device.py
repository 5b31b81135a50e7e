"""What the benches that set us beside PyTorch need of a device: waiting for it, and the memory taken of it."""

import json
import os
import resource
import statistics
import subprocess
import time

# CLIP's towers and Qwen3-VL-8B's for pictures of 448 x 448, as `radapt bench` names them.
CLIP = {
    "vit-b-16-224": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=16, projection_dim=512),
    "vit-l-14-336": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14, projection_dim=768),
}
QWEN = "qwen3-vl-8b-448"


def clip(shape, device, dtype):
    """CLIP's tower with random weights, frozen, its attention by PyTorch's fused one."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_act="quick_gelu", attn_implementation="sdpa", **CLIP[shape])
    model = CLIPVisionModelWithProjection(config).eval().requires_grad_(False)
    assert model.config._attn_implementation == "sdpa"
    return model.to(device, getattr(torch, dtype))


def qwen(device, dtype):
    """Qwen3-VL-8B's tower, likewise."""
    import torch
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    model = Qwen3VLVisionModel(Qwen3VLVisionConfig(out_hidden_size=4096, attn_implementation="sdpa")).eval()
    assert model.config._attn_implementation == "sdpa"
    return model.requires_grad_(False).to(device, getattr(torch, dtype))


def timed_ms(run, device):
    """One run, until the device is done with it."""
    start = time.perf_counter()
    run()
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def median_ms(run, repeats, device):
    """The median of some runs after one that does not count."""
    timed_ms(run, device)
    return statistics.median(timed_ms(run, device) for _ in range(repeats))


def peak_rss_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.024e-3


def used_mb(line):
    return float(line) * 1.048576


def output(command, device):
    """What a process prints as JSON, and the most memory in use on the device while it ran, above what was in use
    before, in 10^6 bytes: by nvidia-smi 20 times a second, for ours and PyTorch's alike. `None` on the CPU."""
    if device == "cpu":
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout), None
    number = device.partition(":")[2] or "0"
    smi = ["nvidia-smi", f"--id={number}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    before = used_mb(subprocess.run(smi, check=True, stdout=subprocess.PIPE, text=True).stdout)
    watch = subprocess.Popen([*smi, "--loop-ms=50"], stdout=subprocess.PIPE, text=True)
    try:
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    finally:
        watch.terminate()
        lines = watch.communicate()[0].split()
    # The last line may have been cut off.
    return found, max(map(used_mb, lines[:-1]), default=before) - before
