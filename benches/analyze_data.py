"""The pictures that the README's `radapt analyze replace` is over, as image folders CLASS/*: DATA OUT.

    python3 benches/analyze_data.py ../shared/data OUT

OUT/ood        photographs of ImageNet's kinds that belong to CIFAR-10's ten classes, of DATA/photos/0.tar
OUT/test-five  CIFAR-10's test pictures (the first 3,000) of airplane, bird, deer, frog and ship
OUT/test-other those of the other five classes
Needs numpy and Pillow.
"""

import pathlib
import sys
import tarfile

import numpy as np
from PIL import Image

data, out = map(pathlib.Path, sys.argv[1:])
KINDS = {
    "airplane": ["airliner", "military aircraft", "warplane", "wing"],
    "automobile": ["beach wagon", "station wagon", "cab", "taxicab", "convertible", "jeep", "limousine", "minivan", "Model T",
                   "Ford Model T", "race car", "racer", "sports car", "ambulance"],
    "bird": range(7, 25),
    "cat": range(281, 286),
    "deer": ["hartebeest", "impala", "gazelle", "impala (antelope)"],
    "dog": range(151, 269),
    "frog": ["bullfrog", "American bullfrog", "tree frog", "tailed frog"],
    "horse": ["sorrel", "common sorrel horse"],
    "ship": ["container ship", "liner", "ocean liner", "aircraft carrier", "fireboat", "pirate", "pirate ship", "schooner",
             "trimaran", "speedboat", "wreck", "shipwreck", "catamaran", "lifeboat", "yawl", "submarine"],
    "truck": ["fire engine", "fire truck", "garbage truck", "pickup", "pickup truck", "tow truck", "trailer truck",
              "semi-trailer truck", "moving van", "police van"],
}
names = (data / "photos/classnames.txt").read_text().splitlines()
names = [name.strip() for name in names]
with tarfile.open(data / "photos/0.tar") as tar:
    members = {member.name: member for member in tar.getmembers()}
    of_kind = {}
    for name in members:
        if name.endswith(".cls"):
            of_kind.setdefault(int(tar.extractfile(members[name]).read()), name[:-4])
    count = 0
    for label, kinds in KINDS.items():
        numbers = [i for i, name in enumerate(names) if name in kinds] if isinstance(kinds, list) else list(kinds)
        (out / "ood" / label).mkdir(parents=True, exist_ok=True)
        for number in numbers[:20]:
            if number in of_kind:
                bytes_ = tar.extractfile(members[of_kind[number] + ".jpg"]).read()
                (out / "ood" / label / f"{number:04}.jpg").write_bytes(bytes_)
                count += 1
print(f"{count} photographs")

records = np.fromfile(data / "cifar10/test_batch.bin", dtype=np.uint8).reshape(-1, 3073)
labels = (data / "cifar10/batches.meta.txt").read_text().split()
for i, record in enumerate(records[:3000]):
    label = labels[record[0]]
    folder = out / ("test-five" if label in {"airplane", "bird", "deer", "frog", "ship"} else "test-other") / label
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0)).save(folder / f"{i:05}.png")
