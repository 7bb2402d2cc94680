"""Text to token ids and back: words as in the article, characters, or byte-level BPE.

| kind   | a token is            | unknown text is    | decode(encode(text)) is text           |
|--------|-----------------------|--------------------|----------------------------------------|
| `word` | a word: `text.split()`| `<UNK>`            | if all words are known, but for spaces |
| `char` | a Unicode character   | `<UNK>`            | if all characters are known            |
| `bpe`  | a run of bytes        | none: bytes are all| always                                 |

All three share the protocol `Tokenizer` and are saved as one `tokenizer.json`, which
`load_tokenizer` tells apart.
"""

from __future__ import annotations

from tinyllm.tokenizer.base import END_OF_TEXT, UNKNOWN, Tokenizer, check_vocab_size
from tinyllm.tokenizer.bpe import BPETokenizer
from tinyllm.tokenizer.formats import load_vocabulary
from tinyllm.tokenizer.load import load_tokenizer, train_tokenizer
from tinyllm.tokenizer.words import CharTokenizer, WordTokenizer

__all__ = [
    "END_OF_TEXT",
    "UNKNOWN",
    "BPETokenizer",
    "CharTokenizer",
    "Tokenizer",
    "WordTokenizer",
    "check_vocab_size",
    "load_tokenizer",
    "load_vocabulary",
    "train_tokenizer",
]
