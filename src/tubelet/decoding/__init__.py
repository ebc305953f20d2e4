"""Tokens out of networks that predict distributions over words: how to choose, in which order."""
