"""Processes that are started again agree on a number of their own, whatever the store remembers."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from latentdiff.train import rendezvous
from latentdiff.train.rendezvous import agree, init_method, was_restarted

PATIENCE = timedelta(seconds=60)


def attempt(store: HashStore, ranks: range, count: int) -> list[int]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: agree(store, rank, count, PATIENCE), ranks))


def test_every_attempt_has_one_number_of_its_own() -> None:
    store = HashStore()
    numbers = [attempt(store, range(4), 4) for _ in range(5)]
    assert all(len(set(of_one)) == 1 for of_one in numbers)
    assert len({of_one[0] for of_one in numbers}) == 5


def test_questions_of_the_dead_do_not_count() -> None:
    store = HashStore()
    # An attempt whose first process never came: the others asked and died waiting.
    for rank in (1, 2):
        with pytest.raises(Exception, match=r"(?i)time"):
            agree(store, rank, 3, timedelta(seconds=0.2))
    # One whose first process came alone.
    with pytest.raises(TimeoutError, match=r"\[1, 2\]"):
        agree(store, 0, 3, timedelta(seconds=0.2))
    numbers = attempt(store, range(3), 3)
    assert len(set(numbers)) == 1
    assert store.add("attempts", 0) == numbers[0] == 2


def test_one_that_dies_after_it_was_counted_is_asked_for_again() -> None:
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(agree, store, 0, 3, PATIENCE)
        number = agree(store, 1, 3, PATIENCE)  # and it dies; another one comes in its place
        asked = store.get("asks/1")
        others = [pool.submit(agree, store, 1, 3, PATIENCE)]
        while store.get("asks/1") == asked:  # before the third one, after which the first is done
            time.sleep(0.001)
        others.append(pool.submit(agree, store, 2, 3, PATIENCE))
        assert {first.result(), *(one.result() for one in others)} == {number}


def test_only_a_launcher_that_shares_its_store_changes_the_meeting_place(monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert init_method() == init_method() == "fresh://"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert init_method() is None
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert init_method() is None


def test_a_second_attempt_is_a_restart_on_every_machine(monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")  # it was another machine's process
    for number, again in ((1, False), (2, True)):
        monkeypatch.setattr(rendezvous, "_number", number)
        assert was_restarted() == again
