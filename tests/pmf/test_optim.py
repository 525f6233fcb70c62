import copy
import math
import pickle

import pytest
import torch

import pmf
from pmf.optim import (
    EMA,
    Averages,
    Muon,
    NesterovAdam,
    OptimizerConfig,
    build_optimizers,
    learning_rate,
    split_parameters,
)
from tests.networks import TINY


def test_linear_weights_go_to_muon_and_the_rest_to_adam():
    model = pmf.create_model(TINY)
    muon, adam = ({id(p) for p in group} for group in split_parameters(model))
    names = {n: p for n, p in model.named_parameters()}
    assert len(muon) + len(adam) == len(names) and not muon & adam
    for name, p in names.items():
        linear = name.endswith("weight") and any(
            part in name for part in ("_proj.", ".w1.", ".w2.", ".w3.", ".fc1.", ".fc2.", ".linear.")
        )
        assert (id(p) in muon) == linear, name


def newton_schulz(update, steps):
    """The quintic iteration, from its definition."""
    a, b, c = 3.4445, -4.775, 2.0315
    x = update / update.norm()
    wide = x if x.shape[0] <= x.shape[1] else x.T
    for _ in range(steps):
        g = wide @ wide.T
        wide = a * wide + (b * g + c * g @ g) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T


def ahead(mean, gradient, beta, t):
    """Nesterov's lookahead, with bias correction of each term."""
    return beta * mean / (1 - beta ** (t + 1)) + (1 - beta) * gradient / (1 - beta**t)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (8, 8)])
def test_muon_follows_its_definition_from_the_first_step(shape):
    torch.manual_seed(0)
    linear = torch.nn.Linear(shape[1], shape[0], dtype=torch.float64)
    muon = build_optimizers(linear, OptimizerConfig(learning_rate=0.1))["muon"]
    expected, mean = linear.weight.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    for t in range(1, 6):
        gradient = torch.randn(shape, dtype=torch.float64)
        linear.weight.grad = gradient.clone()
        muon.step()
        mean = 0.95 * mean + 0.05 * gradient
        expected -= 0.1 * math.sqrt(max(1, shape[0] / shape[1])) * newton_schulz(ahead(mean, gradient, 0.95, t), 5)
    assert (linear.weight - expected).abs().max() < 1e-6  # the 1e-8 added to norms changes it by about as much
    assert muon.state[linear.weight]["step"] == 5


def test_adam_follows_its_definition_and_counts_each_parameters_steps():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 4, dtype=torch.float64)
    model.gate = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    adam = build_optimizers(model, OptimizerConfig(learning_rate=0.1, adam_eps=1e-3))["adam"]
    for p in (model.bias, model.gate):
        p.expected, p.mean, p.square, p.t = p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p), 0
    for step in range(6):
        for p in (model.bias, model.gate):
            p.grad = None
            if step % 2 and p is model.gate:  # without a gradient every other step: unchanged
                continue
            p.grad, p.t = torch.randn_like(p) * 10.0**-step, p.t + 1
            p.mean, p.square = 0.9 * p.mean + 0.1 * p.grad, 0.95 * p.square + 0.05 * p.grad**2
            update = ahead(p.mean, p.grad, 0.9, p.t) / ((p.square / (1 - 0.95**p.t)).sqrt() + 1e-3)
            p.expected = p.expected - 0.1 * update
        adam.step()
    for p in (model.bias, model.gate):
        assert (p - p.expected).abs().max() < 1e-14
        assert adam.state[p]["step"] == p.t


def test_steps_are_counted_whatever_the_defaults_of_pytorch_are():
    linear = torch.nn.Linear(4, 3)
    optimizers = build_optimizers(linear, OptimizerConfig()).values()
    torch.set_default_dtype(torch.bfloat16)  # counts only to 256
    try:
        with torch.device("meta"):
            for _ in range(300):
                for p in linear.parameters():
                    p.grad = torch.ones_like(p, device="cpu")
                for part in optimizers:
                    part.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(state["step"] == 300 for part in optimizers for state in part.state.values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_of_optimizers_take_the_same_steps(copied):
    linear = torch.nn.Linear(4, 3)
    pair = linear, build_optimizers(linear, OptimizerConfig())

    def step(network, optimizers):
        for p in network.parameters():
            p.grad = torch.ones_like(p)
        for part in optimizers.values():
            part.step()

    step(*pair)
    twin = copied(pair)
    step(*pair)
    step(*twin)
    assert all(torch.equal(p, q) for p, q in zip(linear.parameters(), twin[0].parameters(), strict=True))


def test_zero_gradients_move_nothing():
    linear = torch.nn.Linear(4, 3)
    before = [p.detach().clone() for p in linear.parameters()]
    for p in linear.parameters():
        p.grad = torch.zeros_like(p)
    for part in build_optimizers(linear, OptimizerConfig()).values():
        part.step()
    assert all(torch.equal(p, b) for p, b in zip(linear.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        dict(learning_rate=-1.0),
        dict(clip_norm=-1.0),
        dict(decay_share=-1.0),
        dict(newton_schulz_steps=500),
        dict(warmup_steps=-1),
        dict(decay="step"),
        dict(decay_to=2.0),
    ],
)
def test_impossible_optimizers_are_refused(change):
    with pytest.raises(pmf.InputError, match=f"optimizer.{next(iter(change))}: expected (one of|>=? 0|in \\[)"):
        OptimizerConfig(**change)


def test_learning_rate_is_constant_unless_decay_is_asked_for():
    assert learning_rate(OptimizerConfig(), 99, 100) == 1e-3
    decayed = OptimizerConfig(learning_rate=1.0, decay_share=0.1)
    assert [learning_rate(decayed, step, 100) for step in (0, 90, 95, 99)] == pytest.approx([1.0, 1.0, 0.5, 0.1])


def rates(steps, **changes):
    return [learning_rate(OptimizerConfig(learning_rate=2.0, **changes), step, steps) for step in range(steps)]


def test_learning_rate_warms_up_from_zero():
    assert rates(6, warmup_steps=4) == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates(4, warmup_steps=8) == pytest.approx([0.0, 0.25, 0.5, 0.75])  # warm-up longer than the run
    assert rates(6, warmup_steps=2, decay_share=1.0) == pytest.approx([0.0, 1.0, 2.0, 1.5, 1.0, 0.5])


def test_learning_rate_falls_along_a_cosine_to_its_end():
    cosine = [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * x / 8)) / 2) for x in range(8)]
    assert rates(8, decay="cosine", decay_share=1.0, decay_to=0.1) == pytest.approx(cosine)
    tail = rates(16, decay="cosine", decay_share=0.5, decay_to=0.1)
    assert tail == pytest.approx([2.0] * 8 + cosine)
    assert rates(4, decay_share=1.0, decay_to=0.5) == pytest.approx([2.0, 1.75, 1.5, 1.25])


def test_ema_follows_the_published_ramp():
    model = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(model, half_life_kimg=1.0)
    value = ema.average["weight"].item()
    batch = 100
    for step in range(300):
        with torch.no_grad():
            model.weight.fill_(float(step))
        images = (step + 1) * batch  # the step just taken counts
        ema.update(model, batch, images)
        beta = 0.5 ** (batch / min(1000.0, 0.05 * images))
        value = beta * value + (1 - beta) * step
    assert ema.average["weight"].item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("name", ("muon", "adam"))
def test_a_closure_is_evaluated_before_the_step(name):
    """As training frameworks hand it over: it computes the gradients."""
    models = [pmf.create_model(TINY) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    plain, handed = (build_optimizers(model, OptimizerConfig())[name] for model in models)

    def evaluate(model):
        loss = sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    loss = evaluate(models[0])
    assert plain.step() is None
    assert torch.equal(handed.step(lambda: evaluate(models[1])), loss)
    for expected, found in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize(
    ("network", "names"),
    [
        (torch.nn.Linear(3, 3, bias=False), {"muon"}),
        (torch.nn.Conv2d(3, 3, 3), {"adam"}),
        (torch.nn.Linear(3, 3), {"muon", "adam"}),
    ],
)
def test_an_optimizer_without_parameters_is_left_out(network, names):
    assert build_optimizers(network, OptimizerConfig()).keys() == names


def test_what_optimizers_and_averages_cannot_take_is_named():
    with pytest.raises(pmf.InputError, match="model: expected parameters, got none"):
        build_optimizers(torch.nn.ReLU(), OptimizerConfig())
    with pytest.raises(
        pmf.InputError, match=r"parameters: expected matrices, as of split_parameters, got \[4, 3, 3, 3\]"
    ):
        Muon(torch.nn.Conv2d(3, 4, 3).parameters(), lr=0.02)
    matrix, vector = (torch.nn.Parameter(torch.ones(size)) for size in ((3, 3), (3,)))
    for optimizer, group, named in (
        (Muon([matrix], lr=1), dict(params=[vector]), "parameters"),
        (Muon([matrix], lr=1), dict(params=[torch.nn.Parameter(matrix)], momentum=2), "lr, momentum, steps"),
        (NesterovAdam([matrix], lr=1), dict(params=[vector], betas=(0.9, 1.0)), "lr, betas, eps"),
    ):
        with pytest.raises(pmf.InputError, match=f"^{named}: expected"):
            optimizer.add_param_group(group)
        assert [group["params"] for group in optimizer.param_groups] == [[matrix]]
    for average in (EMA(torch.nn.Linear(3, 3), 500), Averages(torch.nn.Linear(3, 3), (500, 1000), every=2)):
        pending = [ema.pending for ema in (average.values() if isinstance(average, Averages) else [average])]
        with pytest.raises(pmf.InputError, match="model: expected the parameters that the average was made of"):
            average.update(torch.nn.Linear(3, 4), 2, 2)
        with pytest.raises(pmf.InputError, match="model: expected the parameters that the average was made of"):
            average.update(torch.nn.Linear(3, 3, dtype=torch.bfloat16), 2, 2)
        with pytest.raises(pmf.InputError, match="model: expected Module"):
            average.update(None, 2, 2)
        left = [ema.pending for ema in (average.values() if isinstance(average, Averages) else [average])]
        assert left == pending


def test_averages_are_of_the_weights_of_the_same_name():
    ones, nines = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for layer, value in ((ones, 1.0), (nines, 9.0)):
        torch.nn.init.constant_(layer.weight, value)
        torch.nn.init.constant_(layer.bias, value)
    ema = EMA(torch.nn.ModuleDict({"a": ones, "b": nines}), 1)
    ema.update(torch.nn.ModuleDict({"b": nines, "a": ones}), 8, 8)
    ema.update(torch.nn.ModuleDict({"module": torch.nn.ModuleDict({"b": nines, "a": ones})}), 8, 16)  # as DDP wraps
    assert [value.unique().item() for value in ema.average.values()] == [1, 1, 9, 9]


@pytest.mark.parametrize("kind", [Muon, NesterovAdam])
def test_a_state_that_is_not_of_this_optimizer_changes_nothing(kind):
    def stepped(kind, size=(3, 3), **options):
        weight = torch.nn.Parameter(torch.ones(size))
        optimizer = kind([weight], lr=0.1, **options)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        return optimizer

    optimizer, own = stepped(kind), stepped(kind).state_dict()
    before = copy.deepcopy(optimizer.state_dict())
    group, state = own["param_groups"][0], own["state"][0]
    for given in (
        None,
        {},
        stepped(torch.optim.SGD, momentum=0.9).state_dict(),
        stepped(torch.optim.RMSprop).state_dict(),
        stepped(kind, (3, 4)).state_dict(),
        {**own, "param_groups": [{**group, "lr": -1.0}]},
        {**own, "state": {0: {"step": state["step"]}}},
        {**own, "state": {0: {name: value for name, value in state.items() if name != "step"}}},
        {**own, "state": {0: {**state, "step": 3}}},
        {**own, "state": {0: [1]}},
        {**own, "param_groups": None},
        {**own, "state": {0: {**state, "step": torch.tensor(-1.0)}}},
    ):
        with pytest.raises(pmf.InputError, match=r"^(state_dict|lr.*): expected ") as error:
            optimizer.load_state_dict(given)
        assert "\n" not in str(error.value)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][0][name], value) for name, value in before["state"][0].items())
    optimizer.register_load_state_dict_pre_hook(lambda _, given: given["inner"])
    optimizer.load_state_dict({"inner": own | {"state": {}}})  # of an optimizer that has taken no step
    assert not optimizer.state
