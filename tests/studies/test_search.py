"""Which values the trials of a sweep have."""

import pytest

from ldm.errors import UserError
from ldm.studies.search import make_searcher
from ldm.studies.sweep import Plan, _tasks, words
from scripts.sweep import values_of


def asked(searcher):
    found, number = [], 0
    while (values := searcher.ask(number)) is not None:
        found.append(values)
        number += 1
    return found


def test_a_grid_is_every_combination(tmp_path):
    space = {"a.b": [1, 2], "seed": [3, 4]}
    found = asked(make_searcher("grid", space, None, 0, tmp_path / "x"))
    assert found == [{"a.b": a, "seed": s} for a in (1, 2) for s in (3, 4)]
    trials = [{"a.b": 1}, {"seed": 2}]
    assert asked(make_searcher("list", trials, None, 0, tmp_path / "x")) == trials


def test_random_values_are_the_same_again_and_inside(tmp_path):
    space = {"a.rate": {"low": 1e-6, "high": 1e-4, "log": True}, "a.n": {"low": 1, "high": 3}}
    space["a.kind"] = ["x", "y"]
    many = asked(make_searcher("random", space, 50, 5, tmp_path / "x"))
    assert asked(make_searcher("random", space, 3, 5, tmp_path / "x")) == many[:3]
    assert asked(make_searcher("random", space, 3, 6, tmp_path / "x")) != many[:3]
    rates = sorted(values["a.rate"] for values in many)
    assert 1e-6 <= rates[0] < 3e-6 and 3e-5 < rates[-1] <= 1e-4 and 4e-6 < rates[25] < 3e-5
    assert {values["a.n"] for values in many} == {1, 2, 3}
    assert {values["a.kind"] for values in many} == {"x", "y"}


def test_optuna_keeps_its_study_in_a_file_and_goes_on(tmp_path):
    optuna = pytest.importorskip("optuna")
    space = {"a.rate": {"low": 1e-6, "high": 1e-4, "log": True}}

    def searcher():
        return make_searcher("optuna", space, 3, 0, tmp_path / "sweep/study.db")

    first = searcher()
    values = first.ask(0)
    first.tell(0, 1.0)
    running = first.ask(1)
    again = searcher()  # after a kill in the second trial
    assert again.ask(0) == values and again.ask(1) == running
    again.tell(0, 2.0)  # told before: nothing changes
    again.tell(1, None)
    assert again.ask(3) is None
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/sweep/study.db")
    assert study.best_value == 1.0
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL"]


@pytest.mark.parametrize(
    "kind, space, trials, message",
    [
        ("greedy", {}, 1, "search: 'greedy': accepted: grid, list, random, optuna"),
        ("grid", {"a.b": 1}, None, "set.a.b: a grid needs a list of values, got 1"),
        ("random", {"a.b": {"low": 2, "high": 1}}, 2, "set.a.b: expected a list of values or"),
        ("random", {"a.b": {"low": "1e-6", "high": "1e-4"}}, 2, "set.a.b: expected"),
        ("random", {"a.b": [1]}, None, "trials: random needs how many"),
        ("list", {"a.b": [1]}, None, "set: a list needs trials"),
        ("grid", {}, None, "set: expected keys and their values"),
    ],
)
def test_searches_that_cannot_be(tmp_path, kind, space, trials, message):
    with pytest.raises(UserError) as found:
        make_searcher(kind, space, trials, 0, tmp_path / "x")
    assert message in str(found.value)


def test_an_early_stop_goes_to_every_trial(tmp_path):
    given = {"arguments": ["--max_steps", "9"], "set": {"seed": [1, 2]}}
    plan = Plan.of({**given, "early_stop": {"patience": 3}})
    searcher = make_searcher(plan.search, plan.set, None, 0, tmp_path / "x")
    for task in _tasks(plan, searcher, tmp_path):
        assert task["arguments"][:2] == ["--max_steps", "9"]
        (word,) = [w for w in task["arguments"] if w.startswith("lightning.callbacks.early_stop=")]
        assert "StopOnFixedLoss" in word and '"patience": 3' in word
    with pytest.raises(UserError, match=r"early_stop\.patience: expected 1 or more, got 0"):
        Plan.of({**given, "early_stop": {"patience": 0}})
    with pytest.raises(UserError, match=r"early_stop\.patients: unknown key"):
        Plan.of({**given, "early_stop": {"patients": 1}})


def test_flags_become_values_and_values_words():
    found = values_of(["model.base_learning_rate=1e-6,5.0e-6", "seed=1,2", "a.b=[1,2],null"])
    assert found == {
        "model.base_learning_rate": ["1e-6", 5e-06], "seed": [1, 2], "a.b": [[1, 2], None],
    }  # fmt: skip
    assert words({"model.rate": "1e-6", "a.b": [1, 2], "seed": 3, "a.c": None}) == [
        *("model.rate=1e-6", "a.b=[1, 2]", "--seed", "3", "a.c=null")
    ]
    with pytest.raises(UserError, match="given twice"):
        values_of(["a.b=1", "a.b=2"])
