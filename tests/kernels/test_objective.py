"""`pmf_objective` in Triton against the float64 reference and the authors' numbers."""

import contextlib

import pytest
import torch

import pmf
from pmf import ops
from pmf.errors import InputError
from pmf.kernels.objective import pmf_objective
from tests.kernels.checks import DEVICE, close, generator, randn, within_budget
from tests.networks import every_row_in_full, golden, relative_error

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ["net_u", "net_v", "net_u_dot", "net_c", "net_n", "z", "x", "t", "h", "guidance", "null_index"]


def inputs(batch, rows, guided, patch, size=32, channels=3, nets=F32, images=F32, seed=0):
    """All inputs of the op: `rows` rows with a tangent, `guided` rows with a null-class prediction.

    rows or guided None: the tensors are absent. The first and the last t are below the clip.
    """
    gen = generator(seed, batch, rows, guided, patch, size, channels)
    tokens = ((size // patch) ** 2, patch * patch * channels)

    def net(n):
        return None if n is None else randn(n, *tokens, gen=gen, dtype=nets)

    values = dict(net_u=net(batch), net_v=net(batch), net_u_dot=net(rows), net_c=net(rows), net_n=net(guided))
    values |= {name: randn(batch, channels, size, size, gen=gen, dtype=images) for name in ("z", "x")}
    t = torch.rand(batch, generator=gen)
    t[:1], t[-1:] = 0.02, 0.04
    index = torch.full((batch,), -1)
    index[torch.randperm(batch, generator=gen)[: guided or 0]] = torch.arange(guided or 0)
    scalars = dict(t=t, h=t * torch.rand(batch, generator=gen), guidance=torch.rand(batch, generator=gen))
    return values | {k: v.to(DEVICE) for k, v in scalars.items()} | dict(null_index=index.to(DEVICE))


def outcome(values, patch, impl, dtype=None):
    """L_u, L_v and the gradients of both heads, for weights that differ between rows."""
    if dtype is not None:
        values = {k: v if v is None or k == "null_index" else v.to(dtype) for k, v in values.items()}
    values = dict(values)
    for name in ("net_u", "net_v"):
        values[name] = values[name].detach().requires_grad_()
    losses = ops.pmf_objective(*(values[n] for n in NAMES), t_clip=0.05, patch_size=patch, impl=impl)
    weights = [torch.linspace(1, 2, len(loss), device=DEVICE, dtype=loss.dtype) for loss in losses]
    return (*losses, *torch.autograd.grad(losses, [values["net_u"], values["net_v"]], weights))


def check(values, patch):
    runs = [outcome(values, patch, "triton"), outcome(values, patch, "reference")]
    runs.append(outcome(values, patch, "reference", torch.float64))
    for name, *parts in zip(("L_u", "L_v", "dnet_u", "dnet_v"), *runs, strict=True):
        within_budget(name, *(part.detach() for part in parts))


DTYPES = ((F32, F32), (BF16, F32), (BF16, BF16), (F16, F32))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("patch", (2, 4, 8, 16, 32))
def test_patch_sizes(patch, dtypes):
    size = 64 if patch == 32 else 32
    check(inputs(4, 3, 2, patch, size, nets=dtypes[0], images=dtypes[1]), patch)


@pytest.mark.parametrize("guided", (None, 0, 1, 5))
@pytest.mark.parametrize("rows", (None, 0, 1, 5))
def test_rows(rows, guided):
    """Tangents and null-class predictions of no, some and all rows; sizes that are not powers of two."""
    check(inputs(5, rows, guided, 4, size=20, channels=2), 4)


@pytest.mark.parametrize("channels", (1, 4, 5, 17))
@pytest.mark.parametrize("patch", (3, 6, 8))
def test_channels(channels, patch):
    """Any number of channels, and patch widths that are not powers of two."""
    check(inputs(2, 1, 1, patch, size=24, channels=channels, nets=BF16), patch)


def test_published_shape_and_views():
    """256 x 256 with patches of 16, several programs per row; inputs that are views."""
    values = inputs(2, 1, 1, 16, size=256, nets=BF16)
    check(values, 16)
    for name in ("net_u", "net_v", "net_c"):
        values[name] = values[name].mT.contiguous().mT
    for name in ("z", "x"):
        values[name] = values[name].to(memory_format=torch.channels_last)
    check(values, 16)


def test_values_do_not_depend_on_what_is_not_read():
    """Rows without a tangent read neither z nor h; above the clip z cancels out of every row."""
    values = inputs(4, 2, 2, 4)
    values["t"] = values["t"].clamp(0.1)
    expected = outcome(values, 4, "triton")
    values["z"] = torch.full_like(values["z"], torch.nan)
    values["h"] = torch.cat([torch.full_like(values["h"][:2], torch.nan), values["h"][2:]])
    close(outcome(values, 4, "triton"), expected)


def test_an_index_out_of_range_reads_nothing_and_shows():
    values = inputs(4, 2, 2, 4)
    good = pmf_objective(*values.values(), t_clip=0.05, patch_size=4)
    values["null_index"] = values["null_index"].clone()
    values["null_index"][1] = 2**40
    bad = pmf_objective(*values.values(), t_clip=0.05, patch_size=4)
    for loss, expected in zip(bad, good, strict=True):
        assert torch.isnan(loss[1])
        assert torch.equal(loss[[0, 2, 3]], expected[[0, 2, 3]])


def test_no_temporaries_of_an_image_s_size(monkeypatch):
    """Launchers allocate only partial sums and the two gradients. (The interpreter makes copies; it does not run.)"""
    monkeypatch.setattr("pmf.kernels.registration.launch", lambda *_, **__: None)
    values, sizes = inputs(4, 2, 2, 16, size=64), []
    new_empty = torch.Tensor.new_empty

    def recorded(self, *size, **options):
        sizes.append(new_empty(self, *size, **options))
        return sizes[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", recorded)
    outcome(values, 16, "triton")
    large = [x for x in sizes if x.numel() >= values["x"][0].numel()]
    assert [x.shape for x in large] == [values["net_u"].shape] * 2


def test_compilers_and_checkpointing():
    values = inputs(4, 2, 2, 4)
    constants = [values[n] for n in NAMES[2:]]

    def run(net_u, net_v):
        return ops.pmf_objective(net_u, net_v, *constants, t_clip=0.05, patch_size=4, impl="triton")

    def outcome_of(function):
        leaves = [values[n].detach().requires_grad_() for n in ("net_u", "net_v")]
        losses = function(*leaves)
        return (*(loss.detach() for loss in losses), *torch.autograd.grad(sum(losses).square().sum(), leaves))

    expected = outcome_of(run)
    close(outcome_of(run), expected)
    torch._dynamo.reset()
    close(outcome_of(torch.compile(run, backend="aot_eager", fullgraph=True)), expected)
    close(outcome_of(lambda *n: torch.utils.checkpoint.checkpoint(run, *n, use_reentrant=False)), expected)
    with pytest.raises(RuntimeError, match="pmf_objective: net_u takes no tangent, got a dual tensor"):
        torch.func.jvp(run, (values["net_u"], values["net_v"]), (values["net_u"], values["net_v"]))


def test_registered_operators():
    arguments = (*inputs(4, 2, 2, 4).values(), 0.05, 4)
    ops.pmf_objective(*arguments[:-2], t_clip=0.05, patch_size=4, impl="triton")
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.pmf.objective_forward.default, arguments, test_utils=utils)
    scales = torch.ones(2, 4, device=DEVICE)
    torch.library.opcheck(torch.ops.pmf.objective_backward.default, (scales, *arguments), test_utils=utils)


@pytest.mark.parametrize("plan", (every_row_in_full, contextlib.nullcontext))
def test_golden(monkeypatch, plan):
    """On the golden network's outputs: the squared errors of the golden fields, and gradients within the budget."""
    numbers, calls, options = golden(), [], {}
    objective = ops.pmf_objective

    def recorded(*arguments, **given):
        calls.append(arguments)
        options.update(given)
        return objective(*arguments, **given)

    monkeypatch.setattr(ops, "pmf_objective", recorded)
    model = numbers.model(impl="reference")
    with plan():
        pmf.pmf_loss(model, numbers["in/x"], numbers["in/y"], numbers.draws, pmf.LossConfig())
    values = dict(zip(NAMES, (None if a is None else a.detach().to(DEVICE) for a in calls[0]), strict=True))
    monkeypatch.undo()
    check(values, options["patch_size"])

    found = outcome(values, options["patch_size"], "triton")[:2]
    order = torch.argsort(numbers.draws.fm_mask.int(), descending=True, stable=True)
    u, v, v_g, du_dt = (numbers[f"out/{name}"] for name in ("u", "v", "v_g", "du_dt"))
    h = (numbers.draws.t - numbers.draws.r)[:, None, None, None]
    for loss, error in zip(found, (u + h * du_dt - v_g, v - v_g), strict=True):
        assert relative_error(loss.detach().cpu(), error.square().sum((1, 2, 3))[order]) < 1e-5


def test_bad_input(monkeypatch):
    for module in ("tests.kernels.checks", __name__):  # refused on any device
        monkeypatch.setattr(f"{module}.DEVICE", "cpu")
    values = inputs(2, 1, 1, 4)
    short = values | dict(net_c=None)
    double = {k: v.double() if v.is_floating_point() else v for k, v in values.items()}
    for wrong, message in (
        (values | dict(t=values["t"][:1]), r"t must have shape \[2\], got \[1\]"),
        (values | dict(x=values["x"][:, :2]), r"x must have shape \[2, 3, 32, 32\], got \[2, 2, 32, 32\]"),
        (values | dict(net_v=values["net_v"][:, :3]), r"net_v must have shape \[2, 64, 48\], got \[2, 3, 48\]"),
        (short, "net_c must cover the same rows as net_u_dot"),
        (double, "dtype must be float32, bfloat16 or float16"),
    ):
        with pytest.raises(InputError, match=f"^pmf_objective: {message}") as error:
            ops.pmf_objective(*wrong.values(), t_clip=0.05, patch_size=4, impl="triton")
        assert "\n" not in str(error.value)
