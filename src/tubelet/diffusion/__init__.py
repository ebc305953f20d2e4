"""Noise paths, prediction objectives, solvers and guidance: the maths between a network's output and a finished sample."""
