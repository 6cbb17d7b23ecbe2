"""Every test starts from one random seed, in float32, on one thread, its shapes checked.

Where beartype is not installed (a rented GPU, say) the shapes are not checked.
"""

import importlib.util
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["MPLBACKEND"] = "Agg"

import jaxtyping
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Before anything imports heed: from here on a wrong shape in a signature is an error. An int is a
# float here, as it is for mypy.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
if importlib.util.find_spec("beartype"):
    jaxtyping.install_import_hook("heed", CHECKER)


@pytest.fixture(autouse=True)
def same_start():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)


@pytest.fixture
def unchecked():
    """No shape checks at run time: what a reader sees who passes nonsense to the package."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
