"""Language models of transformers as conditioners, against the models themselves and their ``generate``."""

from __future__ import annotations

import copy
import pickle
import sys

import pyro
import pytest
import torch
import transformers
from torch.nn.functional import log_softmax

import pyro_genexact as gx
from pyro_genexact import testing
from pyro_genexact.conditioners import Pretrained
from pyro_genexact.decoding import beam_search, greedy
from pyro_genexact.heads import Categorical
from support.checks import fails

V, BOS, EOS, SITES = 11, 0, 1, 24
ENDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": None}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}
CONFIGS = {
    "GPT-2": lambda **of: transformers.GPT2Config(
        vocab_size=V, n_positions=SITES, n_embd=16, n_layer=2, n_head=2, **of
    ),
    "Llama": lambda **of: transformers.LlamaConfig(
        vocab_size=V, max_position_embeddings=SITES, num_key_value_heads=2, **SIZES, **of
    ),
    "Mistral, a window": lambda **of: transformers.MistralConfig(
        vocab_size=V, num_key_value_heads=2, sliding_window=3, **SIZES, **of
    ),
}


def causal_lm(name, **options):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name](**ENDS, **options)).double().eval()


@pytest.fixture(params=CONFIGS)
def net(request):
    return testing.redraw(Pretrained(causal_lm(request.param), BOS), spread=1.5)


def sequence_model(net, max_len=8):
    return gx.Sequence(net, Categorical(V), eos=EOS, max_len=max_len)


@pytest.mark.parametrize("law", [testing.causality, testing.chunks, testing.reorder, testing.consumption])
def test_laws_of_conditioners(law, net):
    law(net)


def test_nothing_is_made_on_the_default_device():
    net = Pretrained(causal_lm("Llama"), BOS)  # windows of transformers make a tensor there
    y = testing.conditioner_inputs(net)[0]

    def run():
        phi, state = net.start(None, len(y))
        return net(y), phi, net.extend(y[:, :-1], net.reorder(state, torch.arange(len(y), device="cpu")))[0]

    testing.device(run)


def test_phi_is_the_logits_of_the_model(net):
    y = torch.randint(V, (5, 9))
    logits = net.model(torch.cat([torch.full((5, 1), BOS), y], 1)).logits
    assert torch.allclose(net(y), logits[:, :-1], atol=1e-12)


def test_branches_of_branches(net):
    y, first, second = torch.randint(V, (4, 6)), torch.tensor([3, 0, 0]), torch.tensor([1, 2, 0, 1])
    with torch.no_grad():
        _, state = net.extend(y[:, :2], net.start(None, 4)[1])
        index = first.clone()
        branch = net.reorder(state, index)
        index.zero_()  # a state does not lean on what it was given
        twig = net.reorder(branch, second)
        for rows, of in ((slice(None), state), (first, branch), (first[second], twig)):
            phi, after = net.extend(y[rows, 2:4], of)
            assert torch.allclose(phi, net(y)[rows, 3:5], atol=1e-12)
            assert torch.allclose(net.extend(y[rows, 4:5], after)[0], net(y)[rows, 5:], atol=1e-12)


def test_a_recurrent_model_reads_chunks_token_by_token():
    config = transformers.MambaConfig(vocab_size=V, hidden_size=16, state_size=4, num_hidden_layers=2, **ENDS)
    net = testing.redraw(Pretrained(transformers.MambaForCausalLM(config).double().eval(), BOS))
    y, index = torch.randint(V, (4, 7)), torch.tensor([3, 0, 0])
    with torch.no_grad():
        expected, state = net(y), net.start(None, 4)[1]
        first, state = net.extend(y[:, :3], state)
        branch = net.reorder(state, index)
        second, _ = net.extend(y[:, 3:6], state)
        assert torch.allclose(
            torch.cat([first, second], 1), expected[:, 1:], atol=1e-6
        )  # its scan is in single precision
        assert torch.allclose(net.extend(y[index, 3:6], branch)[0], second[index], atol=1e-6)


def test_log_prob_is_minus_the_loss_of_the_model(net):
    y = torch.randint(2, V, (4, 8))
    lengths = torch.tensor([0, 3, 7, 8])
    y[torch.arange(8) >= lengths.unsqueeze(1)] = EOS
    tokens = torch.cat([torch.full((4, 1), BOS), y], 1)
    labels = tokens.masked_fill(torch.arange(9) > lengths.unsqueeze(1) + 1, -100)
    log_prob = sequence_model(net)().log_prob(y)
    for row, target, got in zip(tokens, labels, log_prob, strict=True):
        sites = (target != -100).sum() - 1
        loss = net.model(row[None], labels=target[None]).loss  # in single precision
        assert torch.allclose(got, -loss.double() * sites, rtol=1e-5)
    exact = log_softmax(net.model(tokens).logits[:, :-1], -1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    exact = exact.masked_fill(torch.arange(8) > lengths.unsqueeze(1), 0.0).sum(1)
    assert torch.allclose(log_prob, exact, rtol=1e-12)
    for got, grad in zip(*(torch.autograd.grad(x.sum(), [*net.parameters()]) for x in (log_prob, exact)), strict=True):
        assert got.abs().max() > 1e-6
        assert torch.allclose(got, grad, rtol=1e-9, atol=1e-12)


def test_law_of_sequences():
    """Mass 1 within 1e-10 over all strings, draws by chi-square, prefixes, the termination curve."""
    config = transformers.GPT2Config(vocab_size=3, n_positions=8, n_embd=8, n_layer=1, n_head=2, **ENDS)
    net = testing.redraw(Pretrained(transformers.GPT2LMHeadModel(config).double().eval(), BOS))
    testing.sequence(gx.Sequence(net, Categorical(3), eos=EOS, max_len=6))


def test_at_a_sample_site(net):
    lm = sequence_model(net)
    y = lm().sample((6,))

    def model(obs=None):
        pyro.module("lm", lm)
        with pyro.plate("rows", 6):
            return pyro.sample("y", lm(), obs=obs)

    trace = pyro.poutine.trace(model).get_trace(y)
    assert torch.allclose(trace.log_prob_sum(), lm().log_prob(y).sum())
    assert model().shape == (6, 8)
    pyro.clear_param_store()
    optimizer = pyro.optim.Adam({"lr": 1e-3})
    svi = pyro.infer.SVI(lambda: model(y), lambda: None, optimizer, pyro.infer.Trace_ELBO())
    losses = [svi.step() for _ in range(5)]
    assert losses[0] == pytest.approx(-trace.log_prob_sum().item())
    assert sorted(losses, reverse=True) == losses
    pyro.clear_param_store()


def generated(net, prompts, sites, **options):
    """Their tokens after the prompts, in full length, and the result."""
    tokens = torch.cat([torch.full((len(prompts), 1), BOS), prompts], 1)
    options |= {"max_new_tokens": sites, "pad_token_id": EOS, "do_sample": False, "return_dict_in_generate": True}
    out = net.model.generate(tokens, attention_mask=torch.ones_like(tokens), output_scores=True, **options)
    found = out.sequences[:, tokens.shape[1] :]
    return torch.nn.functional.pad(found, (0, sites - found.shape[1]), value=EOS), out


def check(ours, theirs, scores, d):
    """At least nine of ten are equal, all are as probable; they differ among each other, and not all end."""
    assert (ours.sequences == theirs).all(1).sum() >= 9
    assert torch.allclose(ours.log_prob, scores.to(ours.log_prob), atol=1e-4)
    assert torch.allclose(ours.log_prob, d.log_prob(ours.sequences), atol=1e-9)
    assert len(ours.sequences.unique(dim=0)) > 5
    assert (ours.sequences == EOS).any(1).sum() < 10


PROMPTS = torch.randint(2, V, (10, 5), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=CONFIGS)
def varied(request):
    """A model that does not repeat itself, and what follows the prompts."""
    net = Pretrained(causal_lm(request.param, initializer_range=0.3, tie_word_embeddings=False), BOS)
    return net, sequence_model(net)().conditional_on_prefix(PROMPTS, max_len=18)


def test_greedy_is_that_of_generate(varied):
    net, d = varied
    theirs, out = generated(net, PROMPTS, 18)
    scores = net.model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    ends = out.sequences[:, 6:] == EOS
    check(greedy(d), theirs, scores.masked_fill(ends.cumsum(1) > ends, 0.0).sum(1), d)


def test_beam_search_is_that_of_generate(varied):
    net, d = varied
    theirs, out = generated(net, PROMPTS, 18, num_beams=4, length_penalty=0.0, early_stopping="never")
    assert (theirs == EOS).any()
    check(beam_search(d, width=4, unfinished=True), theirs, out.sequences_scores, d)


def test_dropout_and_copies(net):
    y = torch.randint(V, (3, 6))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(y), net(y))
    assert torch.equal(net(y), net(y))
    net = Pretrained(causal_lm("GPT-2", embd_pdrop=0.5), BOS)
    assert torch.equal(net(y), net(y))
    net.train()
    assert not torch.equal(net(y), net(y))


def test_logits_of_half_precision_are_summed_in_single():
    net = Pretrained(causal_lm("Llama").bfloat16(), BOS)
    y = torch.randint(2, V, (3, 6))
    assert net(y).dtype == net.start(None, 3)[0].dtype == torch.float32
    d = sequence_model(net, 6)()
    logits = net.model(torch.cat([torch.full((3, 1), BOS), y[:, :-1]], 1)).logits.float()
    expected = log_softmax(logits, -1).gather(-1, y.unsqueeze(-1)).sum((1, 2))
    assert torch.allclose(d.log_prob(y), expected, rtol=1e-5)


def test_errors(monkeypatch):
    model = causal_lm("GPT-2")
    net, y = Pretrained(model, BOS), torch.zeros(2, SITES + 1, dtype=torch.long)
    fails(TypeError, "Expected model to be of class PreTrainedModel; got str.", Pretrained, "gpt2", BOS)
    fails(ValueError, "(AutoModelForCausalLM); got GPT2Model.", Pretrained, model.transformer, BOS)
    fails(ValueError, "Expected bos between 0 and 10 (tokens of the model); got 11.", Pretrained, model, V)
    fails(TypeError, "Expected bos to be of class int; got NoneType.", Pretrained, model, None)
    fails(ValueError, "Expected no context", net, y[:, :2], torch.zeros(2, 3))
    fails(
        ValueError,
        "Expected integers 0 ... 10 at a site with 11 categories; got 0 ... 11.",
        net,
        torch.tensor([[0, V, 0]]),
    )
    fails(ValueError, "Expected y.shape[1] <= 24 (the conditioner has max_len == 24)", net, y)
    assert net(y[:, :-1]).shape == (2, SITES, V)
    fails(ValueError, "Expected y.shape[1] <= 23", lambda: net.extend(y[:, :-1], net.start(None, 2)[1]))
    assert net.extend(y[:, :-2], net.start(None, 2)[1])[0].shape == (2, SITES - 1, V)
    fails(ValueError, "Expected at most 24 sites (conditioner.max_len); got 25.", sequence_model, net, SITES + 1)
    fails(ValueError, "Expected y.shape[0] == 2 (rows of the state)", net.extend, y[:1, :1], net.start(None, 2)[1])
    fails(ValueError, "conditioner.num_params == 5", gx.Sequence, net, Categorical(5), EOS, 4)
    model.gradient_checkpointing_enable()
    fails(ValueError, "Expected model to return its cache", net.train().start, None, 2)
    monkeypatch.setitem(sys.modules, "transformers", None)
    fails(ImportError, "pip install 'pyro-genexact[transformers]'", Pretrained, model, BOS)


def test_saving(net, tmp_path):
    """With the classes of transformers allowed, and not without."""
    gx.save(net, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=f"got transformers.*{type(net.model).__name__}.* Pass allow="):
        gx.load(tmp_path / "net.pt")
    parts = {type(part) for part in net.modules() if type(part).__module__.startswith("transformers.")}
    same = gx.load(tmp_path / "net.pt", allow=[*parts, type(net.model.config), transformers.GenerationConfig])
    y, context = testing.conditioner_inputs(net)
    assert torch.equal(same(y, context), net(y, context))
