"""Internal parts of modules. Saved files contain these names, so they must not be renamed or removed."""

from .base import Slot
from .conditioners.attention import Layer
from .conditioners.convolution import GatedConv
from .conditioners.encoding import Dense, SiteEncoder
from .conditioners.guided import GuidedConditioner
from .conditioners.pixel_layer import PixelLayer
from .conditioners.state_space import DiagonalLayer, SelectiveLayer
from .conditioners.sweeps import Sweeps
from .core.buffers import Packed
from .core.faces import publish
from .core.independent import All, Independent
from .encoders.base import Readout
from .encoders.sets import Attend
from .families.repaired import REPAIRED
from .families.supports import AllPositive, Between, Counts, Sphere
from .flows.coupling_recipes import Diagonal
from .flows.zuko import ZukoBase, ZukoTransform
from .heads.composite import Grouping
from .heads.parameters import Cholesky, Link, Part
from .inference.arrow import Arrow, ArrowAffine, Layout
from .inference.blocks import BlockFlow, RowsGivenAll
from .inference.gaussian import CholeskyAffine, Gaussian, SinhArcsinh, Tails
from .inference.low_rank import LowRank, LowRankAffine
from .inference.mixture_guide import FlowMixture
from .simulation.columns import Columns
from .simulation.count_block import CountBlock
from .simulation.given import Given
from .simulation.latent_block import Block
from .simulation.latent_space import Flattened, Group, Latent, Plate
from .simulation.observations import Inputs, Observed
from .simulation.posterior_network import Member, Posterior
from .simulation.typicality import Typicality
from .transforms.base import Adapted, Inverted
from .transforms.block_network import BlockLinear
from .transforms.coupling import FirstSite
from .transforms.prefixes import Elementwise
from .transforms.support import Interior

__all__ = [
    "Adapted",
    "All",
    "AllPositive",
    "Arrow",
    "ArrowAffine",
    "Attend",
    "Between",
    "Block",
    "BlockFlow",
    "BlockLinear",
    "Cholesky",
    "CholeskyAffine",
    "Columns",
    "CountBlock",
    "Counts",
    "Dense",
    "Diagonal",
    "DiagonalLayer",
    "Elementwise",
    "FirstSite",
    "Flattened",
    "FlowMixture",
    "GatedConv",
    "Gaussian",
    "Given",
    "Group",
    "Grouping",
    "GuidedConditioner",
    "Independent",
    "Inputs",
    "Interior",
    "Inverted",
    "Latent",
    "Layer",
    "Layout",
    "Link",
    "LowRank",
    "LowRankAffine",
    "Member",
    "Observed",
    "Packed",
    "Part",
    "PixelLayer",
    "Plate",
    "Posterior",
    "Readout",
    "RowsGivenAll",
    "SelectiveLayer",
    "SinhArcsinh",
    "SiteEncoder",
    "Slot",
    "Sphere",
    "Sweeps",
    "Tails",
    "Typicality",
    "ZukoBase",
    "ZukoTransform",
]

_families = {family.__name__: family for family in REPAIRED.values()}  # depends on the versions of torch and Pyro
globals().update(_families)
publish({**globals(), "__all__": [*__all__, *_families]})
