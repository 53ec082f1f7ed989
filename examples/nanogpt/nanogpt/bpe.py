"""Train a byte-level BPE on the standard library: python -m nanogpt.bpe data/bpe.json [VOCABULARY]."""

import sys
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def train(vocabulary: int) -> Tokenizer:
    """Return a tokenizer of the modules in the standard library's own folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],  # `everstep data prepare` writes it after each document
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py"))
    tokenizer.train([str(path) for path in sources], trainer)
    return tokenizer


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    train(int(sys.argv[2]) if len(sys.argv) > 2 else 1024).save(str(path))
