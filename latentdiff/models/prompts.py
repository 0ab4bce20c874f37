r"""Prompts → context for cross-attention.

A text tower with T positions reads T − 2 tokens at a time, a chunk, between begin and end token.
There are three ways to read a prompt (`read_prompt`):

    plain    one chunk; words that do not fit are cut off, with a warning
    long     as many chunks as the words need, their states one after the other
    a1111    the same with the syntax of AUTOMATIC1111's web UI:

        (red)        × 1.1              ((red))     × 1.1²
        (red:1.3)    × 1.3              [red]       ÷ 1.1
        \( \) \[ \] \\                  the sign itself
        BREAK                           what follows begins a new chunk

A text that fits, and for a1111 holds no syntax, has the same states in all three ways.

Factors of nested brackets multiply. Round and square ones are matched apart from each other. One
that is never closed lasts to the end of the text, one that was never opened is just a sign. What
that program does with a text beyond weights (words that change from step to step, AND, <lora:…>) is
refused by name and not taken for words. Where a comma is among the last tokens of a full chunk,
what follows the comma moves over, so that phrases stay together.

A weight w multiplies the states of its tokens, and the chunk is then scaled back to its old mean:

    z'_k = w_k z_k,    z'' = z' · mean(z)/mean(z')

A learned word (textual inversion, Gal et al. 2022, arXiv:2208.01618) is one token, or n of them,
behind all that there are: NAME, NAME_1, NAME_2, … as diffusers calls them. Its embeddings are new
rows of the tower's table, and nothing else changes: a text in which the word does not occur has the
tokens and states that it had. A name that begins or ends with a letter, digit or _ is met as a
whole word alone, not within a longer one.

Source: stable-diffusion-webui, modules/prompt_parser.py, sd_hijack_clip.py (75 tokens, a comma at
most 20 back) and sd_emphasis.py (`EmphasisOriginal`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError, choice_error, warn
from latentdiff.models.clip_text import TextEncoder
from latentdiff.models.tokenizer import ClipTokenizer

PromptSyntax = Literal["plain", "long", "a1111"]


class Chunk(NamedTuple):
    """What one pass of the tower reads, without begin and end token and padding."""

    ids: tuple[int, ...]
    """Token ids."""
    weights: tuple[float, ...]
    """How much each counts."""


@dataclass(frozen=True)
class ReadPrompt:
    """What became of a prompt's words."""

    text: str
    """As it was given."""
    chunks: tuple[Chunk, ...]
    """What each pass of the text tower reads."""
    room: int
    """Tokens that fit into a pass."""
    left_out: str = ""
    """Words that no pass reads: of a plain prompt that is too long."""

    @property
    def tokens(self) -> int:
        """Tokens that are read, begin and end token left out."""
        return sum(len(chunk.ids) for chunk in self.chunks)

    def __str__(self) -> str:
        passes = "" if len(self.chunks) == 1 else f" in {len(self.chunks)} chunks"
        left = f"; left out: {self.left_out!r}" if self.left_out else ""
        return f"{self.tokens} tokens{passes} ({self.room} fit into one){left}"


def read_prompt(
    encoder: TextEncoder, text: str, syntax: str = "plain", room: int | None = None
) -> ReadPrompt:
    """Cut a prompt up, without encoding it.

    Args:    syntax: plain, long or a1111.  room: tokens in a chunk; None: all that fit.
    Raises:  UserError: unknown syntax, or text that cannot be read.
    """
    if syntax not in get_args(PromptSyntax):
        raise choice_error("prompt_syntax", syntax, get_args(PromptSyntax))
    tokenizer, most = encoder.tokenizer, encoder.max_length - 2
    if syntax == "plain":
        ids, left_out = tokenizer.fit(text)
        return ReadPrompt(text, (Chunk(tuple(ids), (1.0,) * len(ids)),), most, left_out)
    room = most if room is None else min(room, most)
    parts = parse(text) if syntax == "a1111" else [[Run(text, 1.0)]]
    comma = tokenizer.backend.token_to_id(",</w>")
    return ReadPrompt(text, tuple(chunks_of(parts, tokenizer.pieces, room, comma)), room)


def encode_prompts(
    encoder: TextEncoder, prompts: Sequence[ReadPrompt], clip_skip: int | None = None
) -> list[Tensor]:
    """The context of each prompt, (chunks · max_length, width); warns of words that do not fit."""
    for prompt in prompts:
        encoder.tokenizer.warn_of_cut(prompt.text, prompt.left_out)
    rows = [encoder.tokenizer.padded(chunk.ids) for prompt in prompts for chunk in prompt.chunks]
    states = iter(encoder.encode_tokens(torch.tensor(rows, dtype=torch.int64), clip_skip))
    return [
        torch.cat([emphasised(next(states), chunk.weights) for chunk in prompt.chunks])
        for prompt in prompts
    ]


#: The mean is not scaled up by more than 1 over this.
LEAST_RATIO = 0.01


def emphasised(states: Tensor, weights: Sequence[float]) -> Tensor:
    """Multiply the states of a chunk (T, width) by the weights of its tokens, and keep their mean.

    States whose weights are all 1 come back as they are. Were all states of one sign,
    mean(z')/mean(z) would lie between the least and the largest weight. Where it does not, the mean
    is what is left of larger numbers that cancel (a last LayerNorm without bias), the ratio is
    noise, and z' stays.

    Args: weights: of the tokens after the begin token; all others count 1.
    """
    if all(weight == 1 for weight in weights):
        return states
    w = torch.ones(len(states))
    w[1 : 1 + len(weights)] = torch.tensor(weights)
    z = states.float()
    changed = z * w.to(z.device)[:, None]
    ratio = float(changed.mean() / z.mean())
    if max(float(w.min()), LEAST_RATIO) <= ratio <= float(w.max()):
        changed = changed / ratio
    return changed.to(states.dtype)


#: What one pair of brackets multiplies or divides by.
STEP = 1.1
#: Weights of a larger size have no use and overflow in 16 bit.
LARGEST = 100.0

_SIGNS = re.compile(
    r"""\\ (?P<literal> [()\[\]\\:|]? )
    | (?P<open> [(\[] )
    | : \s* (?P<number> [+-]? [.\d]+ ) \s* \)
    | (?P<close> [)\]] )
    | (?P<words> [^\\()\[\]:]+ | : )""",
    re.VERBOSE,
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_AT_STEP = re.compile(r":\s*[+-]?[.\d]+\s*$")


class Run(NamedTuple):
    """Words that count equally."""

    text: str
    """As the tokenizer gets it."""
    weight: float
    """1 = as usual."""


@dataclass
class _Piece:
    """A part of a prompt between two signs of the syntax."""

    text: str | None
    """None: a BREAK."""
    escaped: bool = False
    """Whether it is no syntax whatever it looks like."""
    weight: float = 1.0


def parse(text: str) -> list[list[Run]]:
    """Read A1111's syntax.

    Returns: for each part between BREAKs its runs; neighbours differ in weight, none is empty.
    Raises:  UserError: a weight that is no number or above `LARGEST`; syntax that is not supported.
    """
    _refuse_networks(text)
    pieces: list[_Piece] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def scale(start: int, factor: float) -> None:
        for piece in pieces[start:]:
            piece.weight *= factor

    for sign in _SIGNS.finditer(text):
        found = sign.lastgroup
        if found == "open":
            opened[sign[0]].append(len(pieces))
        elif found == "number" and opened["("]:
            scale(opened["("].pop(), _number(sign["number"]))
        elif sign[0] == ")" and opened["("]:
            scale(opened["("].pop(), STEP)
        elif sign[0] == "]" and opened["["]:
            start = opened["["].pop()
            _refuse_schedule("".join(p.text or "" for p in pieces[start:] if not p.escaped))
            scale(start, 1 / STEP)
        elif found == "literal":
            pieces.append(_Piece(sign["literal"], escaped=True))
        else:
            first, *more = _BREAK.split(sign[0])
            pieces.append(_Piece(first))
            pieces += [piece for words in more for piece in (_Piece(None), _Piece(words))]
    for start in opened["("]:
        scale(start, STEP)
    for start in opened["["]:
        scale(start, 1 / STEP)
    return _parts(pieces)


def escape(text: str) -> str:
    """Text that `parse` reads as exactly these words, each of weight 1 (BREAK excepted)."""
    return re.sub(r"[()\[\]\\:|]", lambda sign: "\\" + sign[0], text)


def _parts(pieces: Sequence[_Piece]) -> list[list[Run]]:
    parts: list[list[Run]] = [[]]
    for piece in pieces:
        if piece.text is None:
            parts.append([])
        elif piece.text:
            if not abs(piece.weight) <= LARGEST:
                raise UserError(
                    f"the weight of {piece.text.strip()[:50]!r} in the prompt must lie in "
                    f"-{LARGEST:g} … {LARGEST:g} (0.5 to 1.5 usual); got {piece.weight:g}. Use "
                    "fewer brackets, or write \\( and \\) for brackets that are part of the text."
                )
            same = parts[-1] and parts[-1][-1].weight == piece.weight
            before = parts[-1].pop().text if same else ""
            parts[-1].append(Run(before + piece.text, piece.weight))
    return parts


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return value
    raise UserError(
        f"a weight in the prompt must be a number, as in (red:1.3); got {text!r}. Write \\: for a "
        "colon that is part of the text."
    )


def _refuse_schedule(inside: str) -> None:
    if "|" in inside or _AT_STEP.search(inside):
        raise UserError(
            f"the prompt holds [{inside[:60]}], which changes the words from step to step in "
            "A1111; that is not supported. Take it out, or write \\[ and \\] for brackets that "
            "are part of the text."
        )


def _refuse_networks(text: str) -> None:
    if network := NETWORK.search(text):
        raise UserError(
            f"the prompt holds {network[0][:60]!r}, which loads a file in A1111; a prompt loads "
            f"nothing here. Take it out; {_how_to_load(network)}."
        )
    if re.search(r"\bAND\b", text):
        raise UserError(
            "the prompt holds AND in capitals, which mixes several predictions in A1111; that is "
            "not supported. Write `and` for the word."
        )


def comma_reach(room: int) -> int:
    """How many tokens before a chunk's end a comma is looked for: 20 of 75."""
    return room * 20 // 75


def chunks_of(
    parts: Sequence[Sequence[Run]],
    pieces: Callable[[str], list[tuple[int, ...]]],
    room: int,
    comma: int | None,
) -> list[Chunk]:
    """Cut a prompt up.

    Args:    parts: what `parse` gives.
             pieces: text → token ids; those of one learned word, which stay together, in one tuple.
             room: tokens in a chunk.  comma: the comma's token; None: there is none.
    Returns: at least one chunk; an empty part is an empty chunk, unless it is the last of several.
    Raises:  UserError: a learned word of more vectors than a chunk has room for.
    """
    chunks: list[Chunk] = []
    for part in parts:
        words = [(piece, run.weight) for run in part for piece in pieces(run.text)]
        chunks += _fill(words, room, comma)
    if len(chunks) > 1 and not chunks[-1].ids:
        chunks.pop()
    return chunks


def _fill(
    words: Sequence[tuple[tuple[int, ...], float]], room: int, comma: int | None
) -> list[Chunk]:
    chunks: list[Chunk] = []
    now: list[tuple[int, float]] = []
    after_comma = 0  # in `now`; 0: no comma yet

    def close(end: int) -> None:
        nonlocal now, after_comma
        chunks.append(Chunk(tuple(t for t, _ in now[:end]), tuple(w for _, w in now[:end])))
        now, after_comma = now[end:], 0

    for piece, weight in words:
        if len(piece) > room:
            raise UserError(
                f"a learned word has {len(piece)} vectors, and the text encoder takes {room} "
                "tokens at a time. Use one with fewer vectors."
            )
        is_comma = piece == (comma,)
        if len(now) == room and not is_comma and 0 < room - after_comma < comma_reach(room):
            close(after_comma)
        if len(now) + len(piece) > room:
            close(len(now))
        now += [(token, weight) for token in piece]
        if is_comma:
            after_comma = len(now)
    close(len(now))
    return chunks


#: A1111's way to load a file from within a prompt: kind, name, weight.
NETWORK = re.compile(r"<(lora|lyco|hypernet):([^>:]*)(?::([^>]*))?>", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(\.\d+)?|-?\.\d+")
_ENDING = re.compile(r"\.(safetensors|pt|bin|ckpt)$", re.IGNORECASE)
#: A1111's weights and chunks, (red:1.3) and BREAK.
_WEIGHT = re.compile(r"\([^()]*:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|\bBREAK\b")
#: What learned words are called; a letter, so that signs such as <-> are left alone.
_WORD = re.compile(r"<[^<>\s:]*[^\W\d_][^<>\s:]*>")


def warn_of_unknown_words(
    tokenizer: ClipTokenizer, texts: Iterable[str], a1111: bool = False
) -> None:
    """Warn, once each, of <words> that are not learned and of A1111's <lora:name:1> and (red:1.3).

    Such a prompt works, but its words are read as signs and letters and the image is another.
    Args: a1111: whether A1111's syntax is understood, and needs no warning.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        for message in _misread(tokenizer, text, a1111):
            found.setdefault(message, []).append(text)
    for message, of in found.items():
        warn(message, *of)


def _misread(tokenizer: ClipTokenizer, text: str, a1111: bool) -> Iterator[str]:
    for network in NETWORK.finditer(text) if not a1111 else ():
        yield (
            f"the prompt holds {network[0]!r}, which loads a file in A1111; here it loads nothing "
            f"and is read as words. Take it out; {_how_to_load(network)}."
        )
    if not a1111 and (weight := _WEIGHT.search(text)):
        yield (
            f"the prompt holds {weight[0][:60]!r}, which weighs words or begins a chunk in A1111; "
            "here it is read as words and signs. Draw with latentdiff generate --weighted, or "
            "prompt_syntax='a1111'."
        )
    for word in _WORD.findall(text):
        # A word that was learned is one piece, whatever the number of its vectors.
        if len(tokenizer.pieces(word)) != 1:
            yield (
                f"the prompt holds {word!r}, which is not a word that this model has learned; it "
                "is read as signs and letters. Load a textual inversion with latentdiff generate "
                f'--embedding "FILE={word}", or pipeline.load_embedding(file, {word!r}).'
            )


def _how_to_load(network: re.Match[str]) -> str:
    """How to do here what <lora:name:weight> does in A1111."""
    kind, name, weight = network.groups()
    if kind.lower() == "hypernet":
        return "hypernetworks are not supported"
    # A1111 knows more after the name (a weight per tower, te=1); here a file has one weight.
    given = _NUMBER.fullmatch((weight or "").split(":")[0])
    number = given.group() if given else "1"
    file = "FILE" if not name else name if _ENDING.search(name) else f"{name}.safetensors"
    return (
        f"load the file with latentdiff generate --lora {file}:{number}, or "
        f"pipeline.load_lora('{file}', {number})"
    )


_WORD_EDGE = re.compile(r"^\w|\w$")


def add_word(encoder: TextEncoder, word: str, vectors: Tensor) -> list[int]:
    """Teach a text encoder, which is changed in place, a word.

    Args:    word: how prompts name it, e.g. <my-cat>.  vectors: (n, width) its embeddings.
    Returns: the ids of its tokens.
    Raises:  UserError: the word means something already, cannot be a word, or the vectors are of
             another width; the encoder is as it was.
    """
    if vectors.ndim != 2 or vectors.shape[1] != encoder.width or not len(vectors):
        raise UserError(
            f"the embedding of {word!r} must be (vectors, {encoder.width}) for this text encoder; "
            f"got {tuple(vectors.shape)}. Widths of 768 are for Stable Diffusion 1.x, 1024 for 2.x."
        )
    names = [word, *(f"{word}_{i}" for i in range(1, len(vectors)))]
    tokenizer = _with_tokens(encoder.tokenizer, names)
    ids = [tokenizer.backend.token_to_id(name) for name in names]
    old = encoder.module.embeddings.token_embedding.weight
    table = old.new_zeros(max(max(ids) + 1, len(old)), encoder.width)
    table[: len(old)] = old.detach()
    table[ids] = vectors.to(old)
    encoder.tokenizer = tokenizer
    encoder.module.embeddings.token_embedding = nn.Embedding.from_pretrained(table)
    encoder.module.config["vocab_size"] = len(table)
    return ids


def _check_word(tokenizer: ClipTokenizer, word: str) -> None:
    """Refuse a word that could not be told from other text. Raises: UserError."""
    if word.split() != [word]:
        raise UserError(
            f"the name of a learned word must be without spaces, such as <my-cat>; got {word!r}. "
            "Choose another with token=…"
        )
    known = tokenizer.backend.get_vocab(with_added_tokens=True)
    base, _, number = word.rpartition("_")
    part = number.isdecimal() and tokenizer.backend.token_to_id(base) is not None
    if part or word in known or f"{word}</w>" in known or len(tokenizer.pieces(word)) < 2:
        raise UserError(
            f"{word!r} is a word that the text encoder knows already, or part of one, and prompts "
            "with it would change. Choose another name with token=…, such as "
            f"{'<' + word.strip('<>') + '-2>'!r}."
        )


def _with_tokens(tokenizer: ClipTokenizer, names: list[str]) -> ClipTokenizer:
    from tokenizers import AddedToken, Tokenizer

    for name in names:
        _check_word(tokenizer, name)
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_tokens([AddedToken(n, single_word=bool(_WORD_EDGE.search(n))) for n in names])
    larger = ClipTokenizer(backend, tokenizer.config, tokenizer.max_length)
    if larger.pieces(names[0]) != [tuple(backend.token_to_id(name) for name in names)]:
        raise UserError(
            f"the tokenizer does not read {names[0]!r} as one word. Choose another name with "
            "token=…, of letters, digits and - between < and >."
        )
    return larger
