"""The demo's tokenizer: one token per printable ASCII character."""

from __future__ import annotations

import string

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from .skills.sample import STOP

PAD, BOS, UNKNOWN = "<pad>", "<bos>", "<unk>"
_SPECIAL = (PAD, BOS, STOP, UNKNOWN)
_CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " "


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """Build a character tokenizer with 99 tokens that adds no special tokens to a text.

    The newline is the end-of-sequence token: every answer ends in it, and generation stops there.
    ``decode(encode(text))`` gives printable ASCII text and newlines back exactly.
    """
    vocabulary = {token: number for number, token in enumerate((*_SPECIAL, *_CHARACTERS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # not annotated in transformers
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=STOP,
        unk_token=UNKNOWN,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
