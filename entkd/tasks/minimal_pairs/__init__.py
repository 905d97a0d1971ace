"""Acceptability pairs from a grammar of our own, in BLiMP's format."""
