"""Tokens beside a tokenizer's vocabulary: its marks, and words that were taught.

Folders say them in up to four files. As transformers (PreTrainedTokenizerBase.from_pretrained):

    tokenizer_config.json    added_tokens_decoder, id → token: where it is there, it says all
    added_tokens.json        word → id, in older folders
    tokenizer.json           added_tokens
    both of the first, and special_tokens_map.json    the marks, extra ones too

A token gets the next free id unless it is in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from latentdiff.errors import UserError

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
#: Marks that every tokenizer of CLIP has, and what they are where a folder does not say.
MARKS = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
_EXTRA = ("additional_special_tokens", "extra_special_tokens")
_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
#: (the id that is stated for it, a tokenizers.AddedToken)
Added = tuple[int | None, Any]


def text_of(token: Any) -> str:
    """The token of an entry that is text or, in older files, an object."""
    return token["content"] if isinstance(token, dict) else str(token)


def stated_tokens(config: Mapping[str, Any], words: Mapping[str, int]) -> list[Added]:
    """What a folder adds, in the order of the ids; marks, which need no new ids, are the last.

    Args:    config: tokenizer_config.json over special_tokens_map.json.
             words: added_tokens.json.
    """
    marks = [config.get(name) or usual for name, usual in MARKS.items()]
    for more in map(config.get, _EXTRA):
        marks += more.values() if isinstance(more, dict) else more or ()
    entries = config.get("added_tokens_decoder")
    if entries is None:
        special = set(map(text_of, marks))
        entries = {i: {"content": word, "special": word in special} for word, i in words.items()}
    stated = sorted(((int(i), added_token(e)) for i, e in entries.items()), key=lambda one: one[0])
    return [*stated, *((None, added_token(mark, special=True)) for mark in marks)]


def added_token(entry: Any, **changes: bool) -> Any:
    """A `tokenizers.AddedToken` of an entry: text, or an object with its fields."""
    from tokenizers import AddedToken

    given = {"content": entry} if isinstance(entry, str) else entry
    rules = {name: given[name] for name in _FIELDS[1:] if name in given}
    return AddedToken(given["content"], **(rules | changes))


def add_tokens(backend: Any, tokens: Iterable[Added]) -> None:
    """Add tokens to a `tokenizers.Tokenizer`, but for those that it has already.

    Raises: UserError: one gets another id than the one stated, which stands for its embedding.
    """
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for stated, token in tokens:
        if token.content not in known:
            backend.add_tokens([token])
            known.add(token.content)
        found = backend.token_to_id(token.content)
        if stated not in (None, found):
            raise UserError(
                f"the added word {token.content!r} has the id {stated} in it, where a tokenizer of "
                f"this vocabulary gives {found}. Ids of added words follow the vocabulary without "
                "gaps; correct those in added_tokens.json or tokenizer_config.json."
            )


def added_entries(backend: Any) -> dict[int, dict[str, Any]]:
    """Every token beside the vocabulary, marks too, as JSON keeps it: id → its fields."""
    tokens = sorted(backend.get_added_tokens_decoder().items())
    return {i: {name: getattr(token, name) for name in _FIELDS} for i, token in tokens}
