"""Incremental evaluation of MADE in panels of sites, and its reverse sweep."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

PANEL = 16  # sites between two products with the whole finished prefix; 8 to 32 are equally fast


class _Panel(NamedTuple):
    """Views of the buffers for the degrees of a panel; splitting once per panel is faster than slicing at each site."""

    start: int
    inputs: Sequence[Tensor]  # (B, width) per degree
    layers: list[tuple[Sequence[Tensor], list[tuple[Sequence[Tensor], Tensor]]]]  # units and [(weights, source)]
    phi: Sequence[Tensor]  # (B, 1, P) per degree


class MADEState(NamedTuple):
    """State of an incremental evaluation of :class:`MADE`; its tensors are feature-major, (units, B).

    Attributes:
        position: number of sites read so far.
        version: list with the number of sites that the latest state of this evaluation has read.
        weights: the masked weight of each link.
        offsets: the contribution of context and bias to each layer.
        units: inputs, units of each hidden layer, outputs. If ``in_place``, buffers of full size, which hold partial
            sums until a unit is activated; otherwise the finished units only.
        panel: views of the buffers for the current panel of sites, if ``in_place``.
        in_place: whether the buffers are written in place.
        native: whether they are written by the native operator; their rows are then padded.
    """

    position: int
    version: list[int]
    weights: tuple[Tensor, ...]
    offsets: tuple[Tensor, ...]
    units: tuple[Tensor, ...]
    panel: Any
    in_place: bool
    native: bool = False


class Sweeps:
    """The units of a masked network by level (inputs, hidden layers, outputs), each level sorted by degree.

    Args:
        degrees: the degrees of the units of each level; inputs have the degree of the site that follows.
        num_sites: T, the number of sites.
        num_params: P, the number of parameters per site.
        direct: whether the last weight links inputs to outputs.

    Attributes:
        links: triples (level, level that it reads, index of the weight), from inputs to outputs.
        ends: (levels, T + 1), the number of units of each level with a degree below each d.
    """

    def __init__(self, degrees: Sequence[Sequence[int]], num_sites: int, num_params: int, direct: bool) -> None:
        self.num_sites, self.num_params = num_sites, num_params
        # the units of a level with degree below d are its first _ends[level][d]
        self._ends = [[bisect_left(level, d) for d in range(num_sites + 1)] for level in degrees]
        self.ends = torch.tensor(self._ends, device="cpu")
        self._sizes = [[high - low for low, high in pairwise(ends)] for ends in self._ends]
        last = len(degrees) - 1
        self.links = [(level + 1, level, level) for level in range(last)] + ([(last, 0, last)] if direct else [])

    def is_dense(self, link: int, mask: Tensor) -> bool:
        """Returns whether by the mask of a link, each unit reads all lower units of its degree or a smaller one."""
        above, below = (
            torch.arange(self.num_sites, device="cpu").repeat_interleave(torch.tensor(self._sizes[level], device="cpu"))
            for level in self.links[link][:2]
        )
        return torch.equal(mask[:, : len(below)], (below <= above.unsqueeze(1)).to(mask))

    def finish(
        self, low: int, high: int, state: MADEState, inputs: Tensor, activate: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, MADEState]:
        """Returns the outputs (B, high - low, P) of degrees low ... high - 1, given their new inputs (B, features)."""
        units = list(state.units)
        units[0] = torch.cat([units[0], inputs.t()])
        for top, offset in enumerate(state.offsets, start=1):
            rows = self._units(top, low, high)
            total = offset[rows]
            for level, source, weight in self.links:
                if level == top:
                    total = total + state.weights[weight][rows, : len(units[source])] @ units[source]
            new = activate(total) if top < len(state.offsets) else total
            units[top] = torch.cat([units[top], new])
        return self._by_batch(total), state._replace(units=tuple(units))

    def finish_in_place(
        self, low: int, high: int, state: MADEState, inputs: Tensor, activate: Callable[[Tensor], Any]
    ) -> tuple[Tensor, MADEState]:
        """As :meth:`finish`, but in the buffers of the state, with an activation that works in place."""
        phis = []
        news = [inputs] if high - low == 1 else inputs.split(self._sizes[0][low:high], 1)
        for degree, new in enumerate(news, start=low):
            start = degree - degree % PANEL
            if state.panel is None or state.panel.start != start:
                state = self._enter(start, state, fresh=degree == start)
            panel, i = state.panel, degree - start
            panel.inputs[i].copy_(new)
            last = len(panel.layers) - 1
            for level, (units, links) in enumerate(panel.layers):
                for weights, source in links:  # masks exclude unfinished units
                    units[i].addmm_(weights[i], source)
                if level < last:
                    activate(units[i])
            phis.append(panel.phi[i])
        return phis[0] if len(phis) == 1 else torch.cat(phis, 1), state

    def reverse(
        self, state: MADEState, slopes: list[Tensor], gain: Tensor, drive: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Solves the transposed triangular system of :meth:`MADE.adjoint`, from the last panel to the first.

        Args:
            state: the last state of an evaluation in place.
            slopes: the cotangent of the sites (B, T, k), then the derivatives of each hidden layer's activations
                (units, B).
            gain: (B, T, k, P).
            drive: (B, T, P).

        Returns:
            Gradients of the inputs (T * k, B), and a list with the gradients of the pre-activations of each level.
        """
        T, P, k, last = self.num_sites, self.num_params, gain.shape[2], len(slopes)
        # by level, from inputs to outputs: gradients of the units and of their pre-activations
        of_units = [_feature_major(slopes[0]), *(torch.zeros_like(slope) for slope in slopes[1:])]
        of_pre = [slopes[0], *(torch.zeros_like(slope) for slope in slopes[1:]), _feature_major(drive)]
        gains = gain.permute(2, 1, 3, 0).reshape(k, T * P, len(gain))
        of_sites = of_units[0].split(1)
        for start in range((T - 1) // PANEL * PANEL, -1, -PANEL):
            stop = min(start + PANEL, T)
            pulls: list[list[Any]] = [[] for _ in range(last)]  # by level: (weights by degree, gradients above)
            for level, source, weight in self.links:
                later, rows = self._units(level, stop, T), self._units(level, start, stop)
                columns = self._units(source, start, stop)  # contributions of all later degrees to the panel, at once
                of_units[source][columns].addmm_(state.weights[weight][later, columns].t(), of_pre[level][later])
                pulls[source].append(
                    (self._cut(source, state.weights[weight][rows].t(), start, stop), of_pre[level][rows])
                )
            units = [self._cut(level, tensor, start, stop) for level, tensor in enumerate(of_units)]
            hidden = [
                [self._cut(level, tensors[level], start, stop) for tensors in (slopes, of_pre)]
                for level in range(1, last)
            ]
            of_phi = self._cut(last, of_pre[last], start, stop)
            gain_cuts = [self._cut(last, of_site, start, stop) for of_site in gains]
            for i in range(stop - start - 1, -1, -1):
                for j, cuts in enumerate(gain_cuts):
                    of_phi[i].addcmul_(cuts[i], of_sites[(start + i) * k + j])
                for level in range(last - 1, -1, -1):
                    for weights, above in pulls[level]:
                        units[level][i].addmm_(weights[i], above)
                    if level:
                        slope, pre = hidden[level - 1]
                        torch.mul(units[level][i], slope[i], out=pre[i])
        return of_units[0], of_pre

    def _enter(self, start: int, state: MADEState, fresh: bool) -> MADEState:
        """Opens a panel of sites; a new panel receives the contributions of the finished prefix to all its units."""
        for level, source, weight in self.links if fresh else ():
            rows, columns = self._units(level, start, start + PANEL), self._units(source, 0, start)
            state.units[level][rows].addmm_(state.weights[weight][rows, columns], state.units[source][columns])
        return state._replace(panel=self._open(start, state))

    def _by_batch(self, outputs: Tensor) -> Tensor:
        """Reshapes (S * P, B) to (B, S, P)."""
        return outputs.unflatten(0, (-1, self.num_params)).permute(2, 0, 1)

    def _open(self, start: int, state: MADEState) -> _Panel:
        stop, last = start + PANEL, len(state.units) - 1
        layers = []
        for top in range(1, last + 1):
            links = [
                (self._cut(top, state.weights[weight][:, columns], start, stop), state.units[source][columns])
                for level, source, weight in self.links
                if level == top
                for columns in [self._units(source, start, stop)]
            ]
            layers.append((self._cut(top, state.units[top], start, stop), links))
        inputs = state.units[0][self._units(0, start, stop)].t().split(self._sizes[0][start:stop], 1)
        phi = self._by_batch(state.units[last][self._units(last, start, stop)]).split(1, 1)
        return _Panel(start, inputs, layers, phi)

    def _cut(self, level: int, tensor: Tensor, start: int, stop: int) -> Sequence[Tensor]:
        """Splits the rows of a level by degree; this is faster than slicing at each site."""
        return tensor[self._units(level, start, stop)].split(self._sizes[level][start:stop])

    def _units(self, level: int, low: int, high: int) -> slice:
        """Returns the slice of the units of a level with degrees low ... high - 1."""
        ends = self._ends[level]
        return slice(ends[low], ends[min(high, self.num_sites)])


def _feature_major(x: Tensor) -> Tensor:
    """Copies (B, T, n) to (T * n, B)."""
    return x.permute(1, 2, 0).flatten(0, 1).clone(memory_format=torch.contiguous_format)
