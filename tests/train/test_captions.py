"""An image's caption: a function of the sample index, never empty."""

from collections import Counter

from latentdiff.train.batches import CaptionConfig, plainly, say

TAGS = "cat, red hair, smile, blue sky"


def test_nothing_changes_by_default() -> None:
    assert say(("a, b ,c",), 0, 5, CaptionConfig()) == "a, b ,c"


def test_tags_are_shuffled_evenly_behind_those_that_stay() -> None:
    config = CaptionConfig(shuffle_tags=True, keep_tags=1)
    said = [say((TAGS,), 0, n, config) for n in range(600)]
    assert {text.split(", ")[0] for text in said} == {"cat"}
    assert all(sorted(text.split(", ")) == sorted(TAGS.split(", ")) for text in said)
    orders = Counter(said)
    assert len(orders) == 6 and min(orders.values()) > 60  # 100 expected, σ = 9
    assert said == [say((TAGS,), 0, n, config) for n in range(600)]
    assert said != [say((TAGS,), 1, n, config) for n in range(600)]


def test_tags_are_dropped_at_their_rate_and_one_is_always_left() -> None:
    config = CaptionConfig(tag_dropout=0.25, keep_tags=1)
    said = [say((TAGS,), 0, n, config).split(", ") for n in range(2000)]
    for tag in TAGS.split(", ")[1:]:
        assert 0.70 < sum(tag in text for text in said) / 2000 < 0.80  # 0.75 ± 5 σ
    assert all("cat" in text for text in said)
    everything = CaptionConfig(tag_dropout=1.0)
    assert say((TAGS,), 0, 0, everything) == "cat"


def test_choice_among_captions_goes_with_it() -> None:
    config = CaptionConfig(shuffle_tags=True)
    said = {frozenset(say(("a, b", "c, d"), 0, n, config).split(", ")) for n in range(40)}
    assert said == {frozenset("ab"), frozenset("cd")}


def test_prefix_and_suffix_stay_whatever_is_shuffled() -> None:
    config = CaptionConfig(shuffle_tags=True, tag_dropout=1.0, prefix="sks style, ", suffix=" .")
    assert say((TAGS,), 0, 3, config) == f"sks style, {TAGS.split(', ')[0]} ."
    assert plainly((TAGS, "x"), config) == f"sks style, {TAGS} ."


def test_out_of_range() -> None:
    assert len(CaptionConfig(keep_tags=-1, tag_dropout=1.5).validate()) == 2
    assert not CaptionConfig(keep_tags=2, tag_dropout=0.5).validate()
