import re
from typing import get_args

import pytest

from shared.errors import ConfigurationError
from shared.subjects import ControlVerb, Subjects, validated_run_id


@pytest.mark.parametrize("run_id", ["a", "default", "Run_1-b", "x" * 64])
def test_a_run_id_of_letters_digits_underscores_and_dashes_is_returned(run_id: str) -> None:
    assert validated_run_id(run_id) == run_id


@pytest.mark.parametrize("run_id", ["", "a.b", "a b", "a*", ">", "ü", "x" * 65, "run\n", "a/b"])
def test_any_other_run_id_is_refused_by_name(run_id: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(repr(run_id))):
        Subjects(run_id)


def names_of(run_id: str) -> dict[str, str]:
    subjects = Subjects(run_id)
    names = {
        name: getattr(subjects, name) for name, value in vars(Subjects).items() if isinstance(value, property)
    }
    return names | {
        "part": subjects.weights_part(3),
        "control": subjects.control("pause"),
        "status": subjects.status("actor", "host-1"),
    }


def test_two_runs_share_no_name() -> None:
    assert not set(names_of("a").values()) & set(names_of("b").values())


def test_one_run_uses_no_name_of_a_kind_twice() -> None:
    names = names_of("a")
    assert len(set(names.values())) == len(names)


def test_the_subjects_are_those_of_the_protocol() -> None:
    subjects = Subjects("run")
    assert subjects.trajectories == "seedrl.run.trajectories"
    assert subjects.weights == "seedrl.run.weights.>"
    assert subjects.weights_part(0) == "seedrl.run.weights.0"
    assert subjects.weights_manifest == "seedrl.run.weights.manifest"
    assert subjects.episodes == "seedrl.run.episodes"
    assert subjects.replay_sample == "seedrl.run.replay.sample"
    assert subjects.replay_priorities == "seedrl.run.replay.priorities"
    assert subjects.replay_snapshot == "seedrl.run.replay.snapshot"
    assert subjects.status("learner", "1") == "seedrl.run.status.learner.1"
    assert [subjects.control(verb) for verb in get_args(ControlVerb)][:2] == [
        "seedrl.run.control.pause",
        "seedrl.run.control.resume",
    ]


@pytest.mark.parametrize(
    "name", ["trajectories_stream", "weights_stream", "episodes_stream", "bucket", "leases_bucket"]
)
def test_streams_and_buckets_have_names_that_jetstream_accepts(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]+", getattr(Subjects("A_run-1"), name))
