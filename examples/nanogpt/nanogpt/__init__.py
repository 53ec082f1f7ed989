"""A GPT in the style of nanoGPT that trains on Everstep."""
