"""Docstrings and bodies of functions in the standard library: real texts of any length, without a download."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

PACKAGES = ("asyncio", "email", "importlib", "unittest")
VOCABULARY, LONGEST = 1000, 32
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def texts() -> Iterator[tuple[str, str, int]]:
    """Yield file, text, and 1 for prose or 0 for code: each function that has a docstring gives one of both."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(path for package in PACKAGES for path in (root / package).glob("*.py")):
        name = str(path.relative_to(root))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
                prose = ast.get_docstring(node)
                if prose:
                    yield name, prose, 1
                    yield name, "\n".join(map(ast.unparse, node.body[1:])), 0


def tokenizer() -> Tokenizer:
    """Return a WordPiece tokenizer of the texts, as BERT has one."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    made.train_from_iterator((text for _, text, _ in texts()), trainer)
    ends = [(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    made.enable_truncation(LONGEST)
    return made


def rows() -> Iterator[dict[str, object]]:
    """Yield token ids of any length with their label; `file` decides which side a text falls to."""
    made = tokenizer()
    for file, text, label in texts():
        yield {"input_ids": made.encode(text).ids, "label": label, "file": file}
