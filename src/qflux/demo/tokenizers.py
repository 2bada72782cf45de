"""Tokenizers of the demo models, built from a word list: no download, no training, the same files on every machine.

Each known word is one token. Any other text is spelled: bytes for the CLIP shape, printable ASCII characters for the
T5 shape, so that a prompt in other words still reaches the network.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qflux.io.quiet import quiet_imports

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, T5TokenizerFast

_WORD_LIST = """
a all an and are as at background big black blue bottom bright brighter brown change circle color colors colour
colours cyan dark darker draw edge fill find from give green grey half image in into is it keep large left light
lighter lime magenta make mark mask middle move navy no nothing object of olive on one orange outline paint picture
pink place purple put red remove replace right rose same scene segment select set shape show side sky small square
stay surface swap switch tan teal the them then this to top triangle turn two unchanged up violet white with yellow
"""
WORDS: tuple[str, ...] = tuple(_WORD_LIST.split())
_START, _END, _SUFFIX = "<|startoftext|>", "<|endoftext|>", "</w>"
_SPELLING_SCORE = -20.0  # log-probability of a single character: far below any word's, so words win


def _byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes that byte-level BPE works on, in byte order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def _apply(rules: dict[tuple[str, str], int], pieces: list[str]) -> list[str]:
    """Byte-pair encoding of one word: the earliest rule first, until none fits."""
    while True:
        ranks = [rules.get(pair, len(rules)) for pair in itertools.pairwise(pieces)]
        if not ranks or min(ranks) == len(rules):
            return pieces
        at = ranks.index(min(ranks))
        pieces = [*pieces[:at], pieces[at] + pieces[at + 1], *pieces[at + 2 :]]


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merge rules that make each word one token.

    A word gets rules only for what the earlier rules leave of it; later rules never touch an earlier word, because
    it is one piece by then.
    """
    rules: dict[tuple[str, str], int] = {}
    for word in words:
        head, *rest = _apply(rules, [*word[:-1], word[-1] + _SUFFIX])
        for piece in rest:
            rules.setdefault((head, piece), len(rules))
            head += piece
    return list(rules)


def clip_tokenizer(words: Sequence[str] = WORDS) -> CLIPTokenizer:
    """CLIP's byte-level BPE with a merge chain for every word; 77 tokens at most, padded with the end token."""
    with quiet_imports():
        from transformers import CLIPTokenizer
    alphabet = _byte_alphabet()
    rules = _merges(words)
    tokens = [*alphabet, *(letter + _SUFFIX for letter in alphabet), *("".join(rule) for rule in rules), _START, _END]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=rules, model_max_length=77)


def t5_tokenizer(words: Sequence[str] = WORDS) -> T5TokenizerFast:
    """T5's unigram model over whole words (equal scores) with printable ASCII as the last resort."""
    with quiet_imports():
        from transformers import T5TokenizerFast
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [("▁" + word, -5.0) for word in words]
    letters = string.ascii_letters + string.digits + string.punctuation
    vocab += [(letter, _SPELLING_SCORE) for letter in letters]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)
