"""The Python fragments of the pages, which are no cells of notebooks, run with the names that their pages assume."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_genexact as gx

DOCS = Path(__file__).parents[1] / "docs"
FRAGMENTS = [
    (path.relative_to(DOCS).as_posix(), number, code)
    for path in sorted(DOCS.rglob("*.md"))
    if "_build" not in path.parts and path.name != "deploy.md"  # test_deploy.py runs it
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE))
]


def model(y=None):
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)


def rows(x=None):
    with pyro.plate("rows", 1 if x is None else len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)


def language():
    head = gx.heads.Categorical(5)
    lm = gx.Sequence(gx.conditioners.Recurrent(5, 5, hidden=8), head, eos=0, max_len=4)
    y = lm().sample((6,))
    utility = gx.decoding.utilities.edit_similarity(eos=0)
    return {"lm": lm, "head": head, "y": y, "prefix": y[:1, :2], "candidates": y, "samples": y, "utility": utility}


def pretrained():
    import transformers

    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, eos_token_id=0, n_positions=1024)
    model = transformers.GPT2LMHeadModel(config)

    class Tokens:
        def __call__(self, text, return_tensors):
            return SimpleNamespace(input_ids=torch.ones(1, 4, dtype=torch.long))

        def batch_decode(self, draws, skip_special_tokens):
            return [str(draw) for draw in draws]

    return {"loaded": model, "tokens": Tokens()}


def decisions():
    def simulator():
        rate = pyro.sample("rate", dist.Beta(1.0, 1.0))
        pyro.sample("y", dist.Bernoulli(rate))

    def walk():
        drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
        bound = pyro.sample("bound", dist.LogNormal(0.0, 1.0))
        pyro.deterministic("y", torch.stack([(drift > 0).float(), bound.expand(drift.shape)], -1), event_dim=1)

    quick = {"simulations": 100, "epochs": 1, "progress": False}
    support = [dist.constraints.boolean, dist.constraints.positive]
    learned = gx.likelihood(walk, support=support, **quick)
    y = torch.stack([torch.ones(2, 3), torch.rand(2, 3)], -1)
    return {"simulator": simulator, "learned": learned, "y": y, "draws": torch.rand(50), "quick": quick}


# The names of a page's fragments, and what stands for devices and downloads that a test does not have.
PAGES = {
    "contributing.md": (
        lambda: {"MyConditioner": partial(gx.conditioners.MADE, 3, 2)},
        {"MyConditioner(...)": "MyConditioner(context=2)"},
    ),
    "explanation/two_directions.md": (dict, {}),
    "howto/amortise_with_a_network.md": (
        lambda: {"model": rows, "x": torch.randn(6, 1), "new": torch.randn(6, 1)},
        {"10_000": "64, epochs=1, progress=False"},
    ),
    "howto/choose_a_flow.md": (dict, {"import zuko": "from support.with_zuko import zuko"}),
    "howto/flow_as_a_guide.md": (
        lambda: {
            "model": model,
            "y": torch.zeros(2),
            "simulator": model,
        },
        {"10_000": "64, epochs=1, progress=False"},
    ),
    "howto/coming_from_sbi.md": (
        dict,
        {
            "simulations=10_000": "simulations=64, epochs=1, progress=False",
            "num_simulations=1000": "num_simulations=20",
        },
    ),
    "howto/flow_as_a_prior.md": (lambda: {"flow": gx.flows.maf(2)}, {}),
    "howto/laptop_to_cluster.md": (
        lambda: {
            "load_rows": lambda: torch.randn(40, 64),
            "rows": torch.zeros(2, 4, dtype=torch.long),
            "__name__": "__main__",
        },
        {
            'init_device_mesh("cuda", (torch.distributed.get_world_size(),))': "None",
            "fully_shard(layer, mesh=mesh)": "layer.train()",
            "width=1024": "width=16",
            "(784,)": "(4,)",
            'accelerator="cuda"': 'accelerator="cpu"',
            "devices=4": "devices=1",
            'strategy="ddp"': 'strategy="auto"',
            "flow.ckpt": "{folder}/flow.ckpt",
            "flow.pt": "{folder}/flow.pt",
        },
    ),
    "howto/learned_likelihood.md": (
        decisions,
        {
            "simulations=10_000": "**quick",
            "given=[": "**quick, given=[",
            "module=chain": "module=chain, **quick",
            '"vectorize": True': '"vectorize": True, **quick',
            "num_samples=500, warmup_steps=200": "num_samples=1, warmup_steps=1, disable_progbar=True",
            "1500": "300",
        },
    ),
    "howto/score_and_decode.md": (
        lambda: language() | pretrained(),
        {
            "from transformers import AutoModelForCausalLM, AutoTokenizer": "",
            "AutoTokenizer.from_pretrained(name)": "tokens",
            "AutoModelForCausalLM.from_pretrained(name)": "loaded",
        },
    ),
    "howto/speed.md": (
        dict,
        {
            "set_num_threads(1)": "get_num_threads()",
            "enable_validation(False)": "enable_validation(True)",
            'mode="reduce-overhead"': "disable=True",
            "fullgraph=True": 'fullgraph=True, backend="aot_eager"',
        },
    ),
    "installation.md": (dict, {'"cuda"': '"cpu"'}),
    "reference/encoders.md": (dict, {"2000": "64"}),
    "tutorials/posterior.md": (lambda: {"model": model}, {}),
}


@pytest.mark.parametrize("page, number, code", FRAGMENTS, ids=[f"{page}-{number}" for page, number, _ in FRAGMENTS])
def test_fragment_runs(page, number, code, monkeypatch, tmp_path):
    names, replacements = PAGES[page]
    for old, new in replacements.items():
        code = code.replace(old, new.format(folder=tmp_path))
    monkeypatch.setattr(gx, "fit", partial(gx.fit, epochs=1))
    monkeypatch.setattr(gx, "fit_guide", partial(gx.fit_guide, steps=3))
    pyro.clear_param_store()
    exec(compile(code, page, "exec"), {"gx": gx, "torch": torch, "pyro": pyro, "dist": dist, **names()})


def test_calls_of_sbi_run(monkeypatch, tmp_path):
    """The block that shows the calls of sbi runs with the release of the bench extra."""
    monkeypatch.chdir(tmp_path)  # sbi writes logs
    pytest.importorskip("sbi")
    page = (DOCS / "howto/coming_from_sbi.md").read_text()
    (code,) = re.findall(r"^```\{code-block\} python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    smaller = {"10_000": "64", "1000,": "20,", ".train()": ".train(max_num_epochs=1)", "posterior)": "posterior, 20)"}
    for old, new in smaller.items():
        assert old in code
        code = code.replace(old, new)
    names = {}
    exec(compile(code, "coming_from_sbi.md", "exec"), names)
    assert names["draws"].shape == (20, 2) and names["ranks"].shape == (20, 2)
