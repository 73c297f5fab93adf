"""The base model: loaded, given adapter slots, trained and evaluated."""
