"""Tables of positions at another size: as the code that they come from, with gradients, in calls and on load."""

import re

import pytest
import torch
import torch.nn.functional as F
from equality import assert_same, outputs_and_gradients, randomise
from torch.func import functional_call

from fused_attn.modules import (
    AttentionAugmentedConv1d,
    AttentionAugmentedConv2d,
    GridAttention2d,
    RelPosAttention1d,
    RelPosAttention2d,
    WindowAttention2d,
    resize_state_dict,
)
from fused_attn.ops._floor.positions import Positions

#: Kind -> its description for maps of that size, and the entries of its table.
KINDS = {
    "linear": lambda h, w: (Positions((h,), -2, "linear"), (2 * h - 1, 3)),
    "linear, per head": lambda h, w: (Positions((h,), -2, "linear"), (2, 2 * h - 1, 3)),
    "bicubic": lambda h, w: (Positions((h, w), 0, "bicubic"), ((2 * h - 1) * (2 * w - 1), 3)),
    "geometric": lambda h, w: (Positions((h, w), 0, "geometric"), ((2 * h - 1) * (2 * w - 1), 3)),
    "positions": lambda h, w: (
        Positions((h, w), 1, "bicubic", relative=False, antialias=True, prefix=1), (1, 1 + h * w, 3),
    ),
}  # fmt: skip
SIZES = [((4, 4), (7, 7)), ((7, 7), (4, 4)), ((3, 5), (6, 4)), ((3, 5), (3, 9)), ((2, 2), (9, 9)), ((1, 1), (4, 4))]


def close(found, expected, tolerance=1e-6):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_biases_of_windows_as_swin_and_timm(timm, old, new):
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table, resize_rel_pos_bias_table_simple

    positions, shape = KINDS["bicubic"](*old)
    table, grid = torch.randn(shape), [2 * length - 1 for length in new]
    # Its other layout, (heads, rows, columns), takes windows that are not square.
    by_head = table.T.unflatten(1, positions.grid(old))
    bicubic = resize_rel_pos_bias_table_simple(by_head, new, (3, *grid)).flatten(1).T
    close(positions.resized(table, new), bicubic)
    if old != (1, 1):  # timm has no sample beside the only one
        geometric = resize_rel_pos_bias_table(table, new, (grid[0] * grid[1], 3), old_window_size=old)
        close(KINDS["geometric"](*old)[0].resized(table, new), geometric)
        assert (geometric - bicubic).abs().max() > 1e-3


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_positions_of_a_vision_transformer_as_timm(timm, old, new):
    positions, shape = KINDS["positions"](*old)
    table = torch.randn(shape)
    close(positions.resized(table, new), timm.layers.resample_abs_pos_embed(table, list(new), list(old)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tables_gradient_is_exact(kind):
    positions, shape = KINDS[kind](3, 2)
    table = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for new in ((5, 4), (2, 2)):
        new = new[: len(positions.size)]
        assert torch.autograd.gradcheck(lambda t, new=new: positions.resized(t, new), table)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_each_dtype_is_the_float64_result_rounded(kind, dtype):
    positions, shape = KINDS[kind](4, 3)
    new = (6, 7)[: len(positions.size)]
    table = torch.randn(shape).to(dtype)
    found = positions.resized(table, new)
    assert found.dtype == dtype
    close(found.double(), positions.resized(table.double(), new), 4 * torch.finfo(dtype).eps)
    assert positions.resized(table, positions.size) is table


def interpolated(table, grid, mode):
    """Written out for a table whose positions come first, (*old grid, channels)."""
    return F.interpolate(table.movedim(-1, 0)[None], size=grid, mode=mode)[0].movedim(0, -1)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("grid", [(6, 7), (3, 7), (2, 3)])
def test_relative_attention_on_other_maps(impl, per_head, grid):
    """As a module of the map's size with the tables that are interpolated outside; gradients reach the stored ones."""
    options = {"per_head_tables": per_head, "impl": impl}
    module = randomise(RelPosAttention2d(6, 8, 4, 2, (5, 4), resize_tables=True, **options))
    other = RelPosAttention2d(6, 8, 4, 2, grid, **options)
    x = torch.randn(2, 6, *grid, requires_grad=True)
    parameters = dict(module.named_parameters())

    def expected():
        tables = {}
        for name, size in zip(("rel_h", "rel_w"), grid, strict=True):
            heads = parameters[name] if per_head else parameters[name][None]
            table = torch.stack([interpolated(head, (2 * size - 1,), "linear") for head in heads])
            tables[name] = table if per_head else table[0]
        return functional_call(other, {**parameters, **tables}, (x,))

    tensors = {"x": x, **parameters}
    assert_same(outputs_and_gradients(lambda: module(x), tensors), outputs_and_gradients(expected, tensors))


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("length", [9, 5])
def test_relative_attention_on_other_lengths(impl, per_head, length):
    options = {"per_head_tables": per_head, "impl": impl}
    module = randomise(RelPosAttention1d(6, 8, 4, 2, 7, resize_tables=True, **options))
    other = RelPosAttention1d(6, 8, 4, 2, length, **options)
    x = torch.randn(2, 6, length, requires_grad=True)
    padding = torch.arange(length) > torch.tensor([[3], [length]])
    parameters = dict(module.named_parameters())

    def expected():
        heads = parameters["rel_table"] if per_head else parameters["rel_table"][None]
        table = torch.stack([interpolated(head, (2 * length - 1,), "linear") for head in heads])
        return functional_call(other, {**parameters, "rel_table": table if per_head else table[0]}, (x, padding))

    tensors = {"x": x, **parameters}
    assert_same(outputs_and_gradients(lambda: module(x, padding), tensors), outputs_and_gradients(expected, tensors))

    # On load, the same table.
    state = AttentionAugmentedConv1d(6, 24, 3, 1, 7, heads=2).state_dict()
    longer = AttentionAugmentedConv1d(6, 24, 3, 1, length, heads=2)
    resized, lines = resize_state_dict(longer, state)
    assert lines == [f"attention.rel_table from 7 to {length}, linear"]
    longer.load_state_dict(resized)
    table = interpolated(state["attention.rel_table"], (2 * length - 1,), "linear")
    torch.testing.assert_close(longer.attention.rel_table.detach(), table)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize(
    ("make", "call", "grid", "size"),
    [
        (WindowAttention2d, {"window": (5, 6)}, (10, 11), (5, 6)),
        (WindowAttention2d, {"window": 8}, (6, 7), (6, 7)),
        (WindowAttention2d, {}, (3, 9), (3, 4)),  # a window that the map cuts
        (GridAttention2d, {"grid": (5, 2)}, (10, 6), (5, 2)),
    ],
)
def test_windows_of_other_sizes(impl, make, call, grid, size):
    module = randomise(make(8, 2, (4, 4), resize_tables=True, impl=impl))
    other = make(8, 2, size, impl=impl)
    x = torch.randn(2, 8, *grid, requires_grad=True)
    parameters = dict(module.named_parameters())

    def expected():
        table = parameters["relative_position_bias_table"].unflatten(0, (7, 7))
        table = interpolated(table, [2 * length - 1 for length in size], "bicubic").flatten(0, 1)
        return functional_call(other, {**parameters, "relative_position_bias_table": table}, (x,))

    tensors = {"x": x, **parameters}
    assert_same(outputs_and_gradients(lambda: module(x, **call), tensors), outputs_and_gradients(expected, tensors))


def test_a_smaller_window_of_a_call_takes_the_middle_of_the_table():
    module = randomise(WindowAttention2d(8, 2, 4, 1))
    other = WindowAttention2d(8, 2, 3, 1)
    middle = module.bias_table((3, 3)).permute(1, 2, 0).flatten(0, 1)
    x = torch.randn(2, 8, 7, 6)
    expected = functional_call(other, {**module.state_dict(), "relative_position_bias_table": middle}, (x,))
    torch.testing.assert_close(module(x, window=3), expected)


#: A module with tables and one like it of another size, which holds them.
LOADED = {
    "RelPosAttention2d": lambda size: RelPosAttention2d(6, 8, 4, 2, size, per_head_tables=True),
    "AttentionAugmentedConv2d": lambda size: AttentionAugmentedConv2d(6, 20, 3, 1, size, heads=2),
    "WindowAttention2d": lambda size: WindowAttention2d(6, 2, size),
    "GridAttention2d": lambda size: GridAttention2d(6, 2, size),
    "inside another": lambda size: torch.nn.Sequential(torch.nn.Identity(), WindowAttention2d(6, 2, size)),
}


@pytest.mark.parametrize("label", LOADED)
@pytest.mark.parametrize("new", [(6, 6), (3, 3), (4, 7)])
def test_a_state_dict_of_another_size_loads_when_asked_to(label, new):
    """And the module is then the one that interpolates at every call."""
    old, module = randomise(LOADED[label]((4, 4))), LOADED[label](new)
    state = old.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"maps of another size: fused_attn.modules.resize_state_dict\(module"):
            module.load_state_dict(state, strict=strict)
    resized, lines = resize_state_dict(module, state)
    assert all(torch.equal(state[name], before[name]) for name in before)
    tables = [name for name in state if "rel_" in name or "table" in name]
    changed = [name for name in tables if resized[name].shape != state[name].shape]
    assert [line.split(" from ")[0] for line in lines] == changed
    assert all(resized[name] is state[name] for name in state if name not in changed)
    assert resized._metadata == state._metadata
    module.load_state_dict(resized)

    for part in old.modules():
        if hasattr(part, "resize_tables"):
            part.resize_tables = True
    x = torch.randn(2, 6, *new)
    call = {"GridAttention2d": {"grid": new}, "WindowAttention2d": {"window": new}}.get(label, {})
    if label != "inside another":
        torch.testing.assert_close(module(x), old(x, **call))


def test_the_lines_say_what_was_done():
    module = WindowAttention2d(6, 2, (7, 5))
    state = WindowAttention2d(6, 2, 4).state_dict()
    name = "relative_position_bias_table"
    assert resize_state_dict(module, state)[1] == [f"{name} from 4x4 to 7x5, bicubic"]
    assert resize_state_dict(module, state, bias_method="geometric")[1] == [f"{name} from 4x4 to 7x5, geometric"]
    rel = RelPosAttention2d(6, 8, 4, 2, (5, 4))
    lines = resize_state_dict(rel, RelPosAttention2d(6, 8, 4, 2, (3, 4)).state_dict())[1]
    assert lines == ["rel_h from 3 to 5, linear"]


def test_maps_that_are_not_square_need_their_size():
    """(2, 5) and (5, 2) have 27 positions, as have (14, 1); (4, 4) and (1, 25) have 49."""
    state = randomise(WindowAttention2d(6, 2, (2, 5))).state_dict()
    module, name = WindowAttention2d(6, 2, 4), "relative_position_bias_table"
    with pytest.raises(
        ValueError, match=rf"{name} must hold \(2 \* H - 1\)\*\*2 entries, .* \(27, 2\); .* need source"
    ):
        resize_state_dict(module, state)
    with torch.device("meta"):
        source, flat = WindowAttention2d(6, 2, (2, 5)), WindowAttention2d(6, 2, (5, 2))
    found = resize_state_dict(module, state, source=source)[0][name]
    expected = interpolated(state[name].unflatten(0, (3, 9)), (7, 7), "bicubic").flatten(0, 1)
    torch.testing.assert_close(found, expected)
    # Of the same number of positions: left alone unless its size is said to be another.
    assert resize_state_dict(flat, state)[0][name] is state[name]
    assert not torch.equal(resize_state_dict(flat, state, source=source)[0][name], state[name])


def test_several_names_of_one_module():
    shared = WindowAttention2d(6, 2, 3)
    state = torch.nn.ModuleDict({"a": shared, "b": shared}).state_dict()
    larger = WindowAttention2d(6, 2, 5)
    module = torch.nn.ModuleDict({"a": larger, "b": larger})
    resized, lines = resize_state_dict(module, state)
    assert len(lines) == 2
    module.load_state_dict(resized)


def test_what_does_not_fit_for_another_reason_is_still_refused():
    module = RelPosAttention2d(6, 8, 4, 2, (5, 5))
    for other in (RelPosAttention2d(6, 16, 4, 2, (4, 4)), RelPosAttention2d(6, 8, 4, 2, (4, 4), per_head_tables=True)):
        resized, lines = resize_state_dict(module, other.state_dict())
        assert lines == []
        with pytest.raises(RuntimeError, match="size mismatch for rel_h") as error:
            module.load_state_dict(resized)
        assert "another size" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda m, s: resize_state_dict(m, s, bias_method="linear"),
            "bias_method must be one of 'bicubic', 'geometric'",
        ),
        (
            lambda m, s: resize_state_dict(m, {**s, "rel_h": torch.zeros(8, 4)}),
            r"rel_h must hold 2 \* H - 1 entries, for a square map, got shape \(8, 4\)",
        ),
        (
            lambda m, s: resize_state_dict(m, {**s, "rel_h": torch.zeros(0, 4)}),
            r"rel_h must hold .* got shape \(0, 4\)",
        ),
        (
            lambda m, s: resize_state_dict(m, s, source=RelPosAttention2d(6, 8, 4, 2, (9, 3))),
            r"source must have rel_h in the state dict's shape \(5, 4\), got one of shape \(17, 4\)",
        ),
        (lambda m, s: resize_state_dict(m, s, source=torch.nn.ReLU()), "source must have rel_h in .*, got none"),
        (lambda m, s: m(torch.randn(1, 6, 5, 6)), r"at most size=\(5, 5\), .* got \(5, 6\); with resize_tables=True"),
        (lambda m, s: m(torch.randn(1, 6, 0, 5)), r"x must have a height and width of at least 1, got \(1, 6, 0, 5\)"),
        (
            lambda m, s: WindowAttention2d(8, 2, 4)(torch.randn(1, 8, 9, 9), window=5),
            r"windows must be at most \(4, 4\) large, got \(5, 5\); with resize_tables=True",
        ),
        (
            lambda m, s: WindowAttention2d(8, 2, 4, 2)(torch.randn(1, 8, 9, 9), window=2),
            r"window must be larger than shift=\(2, 2\) along each axis, got 2",
        ),
        (
            lambda m, s: WindowAttention2d(8, 2, 4)(torch.randn(1, 8, 9, 9), window=(3, 0)),
            r"window must be a positive number or two of them \(h, w\), got \(3, 0\)",
        ),
        (
            lambda m, s: WindowAttention2d(8, 2, 4)(torch.randn(1, 8, 9, 9), window=4.5),
            r"window must be a positive number or two of them \(h, w\), got 4.5",
        ),
        (
            lambda m, s: WindowAttention2d(8, 2, 4, resize_tables=True).bias_table((0, 3)),
            r"size must be a positive number or two of them \(h, w\), got \(0, 3\)",
        ),
        (
            lambda m, s: GridAttention2d(8, 2, 4, resize_tables=True)(torch.randn(1, 8, 8, 8), grid=3),
            r"x must have multiples of grid=\(3, 3\) as height and width",
        ),
    ],
)
def test_bad_input(call, match):
    module = RelPosAttention2d(6, 8, 4, 2, (5, 5))
    with pytest.raises(ValueError, match=match):
        call(module, RelPosAttention2d(6, 8, 4, 2, (3, 3)).state_dict())


def test_arguments_of_other_types():
    module = RelPosAttention2d(6, 8, 4, 2, (5, 5))
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got OrderedDict"):
        resize_state_dict(module.state_dict(), module)
    with pytest.raises(TypeError, match="state_dict must be a mapping of names to tensors, got RelPosAttention2d"):
        resize_state_dict(module, module)


@pytest.mark.parametrize(
    "change", [lambda t: t.to(torch.int8), lambda t: t.to(torch.float8_e4m3fn), torch.Tensor.to_sparse]
)
def test_what_cannot_be_interpolated_is_left_to_load_state_dict(change):
    module, state = RelPosAttention2d(6, 8, 4, 2, (5, 5)), RelPosAttention2d(6, 8, 4, 2, (3, 5)).state_dict()
    state["rel_h"] = change(state["rel_h"])
    resized, lines = resize_state_dict(module, state)
    assert (resized["rel_h"] is state["rel_h"], lines) == (True, [])
    with pytest.raises(RuntimeError, match="rel_h"):
        module.load_state_dict(resized)


def test_compiles_to_one_graph():
    """Also where another size makes the sizes symbols."""
    module = RelPosAttention2d(6, 8, 4, 2, (4, 4), resize_tables=True, impl="reference")
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for height in (6, 9):
        x = torch.randn(2, 6, height, 5)
        torch.testing.assert_close(compiled(x), module(x))
    torch._dynamo.reset()


def test_the_option_is_shown_and_old_modules_lack_it():
    assert "resize_tables=True" in repr(WindowAttention2d(8, 2, 4, resize_tables=True))
    assert not re.search("resize", repr(RelPosAttention2d(6, 8, 4, 2, (5, 5))))
    old = RelPosAttention2d(6, 8, 4, 2, (5, 5))
    del old.resize_tables  # as when it was pickled before there was one
    assert old(torch.randn(1, 6, 3, 5)).shape == (1, 4, 3, 5)
