"""The benchmarks' harness takes turns, averages and holds memory as it says."""

import pytest
import torch

from benchmarks import harness, limits
from benchmarks.harness import Candidate
from benchmarks.limits import Stopwatch, Work


def test_medians_stand_between_their_quartiles():
    assert harness.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 2.0, 4.0)
    assert harness.spread([7.0]) == (7.0, 7.0, 7.0)


class FixedLimits:
    names = ["copy", "fp32"]

    def measure(self):
        return {"fp32": 100.0, "copy": 10.0}


def test_ratios_and_shares_are_taken_within_a_round():
    work = Work(operations=50, bytes={"fp32": 20})
    candidates = [Candidate("a", None, "fp32", work), Candidate("b", None, "fp32", work)]
    rounds = [{"a": 4.0, "b": 2.0}, {"a": 40.0, "b": 8.0}, {"a": 4.0, "b": 1.0}]
    rounds = [times | FixedLimits().measure() for times in rounds]
    a, b = harness.summary(candidates, rounds)
    assert a["times_as_fast"]["median"] == 1.0
    assert b["times_as_fast"]["median"] == 4.0  # of 2, 5 and 4
    assert b["share_of_matrix_product"]["median"] == 0.25  # 25 per second, of 100
    assert b["share_of_limit"]["median"] == 1.0  # 20 bytes take 2 seconds, operations half a one


def test_candidates_take_turns_and_each_round_begins_with_another():
    seen: list[str] = []
    candidates = [Candidate(n, lambda n=n: seen.append(n), "fp32") for n in "ab"]
    rounds = harness.interleave(candidates, FixedLimits(), 2, Stopwatch(torch.device("cpu")))
    assert "".join(seen) == "ab" + "ab" + "ba"  # the first pair does not count
    assert len(rounds) == 2
    assert set(rounds[0]) == {"a", "b", "fp32", "copy"}


def test_those_that_keep_their_memory_come_last_and_are_timed_when_they_have_it(monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(harness, "keep_memory", lambda: seen.append("|") or True)
    made = {
        n: Candidate(n, lambda n=n: seen.append(n), "fp32", keeps_memory=n > "Z") for n in "AaBb"
    }
    args = harness.parse("", ["--limit-size", "32", "--repeats", "2"])
    works = {"one": [made["A"], made["a"]], "two": [made["B"], made["b"]]}
    found = harness.compare(works, args)
    assert "".join(seen) == "A" + "AA" + "B" + "BB" + "|" + "aa" + "aa" + "bb" + "bb"
    assert [row["name"] for row in found["two"]["candidates"]] == ["B", "b"]
    limits = {"fp32", "copy", "fp32, memory kept", "copy, memory kept"}
    assert set(found["one"]["rounds"][1]) == {"A", "a"} | limits
    assert set(found["one"]["limits"]) == limits


def test_a_share_is_of_the_limits_that_were_measured_beside_the_candidate(monkeypatch):
    kept = []
    monkeypatch.setattr(harness, "keep_memory", lambda: kept.append(True) or True)
    monkeypatch.setattr(
        limits.Limits, "measure", lambda self: {"fp32": 4.0 if kept else 2.0, "copy": 1e9}
    )
    one = Candidate("one", lambda: None, "fp32", Work(6, {"fp32": 1}))
    args = harness.parse("", ["--limit-size", "32", "--repeats", "1"])
    found = harness.compare({"work": [one, harness.kept(one)]}, args)["work"]
    for row, limit in zip(found["candidates"], (2.0, 4.0), strict=True):
        seconds = row["seconds"]["median"]
        for share in ("share_of_limit", "share_of_matrix_product"):
            assert row[share]["median"] == pytest.approx(6 / limit / seconds)


def test_nothing_is_called_kept_where_memory_cannot_be(monkeypatch):
    monkeypatch.setattr(harness, "keep_memory", lambda: False)
    one = Candidate("one", lambda: None, "fp32")
    args = harness.parse("", ["--limit-size", "32"])
    found = harness.compare({"work": [one, harness.kept(one)]}, args)
    assert [row["name"] for row in found["work"]["candidates"]] == ["one"]


def test_processor_time_is_refused_where_it_is_not_the_time_of_the_work():
    assert harness.parse("", ["--clock", "processor", "--threads", "1"]).clock == "processor"
    with pytest.raises(ValueError, match="got 1 threads on cuda"):
        harness.parse("", ["--clock", "processor", "--threads", "1", "--device", "cuda"])


def test_work_is_the_least_that_is_known_to_do():
    several = [Work(5, {"fp32": 1}), Work(3, {"fp32": 2})]
    assert limits.least(several) == Work(3, {"fp32": 1})
    assert limits.least([]) is None


def test_limits_are_positive_and_named():
    found = limits.Limits(Stopwatch(torch.device("cpu")), ["bf16", "fp32"], size=32)
    measured = found.measure()
    assert set(measured) == set(found.names) == {"bf16", "fp32", "copy"}
    assert min(measured.values()) > 0
