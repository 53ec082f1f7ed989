"""Protection of a run: private folders, secrets, and trust in what other users wrote."""
