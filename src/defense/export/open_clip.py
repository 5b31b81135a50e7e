"""R-Adapt's defence for a CLIP vision transformer in open_clip, and in OpenAI's `clip`.

    import radapt_open_clip
    defense = radapt_open_clip.attach(model)      # the whole model, or model.visual
    ...
    defense.remove()

Written by `radapt anchor export --to open_clip`; it needs torch, safetensors and the
`anchor.safetensors` beside it. Paper: R-Adapt, arXiv 2603.12799.

The fingerprint covers weights, not the activation: OpenAI's weights, and those tuned from them
(FARE, TeCoA), want a model called `...-quickgelu`.
"""

from core import *


def find_tower(model):
    """The vision transformer inside `model`; a ResNet or a timm trunk is none."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ValueError("the model is TorchScript, which takes no hooks: load it with jit=False")
    tower = only_tower(
        model,
        lambda m: all(
            hasattr(m, part) for part in ("conv1", "class_embedding", "positional_embedding", "ln_pre", "transformer")
        ),
        "CLIP vision transformer of open_clip",
    )
    block = tower.transformer.resblocks[0]
    attention = block.attn
    if not isinstance(attention, torch.nn.MultiheadAttention):
        raise ValueError(
            f"first attention: expected torch.nn.MultiheadAttention, found {type(attention).__name__}"
        )
    hidden, _, patch, _ = tower.conv1.weight.shape
    # OpenAI's `clip` calls it input_resolution.
    size = getattr(tower, "image_size", None) or tower.input_resolution
    height, width = size if isinstance(size, (tuple, list)) else (size, size)

    def trunk():
        first = "encoder.layers.0"
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        projections = [
            (f"{first}.self_attn.{name}_proj.{kind}", tensor)
            for name, *tensors in zip("qkv", weights, biases)
            for kind, tensor in zip(("weight", "bias"), tensors)
        ]
        return [
            ("embeddings.class_embedding", tower.class_embedding),
            ("embeddings.patch_embedding.weight", tower.conv1.weight),
            ("embeddings.position_embedding.weight", tower.positional_embedding),
            *layer("pre_layrnorm", tower.ln_pre),
            *layer(f"{first}.layer_norm1", block.ln_1),
            *projections,
            *layer(f"{first}.self_attn.out_proj", attention.out_proj),
            *layer(f"{first}.layer_norm2", block.ln_2),
            *layer(f"{first}.mlp.fc1", block.mlp.c_fc),
            *layer(f"{first}.mlp.fc2", block.mlp.c_proj),
        ]

    # open_clip runs (B, N, D) or, as OpenAI's `clip` does, (N, B, D). The attention gives (output,
    # weights). Its fast path is inside its forward, so the hook sees that too.
    return Tower(
        tower,
        tower.conv1,
        attention,
        1 if attention.batch_first else 0,
        (height, width),
        (height // patch, width // patch),
        hidden,
        trunk,
    )
