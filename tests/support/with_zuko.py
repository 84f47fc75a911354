"""zuko, without what its import does to torch: it switches validation off for all distributions, and renames a class."""

from __future__ import annotations

import torch

_base, _inverse = torch.distributions.Distribution, torch.distributions.transforms._InverseTransform
_before = _base._validate_args, _base.arg_constraints, _inverse.__name__
import zuko  # noqa: E402

_base._validate_args, _base.arg_constraints, _inverse.__name__ = _before

__all__ = ["zuko"]
