"""Small models of every kind, drawn by hypothesis. Only valid ones: each restriction is one that the classes document."""

from __future__ import annotations

import re

import torch
from descriptions import Case
from hypothesis import strategies as st

draws = st.composite


# Heads

SCALARS = """Normal()|Laplace()|LogNormal()|Exponential()|Gamma()|Beta()|StudentT()|StudentT(df=3.0)|VonMises()
Parametric(dist.Cauchy)|Parametric(dist.Gumbel)|Parametric(dist.Logistic)|Parametric(dist.HalfNormal)
Parametric(dist.HalfCauchy)|Parametric(dist.InverseGamma)|Parametric(dist.Kumaraswamy)|Parametric(dist.Weibull)
Parametric(dist.Chi2)|Parametric(dist.ContinuousBernoulli)|Parametric(dist.AsymmetricLaplace)
Parametric(dist.SoftLaplace)|Parametric(dist.SoftAsymmetricLaplace)|Parametric(dist.SkewLogistic)
Parametric(dist.FisherSnedecor)|Parametric(dist.Pareto, scale=1.5)|Parametric(dist.RelaxedBernoulli, temperature=0.7)
Parametric(dist.GeneralizedPareto, loc=0.5)|Parametric(dist.AffineBeta, loc=-1.0, scale=3.0)
Parametric(dist.FoldedDistribution, base_dist=Normal())|Mixture(Normal(), 2)|Mixture([Normal(), Laplace()])
Mixture([Gamma(), Beta()])|ConditionalHead(univariate(nsf, 3, bins=3, transforms=1, hidden=(4,)))"""
# a mixture of several heads has a union for support, which networks read as a number
COUNTS = """Poisson()|Geometric()|NegativeBinomial()|ZeroInflatedPoisson()|Parametric(dist.GammaPoisson)
Parametric(dist.ZeroInflatedNegativeBinomial)|Mixture(Poisson(), 2)|Mixture([Categorical(3), Binomial(2)])"""
# of the integers 0 ... N, below V
FINITE = """Categorical({V})|Binomial({N})|DiscretizedLogistic({V})|DiscretizedLogistic({V}, 2)
Mixture(Categorical({V}), 2)|Parametric(dist.BetaBinomial, total_count={N})|Parametric(dist.OrderedLogistic, ({N},))
ConditionalHead(Conditional(nn.Linear(3, {V}), Categorical({V})))"""
FILTERS = "Tempered({}, 0.7)|Tempered({}, 1.5)|TopK({}, 2)|TopP({}, 0.8)|MinP({}, 0.3)|Forbid({}, [1])"
# of k numbers
VECTORS = """Normal(({k},))|Bernoulli(({k},))|MultivariateNormal({k})|Dirichlet({k})|OneHotCategorical({k})
ContinuousCategorical({k})|Mixture(MultivariateNormal({k}), 2)|Mixture(Normal(({k},)), 2)|Poisson(({k},))
Parametric(dist.LowRankMultivariateNormal, ({k},), rank=1)|Parametric(dist.MultivariateStudentT, ({k},))
Parametric(dist.Multinomial, ({k},), total_count=2)|Parametric(dist.DirichletMultinomial, ({k},), total_count=2)
Parametric(dist.ProjectedNormal, ({k},))|Parametric(dist.RelaxedOneHotCategorical, ({k},), temperature=0.7)
Parametric(dist.MixtureOfDiagNormals, ({k},), components=2)
ConditionalHead(Autoregressive(NADE({k}, 1, context=3, hidden=4), Bernoulli(), ({k},)))
ConditionalHead(Autoregressive(MADE({k}, 2, context=3, hidden=(4,)), Normal(), ({k},)))
ConditionalHead(maf({k}, 3, transforms=1, hidden=(4,)))"""
SCALARS, COUNTS, FINITE, FILTERS, VECTORS = (
    re.split("[|\n]", heads) for heads in (SCALARS, COUNTS, FINITE, FILTERS, VECTORS)
)
pick = st.sampled_from


@draws
def finite(draw, labels=None, eos=None):
    """Code of a head of the integers below V, and V."""
    V = labels or draw(st.integers(2, 4))
    head = draw(pick([*FINITE, *(["Bernoulli()"] if V == 2 else [])])).format(V=V, N=V - 1)
    names: list[str] = []  # of the filters so far
    for _ in range(draw(st.integers(0, 2))):
        # what two leave may be no token, see Forbid and MinLength; and a sequence of one symbol must not forbid it
        taken = names and names[-1] != "Tempered"
        some = [f for f in FILTERS if "Forbid" not in f or not (taken or eos == 1)]
        some += [f"MinLength({{}}, 1, eos={eos})"] if eos is not None and not taken else []
        head = draw(pick(some)).format(head)
        names.append(head[: head.index("(")])
    return head, V


@draws
def any_head(draw):
    """Code of a head, and the site (code) of a conditioner for it."""
    if (what := draw(pick(["scalar", "finite", "vector", "count", "stopped"]))) == "finite":
        head, V = draw(finite())
        return head, draw(pick([str(V), "()"]))
    if what == "vector":
        k = draw(st.integers(2, 3))
        return draw(pick(VECTORS)).format(k=k), f"({k},)"
    if what == "stopped":
        inner = draw(pick([*SCALARS[:9], *COUNTS[:2], "Bernoulli()", "Categorical(3)"]))
        return f"Stopped({inner})", "(2,)"
    return draw(pick(SCALARS if what == "scalar" else COUNTS)), "()"


def shape_of(site):
    return eval(site) if site.startswith("(") else ()


# Conditioners and what calls are given

ACTIVATIONS = ["torch.relu", "torch.tanh", "nn.functional.silu", "nn.ELU()", "torch.sigmoid"]
CONTEXTS = {
    "MADE": ["C"],
    "NADE": ["C"],
    "Independent": ["C", "Covariates"],
    "Markov": ["C", "Covariates"],
    "Recurrent": ["C", "Covariates", "Source"],
    "Transformer": ["C", "Covariates", "Source"],
    "CausalConv": ["C", "Covariates", "Source"],
    "StateSpace": ["C", "Covariates", "Source"],
    "PixelCNN": ["C", "Source"],
}


@draws
def conditioner(draw, sites, site, kinds=tuple(CONTEXTS), bands=True):
    """Code of a conditioner, and which context it reads: "" or "C", "Covariates", "Source"."""
    kind = draw(pick(kinds))
    context = draw(pick(["", *CONTEXTS[kind]]))
    given = {"": "", "C": ", context=2", "Covariates": ", context=Covariates(2)", "Source": ", context=Source(2)"}[
        context
    ]
    options = ""
    args = f"{sites}, P, site={site}" if kind in ("MADE", "NADE", "Independent") else f"{site}, P"
    act = draw(pick(ACTIVATIONS))
    if kind == "MADE":
        hidden = draw(pick(["()", "(8,)", "(6, 7)"]))
        options = f", hidden={hidden}, activation={act}"
        if draw(st.booleans()):
            options += ", direct=True"
            # a band without a direct link may reach no site through a narrow layer, an error
            if bands and draw(st.booleans()):
                options += f", adjacency=torch.ones({sites}, {sites}).tril(-1).triu(-{draw(st.integers(1, 2))}).bool()"
    elif kind == "NADE":
        options = f", hidden=5, activation={act}"
    elif kind == "Recurrent":
        cell = draw(pick(["gru", "lstm", "elman"]))
        options = f", hidden=5, cell={cell!r}, layers={draw(st.integers(1, 2))}"
    elif kind == "Markov":
        options = f", order={draw(st.integers(1, 3))}, hidden={draw(pick(['()', '(6,)']))}, activation={act}"
    elif kind == "Transformer":
        window = draw(pick(["None", "2"]))
        options = f", width=8, num_heads={draw(pick([1, 2]))}, depth={draw(pick([1, 2]))}, window={window}"
    elif kind == "CausalConv":
        options = f", width=6, kernel={draw(st.integers(1, 3))}, dilations={draw(pick(['(1,)', '(1, 2)', '(3, 1)']))}"
    elif kind == "StateSpace":
        which, depth = draw(pick(["diagonal", "selective"])), draw(st.integers(1, 2))
        options = f", kind={which!r}, width=6, depth={depth}, state=4"
    elif kind == "PixelCNN":
        channels = draw(pick([n for n in (1, 2, 3) if sites % n == 0]))
        args = f"({channels}, 1, {sites // channels}), P, site={site}"
        options = f", width=4, depth={draw(st.integers(1, 2))}, kernel={draw(pick([1, 3]))}, first_kernel=3"
    elif context:
        options = f", hidden={draw(pick(['()', '(6,)']))}, activation={act}"
    return f"{kind}({args}{given}{options})", context


BATCHES = [(), (2,), (3,), (1,), (2, 1), (1, 2), (2, 2)]


@draws
def part_of(draw, batch):
    """A batch shape that broadcasts to this one."""
    kept = batch[draw(st.integers(0, len(batch))) :]
    return tuple(draw(pick([n, 1])) for n in kept)


@draws
def integers(draw, shape, low, high):
    """Nested lists of integers of this shape."""
    if not shape:
        return draw(st.integers(low, high))
    return [draw(integers(shape[1:], low, high)) for _ in range(shape[0])]


@draws
def given_to(draw, context, sites, lengths=True):
    """Fields of a case: what the call of a model of so many sites is given, with or without lengths."""
    batch = draw(pick(BATCHES))
    found = {
        "dtype": draw(pick(["float64", "float64", "float32"])),
        "integers": draw(pick(["int64", "int32", "int16", "int8", "uint8"])),
        "seed": draw(st.integers(0, 99)),
    }
    if context:
        inner = {"C": (2,), "Covariates": (sites, 2), "Source": (3, 2)}[context]
        found["context"] = draw(part_of(batch)) + inner
    if context == "Source" and draw(st.booleans()):
        found["source_lengths"] = draw(integers(draw(part_of(batch)), 0, 3))
    if lengths and draw(st.booleans()):
        found["lengths"] = draw(integers(draw(part_of(batch)), 0, sites))
    return found


# Families of cases


@draws
def autoregressive(draw):
    shape = draw(pick([(3,), (1,), (2,), (4,), (2, 2), (1, 3), (2, 1, 2)]))
    sites = torch.Size(shape).numel()
    if draw(pick([False, False, False, True])):  # the columns of a table
        each = [draw(st.one_of(pick(SCALARS[:9]).map(lambda h: (h, None)), finite())) for _ in range(sites)]
        head = f"PerSite([{', '.join(h for h, _ in each)}])"
        mixed = f"[{', '.join(str(V or '()') for _, V in each)}]"
        site = draw(pick([mixed, "()"]))
    else:
        head, site = draw(any_head())
        mixed = ""
    kinds = ("MADE", "NADE", "Independent") if site == mixed else tuple(CONTEXTS)
    if len(shape) > 1:  # an image has its own shape
        kinds = tuple(kind for kind in kinds if kind != "PixelCNN")
    net, context = draw(conditioner(sites, site, kinds=kinds))
    order = draw(st.one_of(st.none(), st.permutations(range(sites))))
    if site == mixed and order is not None:
        order = None  # the sites of a network of mixed kinds, and the heads, are those in visiting order
    event = shape + shape_of(site)
    model = f"Autoregressive({net}, head, {event}" + (f", order={order})" if order else ")")
    prefix = draw(st.integers(1, sites - 1)) if sites > 1 and draw(st.booleans()) else 0
    return Case("autoregressive", model, head, prefix=prefix, order=order, **draw(given_to(context, sites)))


@draws
def sequence(draw):
    sites = draw(st.integers(1, 4))
    if draw(pick([True, True, False])):
        V = draw(st.integers(2, 3))
        eos = draw(st.integers(0, V - 1))
        head, _ = draw(finite(V, eos))
        site = draw(pick([str(V), "()"]))
    else:
        inner = draw(
            pick(["Bernoulli()", "Categorical(3)", "Poisson()", "Normal()", "Gamma()", "MultivariateNormal(2)"])
        )
        head, site, eos = f"Stopped({inner})", "(3,)" if "Multi" in inner else "(2,)", None
    net, context = draw(conditioner(sites, site))
    given = draw(given_to(context, sites, lengths=False))
    if sites > 1 and draw(st.booleans()):
        given["prefix"] = prefix = draw(st.integers(1, sites - 1))
        if draw(st.booleans()):
            given["prefix_lengths"] = draw(integers(draw(part_of(draw(pick(BATCHES)))), 0, prefix))
            if given.get("context", ()):  # of one batch shape, which broadcasts
                given["prefix_lengths"] = draw(st.integers(0, prefix))
    return Case("sequence", f"Sequence({net}, head, {eos}, {sites})", head, **given)


RECIPES = {  # and options that make them small
    **{"maf": "", "iaf": "", "nsf": "bins=3", "naf": "units=3", "bnaf": "", "sospf": "polynomials=2, degree=2"},
    **{"bpf": "degree=4", "umnn": "signal=2, network=(4,)", "realnvp": "", "nice": "", "glow_vector": ""},
    **{"coupling_nsf": "bins=3", "autoregressive": "", "coupling": ""},
}
HEADS = {"autoregressive": "LogisticMixtureCDF", "coupling": "Affine"}
COUPLINGS = ("realnvp", "nice", "glow_vector", "coupling_nsf", "coupling")
SUPPORTS = ["constraints.real", "constraints.positive", "constraints.unit_interval", "constraints.less_than(3.0)"]
SUPPORTS += ["constraints.interval(-1.0, 2.0)", "constraints.greater_than(-2.0)"]
BASES = ["Laplace(torch.zeros({}), 1.0)", "StudentT(4.0, torch.zeros({}), 1.0)", "Normal(torch.zeros({}), 2.0)"]


@draws
def flow(draw):
    name = draw(pick(list(RECIPES)))
    D = draw(pick([2, 1, 3]))
    one = D == 1 and draw(st.booleans())  # on one axis
    # of the simplex of one number, which is a point, there is no density
    support = draw(pick([*SUPPORTS, "list", *(["constraints.simplex"] if D > 1 else [])]))
    if support == "list":
        support = f"[{', '.join(draw(st.lists(pick(SUPPORTS), min_size=D, max_size=D)))}]"
    size = D - 1 if "simplex" in support else D
    context = draw(pick(["", "C"]))
    options = [RECIPES[name], f"transforms={draw(st.integers(1, 2))}", f"support={support}"]
    if name == "bnaf":
        options.append("hidden=(3,)")
    else:
        options += ["hidden=(6,)", f"activation={draw(pick(ACTIVATIONS[:3]))}"]
        if name in COUPLINGS and draw(st.booleans()):
            options.append("conditioner=lambda P, C: Recurrent((), P, context=C, hidden=4)")
        elif name not in COUPLINGS and draw(st.booleans()):
            net, context = draw(conditioner(size, "()", kinds=("Markov", "Recurrent", "Transformer", "MADE")))
            options.append(f"conditioner=lambda P, C: {net}")
    if name != "iaf" and draw(st.booleans()):
        options.append("inverse=True")
    if draw(st.booleans()):
        base = f"dist.{draw(pick(BASES))}"
        options.append(f"base={base.format('()')}" if one else f"base={base.format(size)}.to_event(1)")
    features, of = ("", f"{name}, ") if one else (f"{D}, ", "")
    if name in ("autoregressive", "coupling"):
        of = f"partial({name}, {HEADS[name]}), " if one else f"{HEADS[name]}, "
    context_ = {"": "0", "C": "2", "Covariates": "Covariates(2)", "Source": "Source(2)"}[context]
    model = f"{'univariate' if one else name}({of}{features}{context_}, {', '.join(filter(None, options))})"
    # as transforms of prefixes: none that mixes all sites
    ragged = not one and name not in (*COUPLINGS, "bnaf") and "simplex" not in support
    return Case("flow", model, **draw(given_to(context, size, lengths=ragged)))


@draws
def chain(draw):
    sites, V = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    what = draw(pick(["Labels", "States", "CRF"]))
    if what == "CRF":
        given = draw(given_to("Covariates", sites))
        allowed = f", allowed=torch.ones({V}, {V}).tril().bool()" if draw(st.booleans()) else ""
        return Case("chain", f"CRF({V}, 2{allowed})", **given)
    given = draw(given_to("", sites))
    batch = draw(part_of(draw(pick(BATCHES))))
    if "lengths" in given:
        given["lengths"] = draw(integers(draw(part_of(batch)), 0, sites))
    steps = draw(pick([None, (*batch, max(sites - 1, 1)), (*batch, 1)]))
    if what == "Labels":
        ends = f"{draw(st.booleans())}, {draw(st.booleans())}"
        return Case("chain", f"Labels({batch}, {sites}, {V}, {steps}, {ends})", **given)
    # no VonMises: nothing guards torch's own here, which has its mass again in each turn
    scalars = [*SCALARS[:8], *COUNTS[:4], "Bernoulli()", "Categorical(3)"]
    head = draw(st.one_of(pick(scalars), pick(VECTORS[:6]).map(lambda h: h.format(k=2))))
    return Case("chain", f"States({batch}, {sites}, {V}, head, {steps})", head, **given)


@draws
def other(draw):
    if draw(st.booleans()):
        head, _ = draw(any_head())
        network = draw(pick(["nn.Linear(2, P)", "nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, P))"]))
        return Case("other", f"Conditional({network}, head)", head, **draw(given_to("C", 1, lengths=False)))
    sites = draw(st.integers(1, 4))
    head, site = draw(any_head())
    # only these have weights that belong to variables, and a band is of sites
    net, context = draw(conditioner(sites, site, kinds=("NADE", "MADE"), bands=False))
    orders = draw(st.lists(st.permutations(range(sites)), min_size=1, max_size=2))
    event = (sites, *shape_of(site))
    model = f"OrderEnsemble(Autoregressive({net}, head, {event}), {orders})"
    return Case("other", model, head, **draw(given_to(context, sites, lengths=False)))


KINDS = {"autoregressive": autoregressive, "sequence": sequence, "flow": flow, "chain": chain, "other": other}
