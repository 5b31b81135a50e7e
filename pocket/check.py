"""Compares the pocket models in transformers with what radapt says of the same pictures.

    cargo build --release
    python pocket/check.py target/release/radapt          # torch 2.15, transformers 5.23, pillow 13
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from PIL import Image
from transformers import AutoProcessor, CLIPModel, CLIPProcessor, LlavaForConditionalGeneration

radapt, here = sys.argv[1], pathlib.Path(__file__).parent
folder = pathlib.Path(tempfile.mkdtemp()) / "pictures"
subprocess.run([radapt, "-q", "pocket", "draw", "--n", "40", "--out", folder], check=True, stdout=subprocess.DEVNULL)
classes = (folder / "classnames.txt").read_text().split("\n")[:26]
names, labels = zip(*(line.split("\t") for line in (folder / "labels.tsv").read_text().split("\n") if line))
paths = [folder / "images" / pathlib.Path(name).name for name in names]
pictures = [Image.open(path) for path in paths]

clip = CLIPModel.from_pretrained(here / "clip", dtype=torch.float32)
processor = CLIPProcessor.from_pretrained(here / "clip")
prompts = [f"a photo of a {name}." for name in classes]
with torch.no_grad():
    out = clip(**processor(text=prompts, images=pictures, return_tensors="pt", padding=True))
right = (out.logits_per_image.argmax(1) == torch.tensor([int(label) for label in labels])).sum().item()
print(f"transformers' zero-shot head names {right} of {len(pictures)} pictures")

llava = LlavaForConditionalGeneration.from_pretrained(here / "llava", dtype=torch.float32)
processor = AutoProcessor.from_pretrained(here / "llava")
asked = json.loads((folder / "pocket_vqa_main.json").read_text())
same = total = 0
for path, picture, row in list(zip(paths, pictures, asked))[:8]:
    for question in ["Describe the image briefly in one sentence.", row["vqa"][1]]:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=text, images=picture, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            tokens = llava.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
        theirs = processor.tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        chat = [radapt, "-q", "chat", "--anchor", "none", "--image", path, question]
        ours = subprocess.run(chat, check=True, capture_output=True, text=True).stdout
        total += 1
        same += theirs.strip() == ours.strip()
print(f"{same} of {total} answers are the same")
