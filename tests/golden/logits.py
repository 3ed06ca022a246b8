#!/usr/bin/env python3
"""Writes smollm2-logits.json: what Hugging Face transformers, in float32, makes of the texts in smollm2-public.json.

    python3 tests/golden/logits.py ~/.cache/tandem/models/smollm2-135m-instruct > tests/golden/smollm2-logits.json

Needs torch and transformers. Of each text's last token: the 32 largest logits and 96 others, spread over the vocabulary.
"""

import json
import pathlib
import sys

import torch
import transformers

FOLDER = pathlib.Path(__file__).parent
TOKENS = 200


def main():
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    rows = []
    for row in json.loads((FOLDER / "smollm2-public.json").read_text())["rows"]:
        tokens = (row["prompt_ids"] + row["output_ids"])[:TOKENS]
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1].double()
        spread = range(7, len(logits), len(logits) // 96)
        ids = sorted({*logits.topk(32).indices.tolist(), *spread})
        rows.append({"id": row["id"], "tokens": len(tokens), "ids": ids, "logits": [round(float(logits[i]), 5) for i in ids]})
    reference = f"transformers {transformers.__version__}, torch {torch.__version__}, float32"
    print(json.dumps({"reference": reference, "rows": rows}))


if __name__ == "__main__":
    main()
