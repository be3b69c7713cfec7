"""A run that learns no more, or forgets the class, stops by its losses at fixed noise."""

import json

import pytest

import main
from ldm.callbacks.early_stop import StopOnFixedLoss
from ldm.errors import UserError
from tests.support.runs import checkpoint
from tests.support.spies import errors, fixed


def stops(**params):
    target = "ldm.callbacks.early_stop.StopOnFixedLoss"
    return f"lightning.callbacks.early_stop={{target: {target}, params: {json.dumps(params)}}}"


@pytest.mark.parametrize(
    "params, subject, prior, stop",
    [
        ({"patience": 2}, [5, 4, 4, 3, 3, 3, 1], [1] * 7, 5),
        ({"patience": 2}, [5, 4, 4, 3, 3, 2, 1], [1] * 7, None),
        ({"prior_limit": 1.5}, [5] * 4, [2.0, 2.9, 3.0, 3.1], 3),
        ({"prior_limit": 1.5, "patience": 9}, [5] * 3, [2.0, 1.0, 2.9], None),
    ],
)
def test_when_a_run_stops(params, subject, prior, stop):
    callback, found = StopOnFixedLoss(**params), None
    for number, values in enumerate(zip(subject, prior)):
        if number == 2:  # as after a resume
            state = callback.state_dict()
            callback = StopOnFixedLoss(**params)
            callback.load_state_dict(state)
        if found is None and callback._reason(dict(zip(("subject", "prior"), values))):
            found = number
    assert found == stop


def test_a_run_that_stops_early_keeps_its_last_step(workspace, caplog):
    # A rate of almost nothing: no value is lower than the first one, or by rounding alone.
    more = ["model.base_learning_rate=1e-30", fixed(every_n_steps=1, examples=1), stops(patience=1)]
    run = workspace.train("early-stop", *more)
    assert "the subject's loss has had no lower value for 1 values" in caplog.text
    assert checkpoint(run)["global_step"] < 4


def test_what_it_cannot_do_is_said(workspace, caplog):
    assert main.main(workspace.arguments("no-fixed", stops(patience=1))) == 1
    assert "early_stop: needs lightning.callbacks.fixed_loss" in errors(caplog)[0]
    for params in ({}, {"patience": 0}, {"prior_limit": 1.0}):
        with pytest.raises(UserError):
            StopOnFixedLoss(**params)
