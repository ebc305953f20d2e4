"""Tasks: each is `(clean latents, mask, positions)`, one form for training (`masks.py`) and sampling (`given.py`)."""
