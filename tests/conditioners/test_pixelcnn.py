"""PixelCNN against its definition; what each site reads; prefixes, chunks, samples, heads and errors."""

import itertools

import pytest
import torch
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_leaves

import pyro_genexact as gx
from pyro_genexact import Autoregressive, heads
from pyro_genexact.conditioners import PixelCNN
from pyro_genexact.contexts import Covariates, Source
from pyro_genexact.distributions import AutoregressiveDistribution as Given
from pyro_genexact.testing import conditioner_inputs
from support.networks import Anew, by_sites
from support.registry import CONDITIONERS
from support.registry.conditioners import pixelcnn
from support.values import built, double, draws, sized


def by_hand(net, y, context):
    """Output h of every pixel, (B, H, W, width), by sums over single pixels as the docstring writes them."""
    C, H, W = net.image_shape
    r, n, zero = net.first_kernel // 2, net.kernel // 2, torch.zeros((), dtype=y.dtype)
    z = torch.cat([y.unflatten(1, (H, W, C)), torch.ones(len(y), H, W, 1, dtype=y.dtype)], -1)

    def total(images, weight, i, j, rows, columns):
        """Sum of weight[:, :, a, b] at the pixels of an image, where rows and columns are offsets of the kernel's places."""
        found = zero
        for (a, di), (b, dj) in itertools.product(enumerate(rows), enumerate(columns)):
            if 0 <= i + di < H and 0 <= j + dj < W:
                found = found + images[i + di, j + dj] @ weight[:, :, a, b].T
        return found

    def gate(x):
        a, b = x.chunk(2, -1)
        return a * torch.sigmoid(b)

    places = list(itertools.product(range(H), range(W)))
    pixels = {(i, j): z[:, i, j] for i, j in places}
    v, h = {}, {}
    for i, j in places:
        v[i, j] = total(pixels, net.above.weight, i, j, range(-r, 0), range(-r, r + 1)) + net.above.bias
        v[i, j] = v[i, j] + net.of_row[i, 0] + net.of_column[j]
        h[i, j] = total(pixels, net.left.weight, i, j, [0], range(-r, 0)) + net.left.bias
    of_context = net.read_context(context).chunk(2 * net.depth, -1)
    for k, layer in enumerate(net.layers):
        old_v, old_h = dict(v), dict(h)
        for i, j in places:
            x = total(old_v, layer.above.weight, i, j, range(-n, 1), range(-n, n + 1)) + layer.above.bias
            v[i, j] = old_v[i, j] + layer.mix_above(gate(x + of_context[2 * k]))
        for i, j in places:
            x = total(old_h, layer.left.weight, i, j, [0], range(-n, 1)) + layer.down(v[i, j])
            h[i, j] = old_h[i, j] + layer.mix(gate(x + of_context[2 * k + 1]))
    return torch.stack([h[place] for place in places], 1)


@pytest.mark.parametrize("kernel", [1, 3])
def test_by_hand(kernel):
    net = pixelcnn((2, 3, 4), kernel=kernel, context=2)()
    y, context = conditioner_inputs(net, 2)
    out, silu = net.norm(by_hand(net, y, context)), torch.nn.functional.silu
    phi = [
        net.last[0](silu(net.hidden[0](out))),
        net.last[1](silu(net.hidden[1](torch.cat([out, y[:, ::2, None]], -1)))),
    ]
    torch.testing.assert_close(net(y, context), torch.stack(phi, 2).flatten(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kernel", "first_kernel", "depth"), [(3, 3, 1), (3, 5, 2), (1, 5, 2)])
def test_no_blind_spot(kernel, first_kernel, depth):
    """A site reads all earlier sites in a rectangle above, all to its left up to there, and no others."""
    C, H, W = 2, 6, 7
    net = pixelcnn((C, H, W), 1, kernel=kernel, first_kernel=first_kernel, depth=depth)()
    y, _ = conditioner_inputs(net, 3)
    read = torch.autograd.functional.jacobian(lambda y: net(y).sum(0).squeeze(1), y).abs().amax(1) > 1e-12
    reach = first_kernel // 2 + depth * (kernel // 2)
    for t, s in itertools.product(range(C * H * W), repeat=2):
        (i, j), (k, m) = divmod(t // C, W), divmod(s // C, W)
        above = 0 < i - k <= reach and abs(j - m) <= reach
        left = i == k and 0 < j - m <= reach
        assert read[t, s] == (above or left or ((i, j) == (k, m) and s < t)), (t, s)


@pytest.mark.parametrize("name", ["PixelCNN", "PixelCNN channels", "PixelCNN categories, source padded"])
def test_all_cuts(name):
    net = CONDITIONERS[name]()
    y, context = conditioner_inputs(net, 3, padded="padded" in name)
    last = y.shape[1] - 1
    with torch.no_grad():
        expected = net(y, context)
        for cut in itertools.combinations_with_replacement(range(last + 1), 2):
            phi, state = net.start(context, len(y))
            phis = [phi.unsqueeze(1)]
            for first, stop in itertools.pairwise((0, *cut, last)):
                if first < stop:
                    phi, state = net.extend(y[:, first:stop], state)
                    phis.append(phi)
            torch.testing.assert_close(torch.cat(phis, 1), expected, rtol=0, atol=1e-12)


def test_order_of_channels():
    net = pixelcnn((3, 2, 4), 1)()
    order = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(4), torch.arange(3), indexing="ij"), -1)
    assert net.order_of((3, 2, 4)).tolist() == (order @ torch.tensor([4, 1, 8])).flatten().tolist()
    assert net.order_of((24,)) is None and pixelcnn((1, 2, 4), 1)().order_of((2, 4)) is None
    model, head = Autoregressive(net, heads.Bernoulli(), (3, 2, 4)), heads.Bernoulli()
    assert model.order is None and not any("order" in name for name in model.state_dict())
    y = (sized(5, 3, 2, 4) > 0).double()
    phi = net(y.permute(0, 2, 3, 1).flatten(1))
    expected = head(phi).log_prob(y.permute(0, 2, 3, 1).flatten(1)).sum(1)
    torch.testing.assert_close(model().log_prob(y), expected, rtol=0, atol=1e-12)
    flat = Autoregressive(net, head, (24,))
    torch.testing.assert_close(flat().log_prob(y.permute(0, 2, 3, 1).flatten(1)), expected, rtol=0, atol=1e-12)
    reversed_ = Autoregressive(net, head, (3, 2, 4), order=list(range(23, -1, -1)))
    torch.testing.assert_close(
        reversed_().log_prob(y.permute(0, 2, 3, 1).flatten(1).flip(1).unflatten(1, (3, 2, 4))),
        expected,
        rtol=0,
        atol=1e-12,
    )


def test_prefix_is_upper_rows():
    net = pixelcnn((2, 4, 3), 1)()
    model = Autoregressive(net, heads.Bernoulli(), (2, 4, 3))
    y = (sized(5, 2, 4, 3) > 0).double()
    rows = y.permute(0, 2, 3, 1).flatten(1)
    for count in (1, 3):
        lower = model().conditional_on_prefix(rows[:, : count * 6])
        expected = model().log_prob_sites(y)[:, :, count:].sum((1, 2, 3))
        torch.testing.assert_close(lower.log_prob(rows[:, count * 6 :]), expected, rtol=0, atol=1e-12)
        with torch.inference_mode():  # the lower rows as an image
            image = Given(net, heads.Bernoulli(), (2, 4 - count, 3), prefix=rows[:, : count * 6])
        log_prob = image.log_prob(y[:, :, count:])
        torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-12)
        log_prob.sum().backward()
        expected = draws(lower, 2).unflatten(-1, (4 - count, 3, 2)).movedim(-1, 2)
        assert torch.equal(draws(image, 2), expected)
    # nothing below or beside what a prefix contains changes its part
    other = y.clone()
    other[:, :, 2:] = 1 - other[:, :, 2:]
    torch.testing.assert_close(model().log_prob_sites(other)[:, :, :2], model().log_prob_sites(y)[:, :, :2])


HEADS = {
    "Bernoulli": (lambda: heads.Bernoulli(), (1, 4, 5), {}),
    "Categorical": (lambda: heads.Categorical(4), (2, 3, 3), {"site": 4}),
    "DiscretizedLogistic": (lambda: heads.DiscretizedLogistic(6, 2), (3, 3, 2), {"context": 2}),
    "Bernoulli source": (lambda: heads.Bernoulli(), (1, 3, 4), {"site": 2, "context": Source(2)}),
}


@pytest.mark.parametrize("name", HEADS)
def test_samples_equal_those_of_new_evaluations(name):
    make, shape, options = HEADS[name]
    head = make()
    net = pixelcnn(shape, head.num_params, **options)()
    _, context = conditioner_inputs(net, 7)
    given = () if context is None else (context,)
    cached, anew = (Autoregressive(n, head, shape, net.order_of(shape))(*given) for n in (net, Anew(net)))
    got, expected = (draws(d, *([7] if context is None else [])) for d in (cached, anew))
    assert got.shape == (7, *shape) and torch.equal(got, expected) and got.unique().numel() > 1
    with torch.no_grad():
        phi = net(got.flatten(2).mT.flatten(1), context)
    expected = head(phi).log_prob(got.flatten(2).mT.flatten(1)).sum(1)
    torch.testing.assert_close(cached.log_prob(got), expected, rtol=0, atol=1e-10)


def test_total_mass():
    net = pixelcnn((2, 2, 1), 3, site=3)()
    d = Autoregressive(net, heads.Categorical(3), (2, 2, 1))()
    log_prob = d.log_prob(d.enumerate_support())
    torch.testing.assert_close(log_prob.exp().sum(), double(1.0)[0], rtol=0, atol=1e-12)
    assert log_prob.std() > 0.1


def test_under_vmap_and_autocast():
    net = CONDITIONERS["PixelCNN categories, channels, context"]()
    y, context = conditioner_inputs(net, 3)
    weights = {key: p.detach() for key, p in net.named_parameters()}
    both = {key: torch.stack([w, 2 * w]) for key, w in weights.items()}
    got = vmap(lambda w: functional_call(net, w, (y, context)))(both)
    torch.testing.assert_close(got[0], net(y, context), rtol=0, atol=1e-12)
    twice = {key: 2 * w for key, w in weights.items()}
    torch.testing.assert_close(got[1], functional_call(net, twice, (y, context)), rtol=0, atol=1e-12)

    net, context = net.float(), context.float()
    expected = net(y, context)
    with torch.autocast("cpu", torch.bfloat16):
        phi, state = net.start(context, len(y))
        phi = torch.cat([phi.unsqueeze(1), net.extend(y[:, :5], state)[0]], 1)
        torch.testing.assert_close(phi.float(), expected[:, :6], rtol=0.05, atol=0.05)
        torch.testing.assert_close(net(y, context).float(), expected, rtol=0.05, atol=0.05)


def test_dropout_only_in_training():
    net = pixelcnn((1, 3, 3), dropout=0.5)()
    y, _ = conditioner_inputs(net)
    torch.manual_seed(0)
    for call in (net, lambda y: by_sites(net, y)[0]):
        net.train()
        assert not torch.equal(call(y), call(y))
        net.eval()
        torch.testing.assert_close(call(y), net(y), rtol=0, atol=1e-12)


def bernoulli(shape, event_shape):
    return Autoregressive(PixelCNN(shape, 1, width=4, depth=1), heads.Bernoulli(), event_shape)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: PixelCNN((28, 28), 1),
            r"Expected image_shape of three sizes \(channels, height, width\); got \(28, 28\)",
        ),
        (lambda: PixelCNN((1, 0, 3), 1), r"Expected image_shape to be a sequence of integers >= 1; got \(1, 0, 3\)"),
        (lambda: PixelCNN(28, 1), r"Expected image_shape to be a sequence of integers >= 1; got 28"),
        (lambda: PixelCNN((1, 3, 3), 1, kernel=2), r"Expected kernel to be odd; got 2"),
        (lambda: PixelCNN((1, 3, 3), 1, first_kernel=4), r"Expected first_kernel to be odd; got 4"),
        (lambda: PixelCNN((1, 3, 3), 1, first_kernel=1), r"Expected first_kernel to be an integer >= 3; got 1"),
        (lambda: PixelCNN((1, 3, 3), 1, dropout=1.0), r"Expected 0 <= dropout < 1; got 1\.0"),
        (lambda: PixelCNN((1, 3, 3), 1, context=Covariates(2)), r"Expected context to be an integer >= 0"),
        (lambda: PixelCNN((1, 3, 3), 1, site=[3] * 9), r"Expected site to be one kind, the same at every site"),
        (lambda: PixelCNN((1, 3, 3), 1)(torch.zeros(2, 8)), r"Expected y\.shape\[1:\] == \(9,\) .*; got \(2, 8\)"),
        (
            lambda: PixelCNN((1, 3, 3), 1, site=4)(torch.full((2, 9), 4)),
            r"Expected integers 0 \.\.\. 3 at a site with 4 categories; got 4 \.\.\. 4",
        ),
        (
            lambda: PixelCNN((1, 3, 3), 1, context=2)(torch.zeros(2, 9), torch.zeros(2, 3)),
            r"Expected context\.shape\[-1\] == 2",
        ),
        (lambda: PixelCNN((1, 3, 3), 1, context=2)(torch.zeros(2, 9)), r"Expected a context \(\*batch, 2\)"),
        (
            lambda: PixelCNN((1, 3, 3), 1, context=2).start(torch.zeros(3, 2), 2),
            r"Expected context\.shape\[0\] == 2 \(rows of the batch\); got \(3, 2\)",
        ),
        (lambda: PixelCNN((1, 3, 3), 1)(torch.zeros(2, 9).double()), r"Expected y\.dtype == torch\.float32"),
        (lambda: bernoulli((1, 4, 6), (1, 6, 4)), r"Expected sites of shape \(1, 4, 6\) .*; got \(1, 6, 4\)"),
        (lambda: bernoulli((3, 4, 2), (4, 2, 3)), r"Expected sites of shape \(3, 4, 2\) .*; got \(4, 2, 3\)"),
        (lambda: bernoulli((1, 4, 6), (1, 4, 5)), r"Expected event_shape of 24 sites"),
        (lambda: bernoulli((2, 4, 6), (6, 8)), r"Expected sites of shape \(2, 4, 6\) .*; got \(6, 8\)"),
        (
            lambda: PixelCNN((2, 4, 6), 1).order_of((2, 5, 6)),
            r"Expected sites of shape \(2, 4, 6\) .*; got \(2, 5, 6\)",
        ),
        (
            lambda: Given(bernoulli((2, 4, 6), (48,)).conditioner, heads.Bernoulli(), (4, 6), prefix=torch.ones(24)),
            r"Expected sites of shape \(2, 4, 6\) .*; got \(4, 6\)",
        ),
        (lambda: bernoulli((1, 4, 6), (4, 6))().log_prob(torch.zeros(24)), r"Expected value\.shape\[-2:\] == \(4, 6\)"),
        (
            lambda: gx.OrderEnsemble(bernoulli((2, 4, 6), (2, 4, 6)), 2),
            r"Expected a conditioner whose weights belong to variables; got PixelCNN",
        ),
    ],
)
def test_errors(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_copy_of_inference_rows():
    """Rows of a state are copied in the middle of a pixel, and continue as those that were never copied."""
    net = built(PixelCNN((3, 2, 3), 2, width=4, depth=2, first_kernel=3))
    y, _ = conditioner_inputs(net, 4)
    with torch.inference_mode():
        _, state = net.start(None, 4)
        _, state = net.extend(y[:, :10], state)
        branch = net.reorder(state, torch.tensor([3, 0]))
        phi, _ = net.extend(y[[3, 0], 10:17], branch)
    torch.testing.assert_close(phi, net(y)[[3, 0], 11:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("enabled", [True, False])
def test_states_keep_no_views(enabled):
    """The memory of a state does not depend on how its sites were cut into chunks."""
    net = built(PixelCNN((2, 9, 3), 1, width=4, depth=2))
    y, _ = conditioner_inputs(net, 2)

    def memory(sizes):
        _, state = net.start(None, 2)
        for part in y[:, : sum(sizes)].split(sizes, 1):
            _, state = net.extend(part, state)
        return sum(t.untyped_storage().nbytes() for t in tree_leaves(state[2:8]))

    with torch.set_grad_enabled(enabled):
        assert memory([45]) < 1.5 * memory([6] * 7 + [3])
