"""Write a small BERT with random weights where a pretrained one would be: python -m bert_lora.base data/base."""

import sys

import torch
from transformers import BertConfig, BertForSequenceClassification

from bert_lora.data import LONGEST, VOCABULARY


def base() -> BertForSequenceClassification:
    """Return the model, always with the same weights."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=LONGEST,
        num_labels=2,
        initializer_range=0.15,  # at the usual 0.02 a width of 48 passes almost nothing on
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


if __name__ == "__main__":
    base().save_pretrained(sys.argv[1])
