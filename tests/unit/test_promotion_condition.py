"""The condition of a promotion: a small grammar, which names what it cannot read."""

from __future__ import annotations

import pytest

from everstep.errors import ConfigError
from everstep.registry.condition import Condition, parse

FOUND = {"": {"accuracy": 0.9, "loss": 0.3}, "prod": {"accuracy": 0.91, "loss": 0.4}, "dev": None}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("accuracy >= prod.accuracy", False),
        ("accuracy >= prod.accuracy - 0.01", True),
        ("accuracy >= prod.accuracy - 0.001", False),
        ("loss < prod.loss", True),
        ("loss < prod.loss and accuracy > prod.accuracy", False),
        ("loss < prod.loss or accuracy > prod.accuracy", True),
        ("loss > 1 or loss < 1 and accuracy > 1", False),
        ("(loss > 1 or loss < 1) and accuracy < 1", True),
        ("(accuracy - 0.1) * 2 == 1.6", True),
        ("((accuracy)) > -1", True),
        ("accuracy - 0.1 - 0.1 < 0.75", True),
        ("2 + 3 * 2 == 8", True),
        ("accuracy > 9e-1", False),
        ("accuracy > dev.accuracy", True),
        ("accuracy > dev.accuracy + 1 and accuracy > 0.95", False),
    ],
)
def test_a_condition_says_what_arithmetic_says(text: str, holds: bool) -> None:
    assert parse(text).holds(FOUND) is holds


def test_a_value_that_is_no_number_passes_no_comparison() -> None:
    for sign in (">=", ">", "<=", "<", "=="):
        assert not parse(f"accuracy {sign} prod.accuracy").holds(
            {"": {"accuracy": float("nan")}, "prod": FOUND["prod"]}
        )


def test_a_condition_names_its_aliases_and_tells_every_figure_once() -> None:
    found: Condition = parse("accuracy >= prod.accuracy and prod.accuracy > 0.5 and loss < dev.loss")
    assert found.aliases == ("prod", "dev")
    assert found.figures(FOUND) == "accuracy = 0.9, prod.accuracy = 0.91, loss = 0.3, dev.loss = none yet"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a number or a metric is expected at 'its end'"),
        ("accuracy", "one of >= > <= < == is expected at 'its end'"),
        ("accuracy = 1", "expected at '= 1'"),
        ("accuracy > 1 accuracy", "and, or, or the end is expected at 'accuracy'"),
        ("__import__('os') > 1", "is expected at"),
        ("accuracy > 1 and", "a number or a metric is expected"),
        ("accuracy > 1 / 2", "expected at '/ 2'"),
        ("(accuracy > 1", "is expected at"),
        ("(" * 60 + "1" + ")" * 60 + " > 0", "is expected at"),
        ("1 > " + "1+" * 300 + "1", "at most 500"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_its_place(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match="--if") as refused:
        parse(text)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_metric_that_was_not_measured_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"acuracy of prod is no metric \(accuracy, loss\); did you mean 'accuracy'"):
        parse("accuracy > prod.acuracy").holds(FOUND)
    with pytest.raises(ConfigError, match="is no metric"):  # also where the first half has decided
        parse("accuracy > 2 and f1 > 1").holds(FOUND)
