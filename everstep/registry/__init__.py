"""Registry of models in a folder or bucket: versions, and aliases that point to them."""
