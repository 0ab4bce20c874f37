"""Buckets: one per step, every image equally often, nothing remembered."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from latentdiff.train.batches import BatchShape, BucketOrder, Order, by_bucket, make_order

BUCKETS = [0] * 13 + [1] * 5 + [2] * 2
ROWS = list(range(100, 120))
TOTAL = 4
CYCLE = len(ROWS) * TOTAL


def order(seed: int = 0) -> BucketOrder:
    return BucketOrder(ROWS, BUCKETS, seed, TOTAL)


def test_every_step_is_from_one_bucket_and_a_cycle_has_each_image_equally_often() -> None:
    ours = order()
    for cycle in range(2):
        rows = ours(range(cycle * CYCLE, (cycle + 1) * CYCLE))
        assert Counter(rows) == dict.fromkeys(ROWS, TOTAL)
        for start in range(0, CYCLE, TOTAL):
            assert len({BUCKETS[row - 100] for row in rows[start : start + TOTAL]}) == 1


def test_buckets_are_never_far_from_their_share_nor_images_from_theirs() -> None:
    rows = order(3)(range(CYCLE))
    steps = [BUCKETS[rows[k] - 100] for k in range(0, CYCLE, TOTAL)]
    for bucket in range(3):
        share = BUCKETS.count(bucket) / len(BUCKETS)
        seen = np.cumsum([b == bucket for b in steps])
        assert np.abs(seen - share * np.arange(1, len(steps) + 1)).max() < 2
    counts = Counter(rows[: CYCLE // 2])
    for row in ROWS[:13]:  # of one bucket: its own epochs are whole ones
        assert abs(counts[row] - counts[ROWS[0]]) <= 1


def test_a_function_of_seed_and_sample_alone() -> None:
    whole = order()(range(3 * CYCLE))
    assert order()(range(2 * CYCLE + 7, 3 * CYCLE)) == whole[2 * CYCLE + 7 :]
    jumping = order()
    for n in (3 * CYCLE - 1, 0, CYCLE + 3, 5):
        assert jumping([n]) == [whole[n]]
    assert order(1)(range(CYCLE)) != whole[:CYCLE]
    assert whole[:CYCLE] != whole[CYCLE : 2 * CYCLE]


@pytest.mark.parametrize(("per_process", "accumulation", "processes"), [(1, 2, 2), (2, 2, 1)])
def test_any_cut_of_the_global_batch_sees_the_same_images(
    per_process: int, accumulation: int, processes: int
) -> None:
    whole = order()(range(40))
    shapes = [BatchShape(per_process, accumulation, processes, r) for r in range(processes)]
    for step in range(10):
        found = [
            r for s in shapes for m in range(accumulation) for r in order()(s.samples(step, m))
        ]
        assert sorted(found) == sorted(whole[4 * step : 4 * step + 4])


def test_the_plain_order_where_there_is_one_shape() -> None:
    plain = make_order(SimpleNamespace(), range(9), 5, 4)
    one = make_order(SimpleNamespace(buckets=np.zeros(9, np.int16)), range(9), 5, 4)
    assert plain(range(30)) == one(range(30)) == Order(range(9), 5)(range(30))
    several = SimpleNamespace(buckets=np.array([0, 1, 0, 2, 1]))
    assert isinstance(make_order(several, [0, 1, 3], 0, 2), BucketOrder)
    assert isinstance(make_order(several, [0, 2], 0, 2), Order)
    assert by_bucket(several, [4, 3, 0, 1]) == [[2], [0, 3], [1]]
