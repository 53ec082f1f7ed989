"""Make an adapter folder of peft: python -m bert_lora.adapter data/base WEIGHTS.safetensors FOLDER [RANK]."""

import sys

from safetensors.torch import load_file

from bert_lora.task import with_adapters

if __name__ == "__main__":
    base, weights, folder, *rank = sys.argv[1:]
    model = with_adapters(base, int(rank[0]) if rank else 8)
    unknown = model.load_state_dict(load_file(weights), strict=False).unexpected_keys
    assert not unknown, unknown
    model.save_pretrained(folder)
