"""Writes the cards of the built-in anchors into README.md beside this file, from what the anchors say of themselves.

    python anchors/cards.py
"""

import json
import struct
from pathlib import Path

HERE = Path(__file__).parent
MARK = "<!-- cards.py writes what follows -->\n"


def metadata(path):
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        meta = json.loads(file.read(size))["__metadata__"]
    return {key.removeprefix("radapt."): value for key, value in meta.items()}


def card(name, meta):
    attack = json.loads(meta["attack"])
    steps = f", {attack['settings']['steps']} steps" if attack["settings"].get("steps") else ""
    examples = {
        "static": f"crafted once on the undefended `{'pocket-clip' if meta['objective'] == 'ce' else 'pocket'}`",
        "adaptive": "crafted in every epoch against the anchor as it stands",
    }[meta["examples"]]
    optimizer = json.loads(meta["optimizer"])
    lines = [
        f"## `{name}`\n",
        f"R-Adapt+ on `pocket` (`pocket-clip`) at eps {meta['eps']}: {meta['images']} training pictures, {attack['name']}{steps}, "
        f"{examples}; {meta['epochs']} epochs, of which epoch {meta['best_epoch']} is kept; batches of {meta['batch']}, "
        f"{optimizer['name']} at {optimizer['rate']}, {meta['schedule']}; {meta['clean_share']} of the loss on clean pictures; "
        f"alpha {meta['alpha']}, beta {meta['beta']}, GIF at {float(meta['cutoff']):.2f} bins of {meta['image_size']}; seed {meta['seed']}.\n",
        "| right of pictures that had no part in the training, % (95 % interval) | undefended | GIF | GIF and this anchor |",
        "|---|---|---|---|",
    ]
    rows = json.loads(meta["validation"])
    if meta["objective"] == "embedding":
        lines[1] = lines[1].replace("R-Adapt+ on `pocket` (`pocket-clip`)", "R-Adapt+ on `pocket`, by what the LLaVA reads")
        lines[2] = lines[2].replace("right of pictures that had no part in the training, % (95 % interval)", "squared distance from the undefended model's clean features, over their squared length")

    def cell(defense, threat):
        (row,) = [row for row in rows if row["defense"] == defense and row["threat"] == threat]
        if meta["objective"] == "embedding":
            return f"{row['value']:.3f}"
        return f"{row['value']:.1f} ({row['low']:.1f} to {row['high']:.1f})"

    attacked = next(row for row in rows if row["threat"])
    n = rows[0]["n"]
    for threat in (None, "transfer", "adaptive"):
        what = f"{attacked['attack']} {attacked['eps']}, `{threat}`" if threat else "clean"
        cells = " | ".join(cell(defense, threat) for defense in ("none", "gif", "gif+fra"))
        lines.append(f"| {what}, n = {n} | {cells} |")
    return "\n".join(lines) + "\n"


def main():
    readme = HERE / "README.md"
    text = readme.read_text()
    head = text.split(MARK)[0]
    order = {("ce", "static"): 0, ("ce", "adaptive"): 1, ("embedding", "static"): 2}
    found = []
    for path in HERE.glob("*.safetensors"):
        meta = metadata(path)
        if meta["method"] == "data-driven":
            found.append((order[meta["objective"], meta["examples"]], float(meta["eps"].split("/")[0]), path.stem, meta))
    cards = [card(name, meta) for _, _, name, meta in sorted(found, key=lambda item: item[:3])]
    readme.write_text(head + MARK + "\n" + "\n".join(cards))


main()
