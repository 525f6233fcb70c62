"""Without a GPU the kernels run in Triton's interpreter; allocations hold NaN until they are written."""

import importlib
import os
import signal

import pytest
import torch

from tests.kernels.interpreter import interpret

for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:  # in a shell's background, which the tests' processes inherit
        signal.signal(_number, _handler)

if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # makes cuBLAS products deterministic
    torch.backends.cudnn.allow_tf32 = False  # full float32 convolutions, as products are by default
else:
    interpret()


@pytest.fixture(scope="session", autouse=True)
def poisoned_allocations():
    """Make torch.empty and the like return NaN, in fixtures too: exposes values that a kernel forgets to write."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def signals():
    """Fail where a test leaves Ctrl-C to another handler: processes that later tests start would inherit it."""
    before = signal.getsignal(signal.SIGINT)
    yield
    after = signal.signal(signal.SIGINT, before)
    assert after is before


@pytest.fixture(autouse=True)
def found_handlers():
    """Forget which handlers pmf.jvp found: a test that compiles meets every function first, as a process may."""
    importlib.import_module("pmf.tangents.call")  # which registers all rules
    from pmf.tangents.rules import HANDLERS

    before = dict(HANDLERS)
    yield
    HANDLERS.clear()
    HANDLERS.update(before)


@pytest.fixture(scope="session")
def fidelity():
    """The package torch_fidelity; skips the test if it cannot be imported."""
    try:
        import torch_fidelity
    except Exception as error:
        pytest.skip(f"torch-fidelity does not import here: {str(error).splitlines()[0]}")
    return torch_fidelity


@pytest.fixture(scope="session")
def inception_weights(fidelity, tmp_path_factory):
    """File of a random state dict for torch-fidelity's network, scaled so that its features differ between pictures."""
    with pytest.MonkeyPatch.context() as patch:  # its constructor loads weights, which do not exist yet
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        network = fidelity.FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path="none")
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    torch.nn.init.normal_(network.fc.weight)
    file = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture
def one_thread():
    """On a busy machine, threads that wait for one another would be measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
