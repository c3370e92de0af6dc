"""Agent attention against the authors' outputs and a slow loop, in all forms and ranks."""

import pytest
import torch

from visattn.attention import _agent, _resample, agent
from visattn.attention._resample import average_weights, linear_weights
from visattn.attention.agent import AgentAttention


def as_on_gpu(patch):
    """Take the way of few operators, which is a GPU's."""
    for module in (_agent, _resample, agent):
        patch.setattr(module, "launch_bound", lambda x: not torch.compiler.is_compiling())


@pytest.fixture(params=["cpu", "gpu"])
def way(request, monkeypatch):
    """Both ways of computing the same."""
    if request.param == "gpu":
        as_on_gpu(monkeypatch)


def randomised(block, std=0.4):
    """`block` in float64 with weights large enough that every one of them shows in the output."""
    block = block.double().eval()
    torch.manual_seed(1)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return block


def image(*shape):
    torch.manual_seed(2)
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("index", [0, 1])
def test_official_swin_form(golden, index, way):
    case = golden("agent_attention", "module_swin_w12_a9")
    block = case.load_into(AgentAttention(64, 4, agent_num=9, window_size=12))
    x = case.input(index)
    assert case.error(index, "out", block(x.reshape(-1, 12, 12, 64)).reshape(x.shape)) <= 1


@pytest.mark.parametrize("index", [0, 1])
def test_official_deit_form(golden, index, way):
    case = golden("agent_attention", "module_deit_w10_a16")
    block = case.load_into(AgentAttention(48, 3, variant="deit", agent_num=16, window_size=10, qkv_bias=False))
    assert case.error(index, "out", block(case.input(index))) <= 1


@pytest.mark.parametrize(
    "name", ["an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias", "ac_bias", "ca_bias"]
)
def test_the_official_outputs_pin_every_table(golden, name, way):
    case = golden("agent_attention", "module_deit_w10_a16")
    block = case.load_into(AgentAttention(48, 3, variant="deit", agent_num=16, window_size=10, qkv_bias=False))
    with torch.no_grad():
        getattr(block, name).zero_()
    assert case.error(0, "out", block(case.input(0))) > 5


@pytest.mark.parametrize(
    ("size", "agents"),
    [((7,), 3), ((1,), 4), ((5, 6), 4), ((3, 7), 16), ((1, 1), 9), ((2, 3, 4), 8), ((5, 1, 2), 1)],
)
@pytest.mark.parametrize(("variant", "sr_ratio"), [("swin", 1), ("deit", 1), ("pvt", 1), ("pvt", 2)])
def test_loops_agree(reference, variant, sr_ratio, size, agents, way):
    """Tables are stored for a map of side 4, so all but some axes are resized."""
    rank = len(size)
    block = AgentAttention(
        12, 3, variant=variant, rank=rank, agent_num=agents, window_size=4, sr_ratio=sr_ratio, qkv_bias=agents != 4
    )
    block = randomised(block)
    grid = (round(agents ** (1 / rank)),) * rank
    tokens = 1 + torch.Size(size).numel() if variant == "deit" else torch.Size(size).numel()
    x = image(2, tokens, 12)
    with torch.no_grad():
        out = block(x, size) if variant == "deit" else block(x.reshape(2, *size, 12)).flatten(1, -2)
        for each, result in zip(x, out, strict=True):
            expected = reference("agent").attend(each, block.state_dict(), 3, grid, size, variant, sr_ratio)
            torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("size", "agents", "split"),
    [((6, 6), 4, 3), ((5, 7), 9, 3), ((4, 5), 4, None), ((7, 3), 16, 5), ((3, 4, 5), 8, 2), ((5,), 3, 2)],
)
def test_loops_agree_on_strips(reference, size, agents, split, way):
    rank = len(size)
    grid = (round(agents ** (1 / rank)),) * rank
    block = AgentAttention(12, 6, variant="cswin", rank=rank, agent_num=agents, window_size=4, split_size=split)
    block = randomised(block)
    x = image(2, *size, 12)
    with torch.no_grad():
        for each, result in zip(x, block(x), strict=True):
            expected = reference("agent").strips(each, block.state_dict(), 6, grid, split, split is None)
            torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-11)


def test_a_strip_knows_nothing_of_the_others():
    """With strips 2 thick, a change in column 5 reaches columns 4 and 5 through the vertical strips alone."""
    block = randomised(AgentAttention(8, 2, variant="cswin", agent_num=4, window_size=6, split_size=2))
    block.attns[1].get_v.weight.data.zero_()
    x = image(1, 6, 6, 8)
    moved = x.clone()
    moved[:, 3, 5] += 1
    vertical = slice(0, 4)
    qkv, moved = (block.qkv(each).reshape(1, 6, 6, 3, 8)[..., vertical].movedim(3, 0) for each in (x, moved))
    change = (block.attns[0](qkv) - block.attns[0](moved)).abs().amax(dim=(0, 1, 3))
    assert (change[:4] == 0).all()
    assert (change[4:] > 1e-6).all()


def test_padding_of_strips_takes_no_part(way):
    """Of a map with a column left over, the whole strips do not change when that column is taken away."""
    block = randomised(AgentAttention(8, 2, variant="cswin", agent_num=4, window_size=4, split_size=2))
    x = image(1, 4, 5, 8)
    branch = block.attns[0]
    qkv = block.qkv(x).reshape(1, 4, 5, 3, 8)[..., :4].movedim(3, 0)
    alone = branch(qkv[:, :, :, :4])
    torch.testing.assert_close(branch(qkv)[:, :, :4], alone, rtol=1e-12, atol=1e-12)
    # A column of zeros that belongs to the map is not padding: it does take part.
    assert branch(qkv).isfinite().all()
    filled = torch.cat([qkv, torch.zeros_like(qkv[:, :, :, :1])], dim=3)
    assert (branch(filled)[:, :, 4] - branch(qkv)[:, :, 4]).abs().max() > 1e-3


@pytest.mark.parametrize(("source", "target"), [(7, 56), (7, 5), (1, 4), (9, 9), (13, 7), (4, 1)])
def test_matrices_do_what_torch_does(source, target):
    x = image(3, 2, source)
    linear = torch.nn.functional.interpolate(x, size=target, mode="linear", align_corners=False)
    pooled = torch.nn.functional.adaptive_avg_pool1d(x, target)
    torch.testing.assert_close(x @ linear_weights(source, target, x).mT, linear, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x @ average_weights(source, target, x).mT, pooled, rtol=1e-12, atol=1e-12)
    if source == target:
        assert torch.equal(linear_weights(source, target, x), torch.eye(source, dtype=x.dtype))


@pytest.mark.parametrize("kept", [0, 2**21])
@pytest.mark.parametrize(
    ("variant", "rank"), [("swin", 1), ("swin", 2), ("deit", 2), ("pvt", 2), ("cswin", 2), ("swin", 3)]
)
def test_both_ways_have_the_same_gradients(monkeypatch, variant, rank, kept):
    """Maps whose matrices are too large to keep are included; strips of the last size are padded."""
    size = (4, 5, 3)[:rank]
    block = randomised(
        AgentAttention(12, 2, variant=variant, rank=rank, agent_num=2**rank, window_size=4, split_size=2)
    )
    x = (image(2, 21, 12) if variant == "deit" else image(2, *size, 12)).requires_grad_()
    more = (size,) if variant == "deit" else ()
    inputs = [x, *block.parameters()]

    def results():
        out = block(x, *more)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    want = results()
    as_on_gpu(monkeypatch)
    monkeypatch.setattr(_agent, "KEPT", kept)
    monkeypatch.setattr(_resample, "KEPT", kept)
    for found, expected in zip(results(), want, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [linear_weights, average_weights])
def test_matrices_of_very_long_axes_are_not_kept(make):
    """Dozens of them would fill the memory."""
    like = torch.empty(0)
    assert make(7, 11, like) is make(7, 11, like)
    assert make(2**21, 2, like) is not make(2**21, 2, like)


def test_kept_matrices_serve_training_after_inference(monkeypatch):
    as_on_gpu(monkeypatch)
    block = randomised(AgentAttention(12, 2, agent_num=4, window_size=11))
    with torch.inference_mode():
        block(image(1, 11, 11, 12))
    block(image(1, 11, 11, 12)).sum().backward()
    assert block.an_bias.grad.abs().sum() > 0


def test_tables_resized_beforehand_give_the_same(way):
    """A block whose tables are stored for the map in use equals one whose tables are resized to it on the fly."""
    small = randomised(AgentAttention(12, 3, agent_num=4, window_size=(3, 5)))
    large = AgentAttention(12, 3, agent_num=4, window_size=(8, 6)).double().eval()
    state = small.state_dict()
    for name, size, axis in (("ah_bias", 8, -2), ("aw_bias", 6, -1), ("ha_bias", 8, 2), ("wa_bias", 6, 3)):
        table = state[name].movedim(axis, -1)
        line = torch.nn.functional.interpolate(table.flatten(0, -2)[None], size=size, mode="linear")[0]
        state[name] = line.reshape(*table.shape[:-1], size).movedim(-1, axis)
    large.load_state_dict(state)
    x = image(1, 8, 6, 12)
    torch.testing.assert_close(small(x), large(x), rtol=1e-12, atol=1e-12)


def test_another_grid_of_agents(way):
    """`agent_shape` resizes the agents' side of the tables; the stored grid itself changes nothing."""
    stored = randomised(AgentAttention(12, 3, agent_num=4, window_size=4))
    same = AgentAttention(12, 3, agent_num=4, window_size=4, agent_shape=2).double().eval()
    other = AgentAttention(12, 3, agent_num=4, window_size=4, agent_shape=(3, 5)).double().eval()
    for block in (same, other):
        block.load_state_dict(stored.state_dict())
    x = image(1, 6, 7, 12)
    assert torch.equal(stored(x), same(x))
    # Tables of equal value for all agents stay as they are whatever the grid, and then more agents mean finer ones.
    for block in (stored, other):
        for name, table in block.named_parameters(recurse=False):
            agents = 1 if name in ("an_bias", "na_bias") else (2 if name.startswith("a") else table.ndim - 1)
            table.data = table.data.select(agents, 0).unsqueeze(agents).expand_as(table).clone()
    constant = torch.ones(1, 6, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(stored(constant), other(constant), rtol=1e-12, atol=1e-12)
    assert (stored(x) - other(x)).abs().max() > 1e-3


def test_no_memory_of_the_order_of_all_pairs(way):
    """The largest intermediate of a 64 x 64 map holds agents times positions, not positions squared."""
    sizes = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):
            out = function(*arguments, **(keywords or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    block = AgentAttention(32, 1, agent_num=9)
    with Recorder(), torch.no_grad():
        block(torch.zeros(1, 64, 64, 32))
    assert 0 < max(sizes) <= 3 * 64 * 64 * 32


def test_dropout_only_in_training(way):
    block = AgentAttention(12, 3, agent_num=4, attn_drop=0.5, proj_drop=0.5)
    x = image(1, 6, 6, 12).float()
    assert torch.equal(block.eval()(x), block(x))
    assert not torch.equal(block.train()(x), block(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide dim=32: one of"),
        ({"agent_num": 10}, "to the power 2, as 4, 9 or 16, got 10"),
        ({"variant": "vit"}, "'swin', 'deit', 'pvt', 'cswin', got 'vit'"),
        ({"sr_ratio": 2}, "needs variant='pvt'"),
        ({"rank": 4}, "rank 1, 2, 3"),
        ({"window_size": (3, 4, 5)}, "window_size must be one integer or 2"),
        ({"variant": "cswin", "num_heads": 1}, "must be multiples of 2"),
        ({"attn_drop": 1.5}, "attn_drop must be a number in"),
    ],
)
def test_refused_arguments_say_what_is_valid(arguments, message):
    with pytest.raises(ValueError, match=message):
        AgentAttention(32, **arguments)


def test_refused_inputs_say_what_is_valid():
    with pytest.raises(ValueError, match=r"takes \(B, \*S, 32\) with 2 spatial axes"):
        AgentAttention(32)(torch.zeros(1, 5, 32))
    with pytest.raises(ValueError, match=r"only variant='deit' takes a size"):
        AgentAttention(32)(torch.zeros(1, 5, 5, 32), (5, 5))
    with pytest.raises(ValueError, match=r"x with 1 \+ 196 tokens"):
        AgentAttention(32, variant="deit")(torch.zeros(1, 50, 32))


@pytest.mark.parametrize(("variant", "size"), [("swin", (3, 5)), ("deit", (3, 5)), ("pvt", (3, 5)), ("cswin", (3, 5))])
def test_attention_map_is_the_weight_of_each_value(variant, size):
    """Without convolution and projection, the output is the weighted sum of the values."""
    block = randomised(AgentAttention(8, 2, variant=variant, agent_num=4, window_size=3, split_size=2))
    for name, parameter in block.named_parameters():
        if "dwc" in name or "get_v" in name or name == "proj.bias":
            parameter.data.zero_()
    block.proj.weight.data.copy_(torch.eye(8))
    token = variant == "deit"
    x = image(2, 16, 8) if token else image(2, *size, 8)
    weights = block.attention_map(x, (2, 4), size if token else None)
    assert weights.shape == (2, 2, *size)
    values = block._query_key_value(x)[2]
    expected = (block(x, size)[:, 1:].reshape(2, *size, 8) if token else block(x))[:, 2, 4]
    if token:
        values = values[:, 1:].reshape(2, *size, 8)
        rest = 1 - weights.sum((2, 3))
        expected = expected - (rest[..., None] * block._query_key_value(x)[2][:, 0].reshape(2, 2, 4)).reshape(2, 8)
    else:
        torch.testing.assert_close(weights.sum((2, 3)), torch.ones(2, 2, dtype=x.dtype))
    out = torch.einsum("bhyx,byxhd->bhd", weights, values.reshape(2, *size, 2, 4)).reshape(2, 8)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


def test_attention_map_of_reduced_keys_is_refused():
    with pytest.raises(ValueError, match="needs sr_ratio=1"):
        AgentAttention(8, variant="pvt", sr_ratio=2).attention_map(torch.zeros(1, 4, 4, 8), (0, 0))


@pytest.mark.slow  # tracing takes seconds
@pytest.mark.parametrize(
    "settings",
    [
        {"variant": "pvt", "sr_ratio": 2},
        {"variant": "pvt", "sr_ratio": 3},
        {"variant": "cswin", "split_size": 7},
        {"variant": "cswin", "split_size": 3},
        {"variant": "cswin", "split_size": None},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_other_forms_export_for_a_range_of_sizes(settings):
    """Numbers of strips and of reduced keys are quotients, of which a tracer knows little."""
    block = randomised(AgentAttention(16, 2, agent_num=4, window_size=8, **settings)).float()
    axes = {0: torch.export.Dim("batch", min=1, max=4)}
    axes |= {1: torch.export.Dim("height", min=9, max=24), 2: torch.export.Dim("width", min=9, max=24)}
    exported = torch.export.export(block, (torch.randn(2, 12, 10, 16),), dynamic_shapes=(axes,), strict=False)
    for batch, *size in ((1, 9, 9), (4, 24, 11), (3, 14, 21)):
        x = torch.randn(batch, *size, 16)
        torch.testing.assert_close(exported.module()(x), block(x), rtol=1e-4, atol=1e-5)
