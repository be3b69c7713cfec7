"""Where tasks run: two at once, and one that is lost costs nothing but itself."""

import pytest

from ldm.errors import UserError
from ldm.studies.engines import Failure, Local, make_engine
from tests.support.tasks import fail_or_die, meet

ENGINES = {"local": {}, "submitit": {"cluster": "local"}, "ray": {}}


@pytest.fixture(params=list(ENGINES))
def engine(request, tmp_path):
    if request.param != "local":
        pytest.importorskip(request.param)
    return make_engine(request.param, 2, tmp_path / "jobs", dict(ENGINES[request.param]))


def tasks(folder, *names):
    return [{"name": name, "folder": str(folder)} for name in names]


def results(engine, work, given):
    return {task["name"]: result for task, result in engine.run(work, iter(given))}


def test_two_tasks_run_at_once(engine, tmp_path):
    found = results(engine, meet, tasks(tmp_path, "a", "b"))
    assert found == {"a": "met a", "b": "met b"}


def test_a_task_that_fails_or_is_lost_costs_itself_alone(engine, tmp_path):
    if type(engine).__name__ == "Submitit":
        pytest.skip("it takes half a minute to see that a process is gone")
    found = results(engine, fail_or_die, tasks(tmp_path, "one", "fails", "dies", "two"))
    assert found["one"] == "did one" and found["two"] == "did two"
    assert found["fails"] == Failure("it cannot be done")
    # Ray does a task that was lost with its worker once more.
    assert found["dies"] == "did dies" or isinstance(found["dies"], Failure)


def test_a_task_is_asked_for_when_there_is_room_for_it(tmp_path):
    ended = []

    def lazily():
        for number, task in enumerate(tasks(tmp_path, "one", "two", "three")):
            assert len(ended) == number  # one at a time: all before it have ended
            yield task

    for task, _ in Local(1).run(fail_or_die, lazily()):
        ended.append(task["name"])
    assert ended == ["one", "two", "three"]


def test_each_worker_has_a_device_of_its_own():
    engine = Local(3, devices=[0, 1])
    assert [engine._device(slot) for slot in range(3)] == [0, 1, 0]


@pytest.mark.parametrize(
    "name, workers, options, message",
    [
        ("slurm", 1, {}, "accepted: local, ray, submitit"),
        ("local", 0, {}, "--workers 0: expected 1 or more"),
        ("submitit", 0, {"cluster": "local"}, "--workers 0: expected 1 or more"),
        ("local", 1, {"address": "x"}, "unknown for local: address"),
        ("ray", 1, {"gpus": "abc"}, "--engine_options gpus=abc: expected a number"),
    ],
)
def test_engines_that_cannot_be(tmp_path, name, workers, options, message):
    with pytest.raises(UserError, match=message):
        make_engine(name, workers, tmp_path, options)


def test_an_engine_without_its_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UserError, match="--engine ray: needs its package: pip install ray"):
        make_engine("ray", 1, tmp_path, {})
