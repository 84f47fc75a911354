"""The registry holds every public class, far from the identity."""

import inspect
import sys

import pytest
import torch
from torch import nn
from torch.distributions import Transform

import pyro_genexact as gx
from pyro_genexact.testing import conditioner_inputs, made
from support import registry


def parts(thing):
    """The thing and all that it is made of."""
    yield thing
    if isinstance(thing, nn.Module):
        for child in thing.children():
            yield from parts(child)
        yield from parts(getattr(thing, "value", None))
    if isinstance(thing, Transform):
        for part in getattr(thing, "parts", ()):
            yield from parts(part)
    if isinstance(thing, gx.Conditioner):
        yield thing.start(conditioner_inputs(thing)[1], 6)[1]


def test_every_public_class_is_in_the_registry():
    subjects = [factory() for factory in (*registry.CONDITIONERS.values(), *registry.HEADS.values())]
    for factory in (*registry.TRANSFORMS.values(), *registry.DISTRIBUTIONS.values()):
        subject, *_, context = factory()
        result = made(subject, context)
        subjects += [subject, result, getattr(result, "support", None)]
        if isinstance(result, gx.distributions.SequenceDistribution):
            subjects.append(result.termination_curve(num_samples=2))
    for factory in registry.DISTRIBUTION_HEADS.values():
        head = factory().double()
        subjects += [head, head.support, head(torch.zeros(1, 4, head.num_params, dtype=torch.float64))]
    subjects += [factory() for factory in (*registry.ENCODERS.values(), *registry.JOINTS.values())]
    seen = {kind.__name__ for subject in subjects for part in parts(subject) for kind in type(part).__mro__}
    parts_of_it = (gx.transforms, gx.conditioners, gx.encoders, gx.heads, gx.distributions, gx.flows)
    public = {name for part in parts_of_it for name in part.__all__ if inspect.isclass(getattr(part, name))}
    public |= {
        name for name in gx.__all__ if inspect.isclass(kind := getattr(gx, name)) and issubclass(kind, nn.Module)
    }
    # of another library's models: tests/conditioners/test_pretrained.py has their laws
    public -= {"Pretrained", "PretrainedState"}
    # learned from simulations: tests/simulation/test_likelihood.py; its distribution is an entry, "Columns"
    public -= {"Likelihood"}
    assert public <= seen, public - seen


RECIPES = [name for name in gx.flows.__all__ if inspect.isfunction(getattr(gx.flows, name))]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_in_the_registry(recipe):
    """Entries begin with the name of the function that they call."""
    entries = [factory for name, factory in registry.DISTRIBUTIONS.items() if name.split()[0] == recipe]
    called = set()
    sys.setprofile(lambda frame, event, arg: called.add(frame.f_code))
    try:
        entries[0]()
    finally:
        sys.setprofile(None)
    assert getattr(gx.flows, recipe).__code__ in called


@pytest.mark.parametrize("name", registry.CONDITIONERS)
def test_parameters_vary_clearly(name):
    net = registry.CONDITIONERS[name]()
    deviations = net(*conditioner_inputs(net, 500)).std(0)
    varying = deviations[deviations > 1e-6]
    if name in ("MADE one site", "Independent"):  # read nothing
        assert not len(varying)
    else:
        assert 0.3 < varying.square().mean().sqrt() < 0.9
