"""A network that names a file of weights does not compute before somebody loads it."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoints.parts import load_parts
from ldm.errors import UserError
from ldm.util import instantiate_from_config
from tests.support import golden


@pytest.fixture(params=["autoencoder", "text encoder"])
def network(request, tmp_path):
    """A config that names a file, the weights in the file, and a call of the network."""
    if request.param == "autoencoder":
        config = copy.deepcopy(golden.RECORDED["first_stage_config"])
        call = lambda model: model.encode(torch.zeros(1, 3, 32, 32))  # noqa: E731
    else:
        target = "ldm.modules.encoders.modules.FrozenCLIPEmbedder"
        config = {"target": target, "params": {"text_config": golden.TEXT_CONFIG}}
        call = lambda model: model(["a dog"])  # noqa: E731
    state = instantiate_from_config(config).state_dict()
    save_file(
        {key: value.contiguous() for key, value in state.items()},
        path := tmp_path / "w.safetensors",
    )
    config["params"] = {**config["params"], "ckpt_path": str(path)}
    return config, state, call


def test_built_directly_it_raises_until_its_file_is_loaded(network):
    config, _, call = network
    model = instantiate_from_config(config)
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(UserError, match=r"ckpt_path: .*w\.safetensors is not loaded yet"):
            call(one)
        load_parts(one)
        call(one)


def test_weights_of_others_are_its_weights(network):
    config, state, call = network
    model = torch.nn.ModuleDict({"part": instantiate_from_config(config)})
    model.load_state_dict({"other.weight": torch.zeros(1)}, strict=False)
    with pytest.raises(UserError, match="is not loaded yet"):
        call(model["part"])
    model.load_state_dict({f"part.{key}": value for key, value in state.items()})
    call(model["part"])
