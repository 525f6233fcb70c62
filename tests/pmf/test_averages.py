"""Averages that move every k steps, and on a thread beside training."""

import subprocess
import sys
import threading

import pytest
import torch

import pmf
from pmf.optim import EMA, Averages
from pmf.optim.background import Background, Staging
from tests.networks import TINY

HALF_LIVES = (0.01, 1.0)
BATCH = 4


def trained(averages, model, steps, first=0):
    """Let the model wander, and update its averages after each step."""
    for step in range(first, first + steps):
        averages.before_step()
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.add_(torch.sin(torch.arange(p.numel(), dtype=p.dtype) + i + step).view_as(p))
        averages.update(model, BATCH, (step + 1) * BATCH)


def held(averages):
    return {f"{name} {key}": v.clone() for name, ema in averages.items() for key, v in ema.average.items()}


def same(a, b):
    return a.keys() == b.keys() and len(a) > 0 and all(torch.equal(a[key], b[key]) for key in a)


def betas(half_life_kimg, steps):
    lives = [max(min(1000 * half_life_kimg, 0.05 * (step + 1) * BATCH), 1e-8) for step in range(steps)]
    return [0.5 ** (BATCH / life) for life in lives]


@pytest.mark.parametrize("background", [False, True])
def test_an_average_of_every_step_is_the_published_one_bit_for_bit(background):
    """As a lerp by 1 - beta, in the parameters' own dtype."""
    models = [pmf.create_model(TINY) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    averages = Averages(models[0], HALF_LIVES, background=background)
    expected = {k: [p.detach().clone() for p in models[1].parameters()] for k in HALF_LIVES}
    trained(averages, models[0], 4)
    for step in range(4):
        with torch.no_grad():
            for i, p in enumerate(models[1].parameters()):
                p.add_(torch.sin(torch.arange(p.numel(), dtype=p.dtype) + i + step).view_as(p))
        for k, values in expected.items():
            torch._foreach_lerp_(values, [p.detach() for p in models[1].parameters()], 1 - betas(k, 4)[step])
    for k, values in expected.items():
        assert all(map(torch.equal, averages[f"ema_{k:g}"].average.values(), values))


@pytest.mark.parametrize("background", [False, True])
def test_every_third_step_takes_the_product_of_three_betas(background):
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    averages = Averages(model, HALF_LIVES, every=3, background=background)
    expected = {k: model.weight.item() for k in HALF_LIVES}
    trained(averages, model, 2)
    assert all(
        ema.average["weight"].item() == expected[k] for k, ema in zip(HALF_LIVES, averages.values(), strict=True)
    )
    for updates in (1, 2, 3):
        trained(averages, model, 1 if updates == 1 else 3, first=3 * (updates - 1) + 2 * (updates == 1))
        for k, ema in zip(HALF_LIVES, averages.values(), strict=True):
            a, b, c = betas(k, 9)[3 * updates - 3 : 3 * updates]
            expected[k] = a * b * c * expected[k] + (1 - a * b * c) * model.weight.item()
            assert ema.average["weight"].item() == pytest.approx(expected[k], rel=1e-14)
            assert ema.pending == {"beta": 1.0, "updates": 0}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("stop", [3, 4, 5])
def test_an_average_continues_from_between_its_updates(every, stop):
    """Its values and what is pending are its state."""
    model = pmf.create_model(TINY)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    whole = Averages(model, HALF_LIVES, every=every)
    trained(whole, model, 7)
    model.load_state_dict(start)
    part = Averages(model, HALF_LIVES, every=every)
    trained(part, model, stop)
    resumed = Averages(model, HALF_LIVES, every=every, background=True)
    for name, ema in part.items():
        resumed[name].pending = dict(ema.pending)
        for key, value in resumed[name].average.items():
            value.copy_(ema.average[key])
    trained(resumed, model, 7 - stop, first=stop)
    assert same(held(resumed), held(whole)) and all(resumed[name].pending == ema.pending for name, ema in whole.items())


def test_training_goes_on_while_a_thread_moves_the_averages(monkeypatch):
    """The average is that of the weights at its update, whatever becomes of them meanwhile."""
    model = pmf.create_model(TINY)
    begun, free, move = threading.Event(), threading.Event(), EMA.move

    def slow(*arguments):
        begun.set()
        assert free.wait(60)
        move(*arguments)

    plain = Averages(model, HALF_LIVES)
    beside = Averages(model, HALF_LIVES, background=True)
    trained(plain, model, 1)
    expected = held(plain)
    monkeypatch.setattr(EMA, "move", slow)
    beside.update(model, BATCH, BATCH)  # returns although the thread is not done
    assert begun.wait(60) and any(t.name == "pmf-background" for t in threading.enumerate())
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    threading.Timer(0.2, free.set).start()
    assert same(held(beside), expected)  # reading waits
    assert free.is_set()


def test_an_error_of_the_thread_is_raised_by_every_later_call(monkeypatch):
    model = torch.nn.Linear(2, 2)
    averages = Averages(model, HALF_LIVES, every=2, background=True)
    trained(averages, model, 1)

    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(EMA, "move", fail)
    trained(averages, model, 1, first=1)
    for thread in threading.enumerate():
        if thread.name == "pmf-background":
            thread.join()
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(MemoryError, match="no room"):
            averages.update(model, BATCH, 3 * BATCH)  # one that moves nothing
        with pytest.raises(MemoryError, match="no room"):
            averages["ema_1"].state_dict()


def test_a_job_that_fails_is_raised_by_the_next_one():
    background = Background()
    background.run(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.run(lambda: None)


@pytest.mark.parametrize(
    ("patience", "job", "printed"),
    [
        (0.5, "threading.Event().wait", "end\n"),
        (10, "lambda: (time.sleep(1), print('done', flush=True))", "end\ndone\n"),
    ],
    ids=("hangs", "works"),
)
def test_the_end_of_a_process_waits_for_a_thread_that_works(patience, job, printed):
    script = (
        "import threading, time, pmf.optim.background as b\n"
        f"b.PATIENCE = {patience}\n"
        "work = b.Background()\n"
        f"work.run({job})\n"
        "print('end', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, printed, "")


def test_a_job_may_be_the_last_to_hold_its_background():
    script = (
        "import threading, pmf.optim.background as b\n"
        "go, work = threading.Event(), b.Background()\n"
        "work.run(go.wait)\n"
        "thread = work._threads[0]\n"
        "del work\n"
        "go.set()\n"
        "thread.join()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_staged_copies_keep_values_shapes_and_dtypes():
    tensors = [torch.rand(3, 5), torch.rand(7, dtype=torch.float64), torch.rand(2, 3).bfloat16(), torch.rand(())]
    tensors += [torch.rand(0, 4), torch.rand(4, 6)[:, ::2]]
    staging = Staging(tensors)
    staging.fill(tensors)
    for copy, value in zip(staging.wait(), tensors, strict=True):
        assert copy.dtype == value.dtype and torch.equal(copy, value)
    assert len({copy.untyped_storage().data_ptr() for copy in staging.copies}) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("every", [1, 3])
def test_averages_on_the_host_are_those_on_the_gpu(every):
    """To rounding: one of each lerp. The weights change at once after each update, while they are copied."""
    model = pmf.create_model(TINY, device="cuda")
    there, here = (Averages(model, HALF_LIVES, every=every, device=device) for device in (None, "cpu"))
    for step in range(9):
        here.before_step()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        for averages in (there, here):
            averages.update(model, BATCH, (step + 1) * BATCH)
    expected, found = held(there), held(here)
    assert all(value.device.type == "cpu" for value in found.values())
    for name, value in expected.items():
        assert (found[name] - value.cpu()).abs().max() <= 9 * torch.finfo(value.dtype).eps * value.abs().max(), name
