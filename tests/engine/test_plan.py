"""The plan of a step: rows by delta, the same object for the same step, nothing for a step of base rows."""

from server.engine.worker.plan import Planner


def test_groups_rows_by_delta():
    plan = Planner().plan([0, 5, 2, 5, 0, 2, 2])
    assert [(adapter, rows.tolist()) for adapter, rows in plan.groups] == [(2, [2, 5, 6]), (5, [1, 3])]


def test_a_step_of_base_rows_has_no_plan():
    assert Planner().plan([0, 0, 0]) is None
    assert Planner().plan([]) is None


def test_an_equal_step_is_the_same_object_until_told_to_forget():
    planner = Planner()
    first = planner.plan((0, 1, 2))
    assert planner.plan((0, 1, 2)) is first
    assert planner.plan((0, 1, 1)) is not first
    again = planner.plan((0, 1, 2))
    planner.forget()
    assert planner.plan((0, 1, 2)) is not again
