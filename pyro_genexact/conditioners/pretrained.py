"""Pretrained: a causal language model of Hugging Face's ``transformers`` as a conditioner."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import Conditioner
from ..contexts import check_context
from ..core.checks import check_kind
from ..core.rows import take_rows
from .checks import check_chunk, check_sites
from .encoding import labels_of

_CACHES = ("cache", "past_key_values", "cache_params", "state")  # argument names of the cache, by version and model
_GROWING = ("DynamicLayer", "DynamicSlidingWindowLayer")  # cache layers that never write to their tensors in place


class PretrainedState(NamedTuple):
    """State of a :class:`Pretrained` conditioner.

    Attributes:
        position: number of sites read so far.
        version: list with the number of sites that the latest state of this evaluation has read.
        rows: B, the number of rows.
        cache: the model's cache of ``bos`` and the sites read, under its argument name.
        picked: (B,), the rows of the cache that belong to this state, gathered at the next read; None for all.
    """

    position: int
    version: list[int]
    rows: int
    cache: dict[str, Any]
    picked: Tensor | None = None


class Pretrained(Conditioner):
    """Causal language model of Hugging Face's ``transformers``: its tokens are the sites and its logits are phi.

        phi_t = logits(bos, y_1, ..., y_{t-1})

    With ``heads.Categorical(V)`` the probabilities are those of the model. ``model`` is a submodule: training this
    module trains its weights, and its dropout follows its training mode.

    Cost: ``forward`` is one call of the model on T tokens. ``extend`` is one call on the new tokens with the model's
    cache. If that cache is a recurrent state (Mamba), ``extend`` makes one call per token; autograd may not support
    these.

    Args:
        model: an instance of ``AutoModelForCausalLM`` or of a similar class, with V tokens.
        bos: the token before the first site; it is not a site.

    Raises:
        ImportError: if ``transformers`` is not installed.
        TypeError: if ``model`` is not a model of ``transformers``, or ``bos`` is not an integer.
        ValueError: if the model is not a causal language model, or ``bos`` is outside 0 ... V-1. In calls, for tokens
            out of range, for more sites than the configuration's ``max_position_embeddings`` (``max_len``), and for a
            model that returns no cache, for example because of gradient checkpointing.

    Reference: Wolf et al., "Transformers: state-of-the-art natural language processing", EMNLP 2020.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(
        ...     vocab_size=9, n_positions=32, n_embd=8, n_layer=1, n_head=2,
        ...     bos_token_id=0, eos_token_id=1,
        ... )
        >>> net = Pretrained(GPT2LMHeadModel(config).eval(), bos=0)
        >>> net(torch.zeros(7, 5, dtype=torch.long)).shape
        torch.Size([7, 5, 9])
    """

    def __init__(self, model: Any, bos: int) -> None:
        super().__init__()
        try:
            from transformers import PreTrainedModel
        except ImportError as error:
            raise ImportError(
                "Pretrained requires the package transformers; pip install 'pyro-genexact[transformers]'."
            ) from error
        check_kind("model", model, PreTrainedModel)
        if model.config.is_encoder_decoder or not model.can_generate():
            raise ValueError(f"Expected a causal language model (AutoModelForCausalLM); got {type(model).__name__}.")
        config = model.config.get_text_config()
        self.site = self.num_params = config.vocab_size
        self.max_len = getattr(config, "max_position_embeddings", None)
        check_kind("bos", bos, int)
        if not 0 <= bos < config.vocab_size:
            raise ValueError(f"Expected bos between 0 and {config.vocab_size - 1} (tokens of the model); got {bos}.")
        self.model, self.bos = model, bos

    def extra_repr(self) -> str:
        return f"bos={self.bos}"

    def forward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Maps tokens y (B, T) to logits (B, T, V) by one call of the model."""
        check_sites(self, y)
        check_context(self, context)
        tokens = torch.cat([self._begin(y.shape[0]), labels_of(y[:, :-1], self.num_params)], 1)
        return _numbers(self.model(tokens, use_cache=False, return_dict=True).logits)

    def start(self, context: Tensor | None, batch_size: int) -> tuple[Tensor, PretrainedState]:
        """Returns the logits (B, V) of the first site and the state after ``bos``."""
        check_context(self, context)
        phi, cache = self._read(self._begin(batch_size), {})
        return phi.squeeze(1), PretrainedState(0, self.new_version(), batch_size, cache)

    def extend(self, y: Tensor, state: PretrainedState) -> tuple[Tensor, PretrainedState]:
        """Reads tokens y (B, S); returns the logits (B, S, V) of the sites that follow."""
        check_chunk(self, y, state.position, state.rows)
        tokens = labels_of(y, self.num_params)
        state, cache, phis = self.advance(state, y.shape[1]), _gathered(state), []
        # some recurrent models are wrong for several tokens after a state, and right for one
        for chunk in tokens.split(1 if getattr(self.model, "_is_stateful", False) else y.shape[1], 1):
            phi, cache = self._read(chunk, cache)
            phis.append(phi)
        return torch.cat(phis, 1), state._replace(cache=cache, picked=None)

    def reorder(self, state: PretrainedState, index: Tensor) -> PretrainedState:
        """Returns a copy of the batch rows ``index`` (B',) of a state."""
        self.advance(state, 0)
        index = index.clone() if state.picked is None else state.picked.index_select(0, index)
        cache = {name: _copied(part) for name, part in state.cache.items()}
        state = state._replace(version=list(state.version), rows=len(index), cache=cache, picked=index)
        # extend gathers the rows layer by layer: half the memory if the original state is gone by then, and faster
        waits = all(
            type(layer).__name__ in _GROWING for part in cache.values() for layer in getattr(part, "layers", [part])
        )
        return state if waits else state._replace(cache=_gathered(state), picked=None)

    def _begin(self, rows: int) -> Tensor:
        return torch.full((rows, 1), self.bos, device=self.model.device)

    def _read(self, tokens: Tensor, cache: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        out = self.model(tokens, use_cache=True, return_dict=True, **cache)
        name = next((name for name in _CACHES if name in out), None)
        if name is None:
            raise ValueError(
                f"Expected model to return its cache (disable gradient checkpointing); got {', '.join(out)} of "
                f"{type(self.model).__name__}."
            )
        return _numbers(out.logits), {name: out[name]}


def _numbers(logits: Tensor) -> Tensor:
    """Casts logits to single precision at least, because log-probabilities are summed."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _gathered(state: PretrainedState) -> dict[str, Any]:
    """Returns the cache of a consumed state, with the state's rows."""
    if state.picked is None:
        return state.cache
    return {name: _select(part, state.picked) for name, part in state.cache.items()}


def _select(cache: Any, index: Tensor) -> Any:
    if not hasattr(cache, "reorder_cache"):
        return take_rows(cache, index)
    cache.reorder_cache(index)
    return cache


def _copied(cache: Any) -> Any:
    """Copies a cache, its layers and containers, but not its tensors, because ``reorder_cache`` replaces them."""
    if isinstance(cache, dict):
        return type(cache)((key, _copied(part)) for key, part in cache.items())
    if isinstance(cache, list):
        return [_copied(part) for part in cache]
    if not hasattr(cache, "reorder_cache"):
        return cache
    new = copy.copy(cache)
    new.__dict__.update({name: _copied(part) for name, part in cache.__dict__.items()})
    return new
