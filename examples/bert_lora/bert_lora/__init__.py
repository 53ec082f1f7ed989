"""A BERT classifier with LoRA adapters that trains on Everstep."""
