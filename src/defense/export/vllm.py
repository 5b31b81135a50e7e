"""R-Adapt's defence for a CLIP vision tower in vLLM: a plugin of the kind `vllm.general_plugins`.

    pip install FOLDER                 # the folder that `radapt anchor export --to vllm` wrote
    vllm serve llava-hf/llava-1.5-7b-hf

vLLM loads it in every one of its processes. It registers, for the architectures below, a subclass
that puts GIF and FRA into the vision tower before weights are loaded, and compares the tower's
fingerprint with the anchor's once they are. A model that cannot be defended does not start. It is
on for every such model of this Python environment; `VLLM_PLUGINS=""` leaves it out.

Environment variables, read in each worker: RADAPT_ANCHOR (a file instead of the one that came
along), RADAPT_ALPHA, RADAPT_BETA, RADAPT_CUTOFF, RADAPT_ALLOW_MISMATCH=1.

Written against vLLM 0.33.0 and checked there on a CPU up to the vision tower's features, through
its registry and model loader. Not run: a whole engine, a GPU, tensor parallelism, other versions.
Paper: R-Adapt, arXiv 2603.12799.
"""

import importlib
import os

from core import *

# Architecture -> where vLLM keeps it.
_MODELS = {
    "CLIPModel": ("vllm.model_executor.models.clip", "CLIPEmbeddingModel"),
    "LlavaForConditionalGeneration": ("vllm.model_executor.models.llava", "LlavaForConditionalGeneration"),
    "LlavaNextForConditionalGeneration": (
        "vllm.model_executor.models.llava_next",
        "LlavaNextForConditionalGeneration",
    ),
}


def register():
    """The plugin's entry point. Names alone, so that nothing touches the device too early."""
    from vllm import ModelRegistry

    for architecture in _MODELS:
        ModelRegistry.register_model(architecture, f"{__name__}:{architecture}")


def __getattr__(name):
    """The defended subclass of an architecture, made when vLLM asks for it."""
    if name not in _MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, base = _MODELS[name]
    made = defended(getattr(importlib.import_module(module), base), name)
    globals()[name] = made
    return made


def defended(base, name):
    """A subclass of the model class `base` with the defence in its vision tower."""

    class Defended(base):
        def __init__(self, *, vllm_config, prefix=""):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            # A worker that holds only the language model has stand-ins in the tower's place.
            if any(type(module).__name__ == "StageMissingLayer" for module in self.modules()):
                if not any(map(_is_tower, self.modules())):
                    return
            self._radapt = Guarded(self)

        def load_weights(self, weights):
            loaded = super().load_weights(weights)
            if hasattr(self, "_radapt"):
                self._radapt.check()
            return loaded

    Defended.__name__ = Defended.__qualname__ = name
    Defended.__module__ = __name__
    return Defended


class Guarded:
    """The defence in a tower whose weights are yet to come. Until `check` has compared them, the
    tower refuses pictures: weights may come in by a way that does not pass `load_weights`."""

    def __init__(self, model):
        number = lambda name: float(os.environ[name]) if os.environ.get(name) else None
        self.allow_mismatch = os.environ.get("RADAPT_ALLOW_MISMATCH", "") not in ("", "0")
        self.checked = self.allow_mismatch
        self.tower = find_tower(model)
        self.anchor = Anchor(os.environ.get("RADAPT_ANCHOR") or Path(__file__).with_name("anchor.safetensors"))
        self.anchor.check_shape(self.tower)
        alpha, beta, cutoff = number("RADAPT_ALPHA"), number("RADAPT_BETA"), number("RADAPT_CUTOFF")
        self.defense = Defense(self.tower, self.anchor, alpha, beta, cutoff, True, True)
        self.tower.entry.register_forward_pre_hook(self.refuse_unchecked)

    def check(self):
        """Compares the tower's weights with those the anchor was made on."""
        if not self.allow_mismatch:
            self.anchor.check_fingerprint(self.tower)
            self.checked = True

    def refuse_unchecked(self, module, args):
        if not self.checked:
            raise AnchorMismatch(
                "the tower's weights did not come through load_weights and could not be compared with the "
                "anchor's fingerprint; RADAPT_ALLOW_MISMATCH=1 uses the anchor all the same"
            )


def _is_tower(module):
    return all(hasattr(module, part) for part in ("embeddings", "pre_layrnorm", "encoder"))


def find_tower(model):
    """The CLIP vision tower inside `model`; vLLM keeps transformers' names, and packs the query,
    key and value projections into one."""
    tower = only_tower(model, _is_tower, "CLIP vision tower of vLLM")
    embeddings, block = tower.embeddings, tower.encoder.layers[0]
    hidden, _, patch, _ = embeddings.patch_embedding.weight.shape
    size = embeddings.image_size
    attention, mlp = block.self_attn, block.mlp

    def trunk():
        first = "encoder.layers.0"
        packed = getattr(attention.qkv_proj, "weight", None)
        if packed is None or tuple(packed.shape) != (3 * hidden, hidden):
            raise NotComparable(
                "its weights are quantised or split over devices "
                "(with tensor parallelism, --mm-encoder-tp-mode data keeps the tower whole)"
            )
        weights, biases = packed.chunk(3), attention.qkv_proj.bias.chunk(3)
        projections = [
            (f"{first}.self_attn.{name}_proj.{kind}", tensor)
            for name, *tensors in zip("qkv", weights, biases)
            for kind, tensor in zip(("weight", "bias"), tensors)
        ]
        return [
            ("embeddings.class_embedding", embeddings.class_embedding),
            ("embeddings.patch_embedding.weight", embeddings.patch_embedding.weight),
            ("embeddings.position_embedding.weight", embeddings.position_embedding.weight),
            *layer("pre_layrnorm", tower.pre_layrnorm),
            *layer(f"{first}.layer_norm1", block.layer_norm1),
            *projections,
            *layer(f"{first}.self_attn.out_proj", attention.out_proj),
            *layer(f"{first}.layer_norm2", block.layer_norm2),
            *layer(f"{first}.mlp.fc1", mlp.fc1),
            *layer(f"{first}.mlp.fc2", mlp.fc2),
        ]

    # Its out_proj sums over devices, so the attention's output is whole on each of them.
    return Tower(
        tower, embeddings, attention, 1, (size, size), (size // patch, size // patch), hidden, trunk
    )
