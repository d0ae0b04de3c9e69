"""Run: .venv/bin/python -m pytest tests/test_spec.py"""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewardkit import spec
from rewardkit.errors import OptionError

KNOWN = {"wave": "tests.test_spec:wave", "flat": "tests.test_spec:flat"}


def wave(
    height: float, kind: Literal["sea", "lake"] = "sea", times: int | None = None, loud: bool = False, names: list | None = None
):
    return height, kind, times, loud, names


def flat():
    return 0


def test_reads_words_quotes_and_mappings():
    assert spec.parse("judge model='my model' votes=3") == spec.Spec("judge", {"model": "my model", "votes": "3"})
    assert spec.parse({"name": "judge", "votes": 3}).options == {"votes": 3}
    assert str(spec.parse("judge model='my model' votes=3")) == "judge model='my model' votes=3"


def test_options_are_converted_by_annotation():
    made = spec.build("wave height=1e-2 kind=lake times=none loud=true names=a,b", KNOWN, "thing")
    assert made == (0.01, "lake", None, True, ["a", "b"])
    assert spec.build({"name": "wave", "height": 2, "times": 3}, KNOWN, "thing") == (2.0, "sea", 3, False, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("wav height=1", "did you mean 'wave'"),
        ("wave hight=1", "did you mean 'height'"),
        ("wave", "needs height=..."),
        ("wave height=tall", "is a number, not 'tall'"),
        ("wave height=1 kind=se", "did you mean 'sea'"),
        ("wave height=1 times=1.5", "whole number"),
        ("wave height=1 loud=perhaps", "true or false"),
        ("wave height", "not key=value"),
        ("wave height='1", "cannot read the spec"),
        ("", "empty"),
        ("nowhere.py:f", "there is no file nowhere.py"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text, says):
    with pytest.raises(OptionError, match=says) as error:
        spec.build(text, KNOWN, "thing")
    assert "\n" not in str(error.value)


def test_own_function_gets_its_options(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def shout(samples, times: int = 1):\n    return [len(s) * times for s in samples]\n")
    assert spec.build(f"{file}:shout times=3", {}, "reward")(["ab", "c"]) == [6, 3]
    with pytest.raises(OptionError, match="did you mean 'times'"):
        spec.build(f"{file}:shout time=3", {}, "reward")
    with pytest.raises(OptionError, match="did you mean 'shout'"):
        spec.build(f"{file}:shot", {}, "reward")


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
        st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=20),
        max_size=4,
    )
)
def test_a_spec_survives_being_written_and_read(options):
    made = spec.Spec("name", options)
    assert spec.parse(str(made)) == made
