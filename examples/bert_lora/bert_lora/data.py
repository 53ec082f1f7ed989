"""Snippets of the standard library, and the package that each comes from: no download."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

PACKAGES = ("asyncio", "email", "importlib", "unittest")
VOCABULARY, LONGEST, LINES = 1000, 64, 8
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def snippets() -> Iterator[tuple[str, str, int]]:
    """Yield file, text and number of the package, a few lines at a time."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for label, package in enumerate(PACKAGES):
        for path in sorted((root / package).glob("*.py")):
            lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
            for start in range(0, len(lines), LINES):
                yield f"{package}/{path.name}", "\n".join(lines[start : start + LINES]), label


def tokenizer() -> Tokenizer:
    """Return a WordPiece tokenizer of the snippets, as BERT has one."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    made.train_from_iterator((text for _, text, _ in snippets()), trainer)
    ends = [(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    made.enable_truncation(LONGEST)
    return made


def rows() -> Iterator[dict[str, object]]:
    """Yield token ids of any length with their label; `file` decides which side a snippet falls to."""
    made = tokenizer()
    for file, text, label in snippets():
        yield {"input_ids": made.encode(text).ids, "label": label, "file": file}
