from collections import Counter

import pytest

from latentdiff.errors import UserError
from latentdiff.train.batches import BatchShape, Order, choose_caption, rebalance


def test_every_epoch_holds_every_image_once_in_its_own_order() -> None:
    order = Order(range(10, 20), seed=3)
    epochs = [order(range(n, n + 10)) for n in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10, 20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert Order(range(10, 20), seed=4)(range(10)) != epochs[0]


def test_order_is_a_function_of_the_sample_index_alone() -> None:
    forward = Order(range(7), seed=0)
    whole = [forward([n])[0] for n in range(100)]
    jumped = Order(range(7), seed=0)
    assert jumped(range(90, 100)) == whole[90:]
    assert jumped([0, 99, 50]) == [whole[0], whole[99], whole[50]]


@pytest.mark.parametrize(("per_process", "accumulation", "processes"), [(8, 1, 1), (2, 2, 2)])
def test_processes_and_micro_batches_share_out_the_same_samples(
    per_process: int, accumulation: int, processes: int
) -> None:
    shapes = [BatchShape(per_process, accumulation, processes, r) for r in range(processes)]
    for step in range(3):
        found = [n for s in shapes for m in range(accumulation) for n in s.samples(step, m)]
        assert sorted(found) == list(range(8 * step, 8 * step + 8))


def test_all_captions_of_an_image_are_used_evenly() -> None:
    chosen = Counter(choose_caption(("a", "b", "c"), 0, n) for n in range(3000))
    assert set(chosen) == {"a", "b", "c"}
    assert max(chosen.values()) - min(chosen.values()) < 200
    assert choose_caption(("only",), 0, 5) == "only"


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6, 12, 24])
def test_another_number_of_processes_makes_the_same_steps(processes: int) -> None:
    before = [BatchShape(4, 3, 2, rank) for rank in range(2)]
    after = [rebalance(BatchShape(4, 3, processes, rank), 24) for rank in range(processes)]
    assert all(shape.per_process <= 4 and shape.total == 24 for shape in after)
    for step in range(3):
        old, new = (
            sorted(n for s in shapes for m in range(s.accumulation) for n in s.samples(step, m))
            for shapes in (before, after)
        )
        assert old == new


@pytest.mark.parametrize("processes", [5, 48])
def test_a_step_that_cannot_be_shared_out_is_refused(processes: int) -> None:
    with pytest.raises(UserError, match="a step of this run is 24 images"):
        rebalance(BatchShape(4, 3, processes), 24)
