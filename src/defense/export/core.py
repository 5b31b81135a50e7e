"""What every host shares: the anchor file, GIF, FRA, the fingerprint, and putting them in.

`radapt anchor export` writes this text in place of the line `from core import *` of a host's file.
"""

import collections
import ctypes
import hashlib
import math
from pathlib import Path

import torch
from safetensors import safe_open


class AnchorMismatch(ValueError):
    """The anchor does not belong to this tower."""


# Where a host keeps what the defence needs.
#   module     the vision tower
#   entry      its module that takes the normalised picture (B, 3, H, W)
#   attention  the first block's attention, its output projection included
#   tokens     the attention output's token axis: 1 for (B, N, D), 0 for (N, B, D)
#   size       the picture's height and width
#   grid       patches down and across
#   hidden     D
#   trunk      a function that lists (name, tensor) of what an anchor depends on, in the order and
#              under the names of `radapt`
Tower = collections.namedtuple("Tower", "module entry attention tokens size grid hidden trunk")


class _Constant:
    """A tensor that is there on whatever device it is asked for; it is no part of the model, so
    `model.to(dtype)` and `state_dict()` leave it alone."""

    def __init__(self, values, device):
        self.copies = {torch.device("cpu"): values}
        if device.type != "meta":
            self.on(device)

    def on(self, device):
        found = self.copies.get(device)
        if found is None:
            # One made under inference_mode could not take part in a gradient later.
            with torch.inference_mode(False):
                found = self.copies[torch.device("cpu")].to(device)
            self.copies[device] = found
        return found


def circulant(n, cutoff):
    """F^-1 diag(exp(-d^2 / 2 D0^2)) F for one axis: (n, n) f32, real, symmetric, circulant. Row 0
    of the mask's spectrum (d = 0) is 1, so every row sums to 1."""
    d = torch.arange(-(n // 2), n - n // 2, dtype=torch.float64, device="cpu")
    j = torch.arange(n, dtype=torch.float64, device="cpu")
    mask = torch.exp(-0.5 * (d / cutoff) ** 2)
    waves = torch.cos(2 * math.pi * torch.remainder(torch.outer(j, d), n) / n)
    kernel = (waves @ mask / n).float()
    i = torch.arange(n, device="cpu")
    return kernel[(i[:, None] - i[None, :]).abs()]


class Gif:
    """The Gaussian Input Filter, G_h X G_w^T, as a pre-hook on the module that takes the picture.

    Hosts hand over (x - mean) / std instead of x. The filter is linear and keeps constants (rows
    sum to 1), and mean and std are constant per channel, so filtering the normalised picture gives
    the same as normalising the filtered one.
    """

    def __init__(self, height, width, cutoff, device):
        self.size = (height, width)
        self.rows = _Constant(circulant(height, cutoff), device)
        self.columns = _Constant(circulant(width, cutoff), device)

    def filter(self, pixels):
        """Filters (B, C, H, W) in f32 (f64 stays f64) and gives back the dtype it came in."""
        if pixels.dim() != 4 or tuple(pixels.shape[-2:]) != self.size:
            raise ValueError(
                f"pixels: expected shape (B, C, {self.size[0]}, {self.size[1]}), found {tuple(pixels.shape)}"
            )
        work = torch.float64 if pixels.dtype == torch.float64 else torch.float32
        with torch.autocast(pixels.device.type, enabled=False):
            rows = self.rows.on(pixels.device).to(work)
            columns = self.columns.on(pixels.device).to(work)
            # Both are symmetric, so neither needs transposing.
            filtered = rows @ pixels.to(work) @ columns
        return filtered.to(pixels.dtype)

    def __call__(self, module, args, kwargs):
        if args:
            return (self.filter(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "pixel_values": self.filter(kwargs["pixel_values"])}


class Fra:
    """The Fixed Robustness Anchor, h -> alpha A + beta h, as a forward hook on the first block's
    attention module, after its output projection and before the residual addition."""

    def __init__(self, values, alpha, beta, tokens, device):
        self.anchor = _Constant(values, device)
        self.alpha, self.beta, self.tokens = alpha, beta, tokens

    def mix(self, h):
        """Mixes (B, N, D), or (N, B, D) where tokens come first; gives back its dtype."""
        anchor = self.anchor.on(h.device)
        if h.dim() != 3 or (h.shape[self.tokens], h.shape[2]) != tuple(anchor.shape):
            raise AnchorMismatch(
                f"the first attention gives shape {tuple(h.shape)}, the anchor has {tuple(anchor.shape)}"
            )
        added = (self.alpha * anchor).to(h.dtype).unsqueeze(1 - self.tokens)
        if self.beta == 0:
            return added.expand_as(h).contiguous()
        return h * self.beta + added

    def __call__(self, module, args, output):
        if isinstance(output, tuple):
            return (self.mix(output[0]), *output[1:])
        return self.mix(output)


class Anchor:
    """An anchor file of version 1: `values` (N, D) f32 on the CPU, and `meta` with its `radapt.`
    keys, the prefix dropped."""

    def __init__(self, path):
        self.path = Path(path)
        with safe_open(self.path, framework="pt", device="cpu") as file:
            meta = file.metadata() or {}
            self.meta = {k[len("radapt.") :]: v for k, v in meta.items() if k.startswith("radapt.")}
            if self.meta.get("version") != "1":
                found = self.meta.get("version", "none")
                raise ValueError(f"{self.path}: radapt.version: expected 1, found {found}")
            missing = {"fingerprint", "base_model", "grid", "alpha", "beta", "cutoff"} - set(self.meta)
            if missing:
                raise ValueError(f"{self.path}: its metadata has no radapt.{sorted(missing)[0]}")
            self.values = file.get_tensor("anchor")
        if self.values.dtype != torch.float32 or not bool(torch.isfinite(self.values).all()):
            raise ValueError(f"{self.path}: expected finite float32, found {self.values.dtype}")
        rows, columns = self.meta["grid"].split("x")
        self.grid = (int(rows), int(columns))

    def setting(self, name, given, used):
        """A number: as given, else as the file recommends; None where its part is not used."""
        if not used:
            if given is not None:
                raise ValueError(f"{name}: expected the part it belongs to, found it left out")
            return None
        value = float(self.meta[name] if given is None else given)
        positive = name == "cutoff"
        # Finite in f32, which it is multiplied in; a NaN is not within either.
        if not abs(value) <= torch.finfo(torch.float32).max or positive and value <= 0:
            raise ValueError(f"{name}: expected a {'positive' if positive else 'finite'} number, found {value}")
        return value

    def check_shape(self, tower):
        """Raises unless the anchor has a row per token of the tower, of its width."""
        needed = (tower.grid[0] * tower.grid[1] + 1, tower.hidden)
        if tuple(self.values.shape) != needed or self.grid != tuple(tower.grid):
            raise AnchorMismatch(
                f"{self.path}: the anchor has shape {tuple(self.values.shape)} for {self.meta['grid']} patches of "
                f"`{self.meta['base_model']}`, the tower needs {needed} for {tower.grid[0]}x{tower.grid[1]}"
            )

    def check_fingerprint(self, tower):
        """Raises unless the tower holds the weights that the anchor was made on."""
        note = ""
        try:
            trunk = tower.trunk()
            found = fingerprint(trunk)
            if any(tensor.dtype == torch.bfloat16 for _, tensor in trunk):
                note = "; its weights are held in bfloat16, which rounds them (load in float16 or float32)"
        except NotComparable as reason:
            found, note = "none", f": {reason}"
        if found != self.meta["fingerprint"]:
            raise AnchorMismatch(
                f"{self.path}: the anchor was made on a tower with fingerprint {self.meta['fingerprint'][:12]}... "
                f"(`{self.meta['base_model']}`), this one has {found[:12]}{note}. "
                "`radapt anchor check` compares stored weights; allow_mismatch=True uses the anchor all the same"
            )


class NotComparable(ValueError):
    """The tower's weights are not there as the checkpoint has them."""


def fingerprint(trunk):
    """SHA-256 over names and values, as `radapt` does: each name, a zero byte, and the values
    rounded to f16, as little-endian f32."""
    digest = hashlib.sha256()
    for name, tensor in trunk:
        if not tensor.is_floating_point() or tensor.device.type == "meta":
            raise NotComparable(f"`{name}` is held as {tensor.dtype} on {tensor.device}")
        values = tensor.detach().to("cpu", torch.float32).to(torch.float16).float().contiguous()
        digest.update(name.encode() + b"\0")
        # numpy() would do, but numpy is no dependency of torch.
        digest.update(ctypes.string_at(values.data_ptr(), 4 * values.numel()))
    return digest.hexdigest()


def layer(name, module):
    return [(f"{name}.weight", module.weight), (f"{name}.bias", module.bias)]


def only_tower(model, is_tower, kind):
    """The one module of `model` that is a tower."""
    compiled = lambda module: type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None)
    # torch.compile's wrapper answers for what it wraps.
    found = [(name, m) for name, m in model.named_modules() if type(m).__name__ != "OptimizedModule" and is_tower(m)]
    if len(found) != 1:
        names = ", ".join(name or "the model itself" for name, _ in found) or "none"
        raise ValueError(f"expected one {kind} in {type(model).__name__}, found: {names}")
    [(path, tower)] = found
    above = [module for name, module in model.named_modules() if f"{path}.".startswith(f"{name}.") or not name]
    for module in [*above, *tower.modules()]:
        # What is compiled does not look for new hooks.
        if compiled(module):
            raise ValueError(f"{type(module).__name__} is compiled already: attach before torch.compile")
    return tower


class Defense:
    """GIF and FRA in a tower. `remove()` takes them out again, as leaving a `with` block does.
    `alpha`, `beta` (None without FRA) and `cutoff` (None without GIF) are what is in use."""

    def __init__(self, tower, anchor, alpha, beta, cutoff, gif, fra):
        if getattr(tower.attention, "_radapt", None) is not None:
            raise ValueError("this tower has a defence already: remove() it first")
        self.tower, self.anchor, self.hooks = tower, anchor, []
        self.alpha = anchor.setting("alpha", alpha, fra)
        self.beta = anchor.setting("beta", beta, fra)
        self.cutoff = anchor.setting("cutoff", cutoff, gif)
        device = next(tower.module.parameters()).device
        with torch.inference_mode(False):
            if gif:
                filter = Gif(*tower.size, self.cutoff, device)
                self.hooks.append(tower.entry.register_forward_pre_hook(filter, with_kwargs=True))
            if fra:
                mix = Fra(anchor.values, self.alpha, self.beta, tower.tokens, device)
                self.hooks.append(tower.attention.register_forward_hook(mix))
        tower.attention._radapt = True

    def remove(self):
        """Takes the hooks out. A model compiled with them keeps them."""
        for hook in self.hooks:
            hook.remove()
        if self.hooks:
            self.tower.attention._radapt = None
        self.hooks = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.remove()

    def __repr__(self):
        return f"Defense(alpha={self.alpha}, beta={self.beta}, cutoff={self.cutoff}, anchor={self.anchor.path.name!r})"


def attach(
    model, anchor=None, *, alpha=None, beta=None, cutoff=None, gif=True, fra=True, allow_mismatch=False
):
    """Puts GIF and FRA into the vision tower of a loaded `model`, whose weights stay as they are.

    anchor          an anchor file; `anchor.safetensors` beside this file where not given
    alpha, beta     the anchor's and the attention output's factor, instead of the anchor's own
    cutoff          GIF's cutoff D0 in frequency bins of the tower's picture, instead of the anchor's own
    gif, fra        False leaves that part out
    allow_mismatch  accept an anchor made on another tower of the same shape

    Gives back a `Defense`. Gradients go through both parts, so an attack on the defended model is
    adaptive. Attach before torch.compile.
    """
    tower = find_tower(model)
    anchor = Anchor(anchor if anchor is not None else Path(__file__).with_name("anchor.safetensors"))
    anchor.check_shape(tower)
    if not allow_mismatch:
        anchor.check_fingerprint(tower)
    return Defense(tower, anchor, alpha, beta, cutoff, gif, fra)
