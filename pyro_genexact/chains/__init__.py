"""Chains of labels: linear-chain conditional random fields and hidden Markov models."""
