"""Distributions of label sequences: linear-chain conditional random fields and hidden Markov models."""
