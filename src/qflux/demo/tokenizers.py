"""Tokenizers of the demo models, built from a word list: no download, no training, the same files on every machine.

Each known word is one token. Any other text is spelled: bytes for the CLIP, Qwen and Mistral shapes, printable ASCII
characters for the T5 shape, so that a prompt in other words still reaches the network.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qflux.io.quiet import quiet_imports

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer, T5TokenizerFast

_WORD_LIST = """
a all an and are as at background big black blue bottom bright brighter brown change circle color colors colour
colours cyan dark darker draw edge fill find from give green grey half image in into is it keep large left light
lighter lime magenta make mark mask middle move navy no nothing object of olive on one orange outline paint picture
pink place purple put red remove replace right rose same scene segment select set shape show side sky small square
stay surface swap switch tan teal the them then this to top triangle turn two unchanged up violet white with yellow
"""
WORDS: tuple[str, ...] = tuple(_WORD_LIST.split())
# What the official pipelines write around a prompt. As single tokens they make the templates as long as on the
# full-size models: where a pipeline drops a fixed number of leading tokens, it drops the template alone.
_TEMPLATE_WORD_LIST = """
AI Describe Generate Picture You about actions alter an and appropriate are assistant attribution background by color
consistency describe descriptions detailing explain features focusing give how image input instruction key maintaining
meets modify new object objects of on or original quantity reasons relationships requirements responses should size
spatial speculation structured system text texture that the then user where while with without
"""
TEMPLATE_WORDS: tuple[str, ...] = tuple(_TEMPLATE_WORD_LIST.split())
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


def _merges(words: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    """Merge rules that make each word, given as its letters, one token.

    A word gets rules only for what the earlier rules leave of it; later rules never touch an earlier word, because
    it is one piece by then.
    """
    rules: dict[tuple[str, str], int] = {}
    for word in words:
        head, *rest = _apply(rules, list(word))
        for piece in rest:
            rules.setdefault((head, piece), len(rules))
            head += piece
    return list(rules)


def clip_tokenizer(words: Sequence[str] = WORDS) -> CLIPTokenizer:
    """CLIP's byte-level BPE with a merge chain for every word; 77 tokens at most, padded with the end token."""
    with quiet_imports():
        from transformers import CLIPTokenizer
    alphabet = _byte_alphabet()
    rules = _merges([*word[:-1], word[-1] + _SUFFIX] for word in words)
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


_SPACE, _NEWLINE = "Ġ", "Ċ"  # their stand-ins in the byte alphabet
_PUNCTUATION = (f"{_SPACE}(", "),", "'s", _NEWLINE * 2)  # pieces of the official templates


def _byte_level(words: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merge rules of byte-level BPE: all bytes, and each word as one token with and without its space."""
    known = dict.fromkeys([*words, *TEMPLATE_WORDS])
    spelled = [*known, *(_SPACE + word for word in known), *_PUNCTUATION]
    rules = _merges(spelled)
    return [*_byte_alphabet(), *("".join(rule) for rule in rules)], rules


QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_QWEN_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{{- part['text'] if part['type'] == 'text' else '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\n\n</think>\n\n' }}
{%- endif %}
{%- endif %}
"""


def qwen_tokenizer(words: Sequence[str] = WORDS) -> Qwen2Tokenizer:
    """Qwen's byte-level BPE with its vision tokens and chat template; right padding with the end-of-text token.

    With ``enable_thinking=False`` the template closes an empty ``<think>`` block, as Qwen3's does.
    """
    with quiet_imports():
        from transformers import AddedToken, Qwen2Tokenizer
    tokens, rules = _byte_level(words)
    vocab = {token: index for index, token in enumerate([*dict.fromkeys(tokens), *QWEN_SPECIAL, "<think>", "</think>"])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=rules,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(QWEN_SPECIAL[1:]),
        model_max_length=131072,
    )
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")])
    tokenizer.chat_template = _QWEN_TEMPLATE
    return tokenizer


MISTRAL_SPECIAL = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
)
_MISTRAL_TEMPLATE = """\
{%- macro words(content) %}
{%- if content is string %}
{{- content }}
{%- else %}
{%- for part in content %}
{{- part['text'] if part['type'] == 'text' else '[IMG]' }}
{%- endfor %}
{%- endif %}
{%- endmacro %}
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{{- '[SYSTEM_PROMPT]' + words(message['content']) + '[/SYSTEM_PROMPT]' }}
{%- elif message['role'] == 'user' %}
{{- '[INST]' + words(message['content']) + '[/INST]' }}
{%- else %}
{{- words(message['content']) + eos_token }}
{%- endif %}
{%- endfor %}
"""


def mistral_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """Mistral's byte-level BPE with a chat template that takes a system prompt; left padding.

    Text tokenised directly gets a leading ``<s>``; the template writes its own.
    """
    with quiet_imports():
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast
    tokens, rules = _byte_level(words)
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*MISTRAL_SPECIAL, *tokens]))}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=rules))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    inner.add_special_tokens(list(MISTRAL_SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=[mark for mark in MISTRAL_SPECIAL if mark.startswith("[")],
        padding_side="left",
        model_max_length=131072,
    )
    tokenizer.chat_template = _MISTRAL_TEMPLATE
    return tokenizer
