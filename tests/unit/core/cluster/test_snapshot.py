from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.alerts.alert import Severity, SubjectType
from controlplane.core.alerts.views import FiringAlert
from controlplane.core.cluster.snapshot import ClusterSnapshot, is_newer, merge
from tests.support.endpoints import make_endpoint


def snapshot(
    epoch: str, version: int, *names: str, warming: bool = False, gone: tuple[str, ...] = ()
) -> ClusterSnapshot:
    return ClusterSnapshot(
        epoch=epoch,
        version=version,
        unix_s=0.0,
        endpoints=tuple(make_endpoint(name) for name in names),
        warming=warming,
        gone=gone,
    )


def ids(value: ClusterSnapshot) -> set[str]:
    return {item.endpoint_id for item in value.endpoints}


def test_the_first_snapshot_is_taken_as_it_is() -> None:
    first = snapshot("a", 1, "x", warming=True)
    assert merge(None, first) is first


def test_an_older_or_equal_version_changes_nothing() -> None:
    old = snapshot("a", 5, "x")
    assert merge(old, snapshot("a", 5)) is old
    assert merge(old, snapshot("a", 4)) is old


def test_a_snapshot_that_is_not_warming_replaces_the_old_one() -> None:
    assert ids(merge(snapshot("a", 5, "x", "y"), snapshot("a", 6, "y"))) == {"y"}
    assert ids(merge(snapshot("a", 5, "x"), snapshot("b", 1))) == set()


def test_a_restarted_controller_removes_nothing_while_warming() -> None:
    known = snapshot("a", 50, "x", "y")
    known = merge(known, snapshot("b", 1, warming=True))
    assert ids(known) == {"x", "y"}
    known = merge(known, snapshot("b", 2, "y", warming=True))
    assert ids(known) == {"x", "y"}
    known = merge(known, snapshot("b", 3, "y"))
    assert ids(known) == {"y"}


def test_while_warming_the_new_snapshot_s_endpoints_win() -> None:
    old = snapshot("a", 5, "x")
    new = ClusterSnapshot("b", 1, 0.0, (make_endpoint("x", base_url="http://127.0.0.1:2"),), warming=True)
    assert [item.base_url for item in merge(old, new).endpoints] == ["http://127.0.0.1:2"]


def test_while_warming_endpoints_that_are_gone_are_removed() -> None:
    assert ids(merge(snapshot("a", 5, "x", "y"), snapshot("b", 2, warming=True, gone=("x",)))) == {"y"}


def test_a_restarted_controller_clears_no_alert_while_warming() -> None:
    alert = FiringAlert("Rule", Severity.WARNING, SubjectType.TIER, "balanced", "It is down.", "Look.", 1.0)
    old = replace(snapshot("a", 5), alerts=(alert,), due=(("balanced", 2),))
    warming = merge(old, snapshot("b", 1, warming=True))
    assert (warming.alerts, warming.due) == (old.alerts, old.due)
    other = replace(snapshot("b", 2, warming=True), due=(("balanced", 3),))
    assert merge(warming, other).due == (("balanced", 3),)
    assert merge(warming, snapshot("b", 3)).alerts == ()


names = st.sets(st.sampled_from("abcdef"), max_size=6)


@given(old=names, new=names, gone=names, warming=st.booleans(), same=st.booleans())
def test_merge_has_every_new_endpoint_and_none_that_is_gone(
    old: set[str], new: set[str], gone: set[str], warming: bool, same: bool
) -> None:
    gone = gone - new
    before = snapshot("a", 1, *sorted(old))
    after = snapshot("a" if same else "b", 2, *sorted(new), warming=warming, gone=tuple(sorted(gone)))
    merged = merge(before, after)
    assert new <= ids(merged)
    assert not gone & ids(merged)
    assert ids(merged) <= old | new
    assert (merged.epoch, merged.version) == (after.epoch, after.version)
    assert len(merged.endpoints) == len(ids(merged))
    assert not is_newer(merged, after)
