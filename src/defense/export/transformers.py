"""R-Adapt's defence for a CLIP vision tower in transformers, versions 4 and 5.

    import radapt_transformers
    defense = radapt_transformers.attach(model)   # CLIPModel, CLIPVisionModel, LLaVA-1.5, LLaVA-NeXT
    ...
    defense.remove()

Written by `radapt anchor export --to transformers`; it needs torch, safetensors and the
`anchor.safetensors` beside it. Paper: R-Adapt, arXiv 2603.12799.
"""

from core import *


def find_tower(model):
    """The CLIP vision tower inside `model`, wherever its version of transformers keeps it:
    `vision_model`, `vision_tower.vision_model` or `model.vision_tower`."""
    tower = only_tower(
        model,
        lambda m: all(hasattr(m, part) for part in ("embeddings", "pre_layrnorm", "encoder")),
        "CLIP vision tower of transformers",
    )
    embeddings, block = tower.embeddings, tower.encoder.layers[0]
    hidden, _, patch, _ = embeddings.patch_embedding.weight.shape
    size = embeddings.image_size
    attention, mlp = block.self_attn, block.mlp

    def trunk():
        first = "encoder.layers.0"
        return [
            ("embeddings.class_embedding", embeddings.class_embedding),
            ("embeddings.patch_embedding.weight", embeddings.patch_embedding.weight),
            ("embeddings.position_embedding.weight", embeddings.position_embedding.weight),
            *layer("pre_layrnorm", tower.pre_layrnorm),
            *layer(f"{first}.layer_norm1", block.layer_norm1),
            *layer(f"{first}.self_attn.q_proj", attention.q_proj),
            *layer(f"{first}.self_attn.k_proj", attention.k_proj),
            *layer(f"{first}.self_attn.v_proj", attention.v_proj),
            *layer(f"{first}.self_attn.out_proj", attention.out_proj),
            *layer(f"{first}.layer_norm2", block.layer_norm2),
            *layer(f"{first}.mlp.fc1", mlp.fc1),
            *layer(f"{first}.mlp.fc2", mlp.fc2),
        ]

    # The attention gives (output, weights), eager and sdpa alike.
    return Tower(
        tower, embeddings, attention, 1, (size, size), (size // patch, size // patch), hidden, trunk
    )
