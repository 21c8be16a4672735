"""Text on which two tokenizers would part: what an export's proof compares them on. Pure; the same strings for the same seed.

Of code points that a later Unicode version assigned, each library knows others (a new letter is no letter to an older one), so
letters and digits come from blocks that have stood for years, whatever Python runs this.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator, Sequence

COUNT = 2000

# Look-alikes of special tokens, of the families that chat models use; the model's own are added.
_LOOK_ALIKES = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|eot_id|>", "<s>", "</s>", "<unk>", "<pad>",
    "[INST]", "[/INST]", "<<SYS>>", "<start_of_turn>", "<repo_name>", "<file_sep>", "[PAD480]", "[PAD51199]", "Instruct:",
    "\nOutput:", "<|", "|>", "<||>", "{prompt}", "{system}", "<|im_start|", "im_end|>", "<| im_end |>", "\u0120", "\u010a",
    "\u2581", "<0x0A>",
)  # fmt: skip
# Kinds of white space, line breaks and joiners, and bytes that some vocabularies lack.
_SPACES = (
    " ", "  ", "\t", "\n", "\n\n", "\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u00a0", "\u1680", "\u2003", "\u2028", "\u2029",
    "\u202f", "\u205f", "\u3000", "\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u00ad", "\x00", "\x04", "\x16\x14", "\x7f",
)  # fmt: skip
_NUMBERS = (
    "0", "12", "\n12", "\n  7", "345", "6789", "1,234.56", "-0.5e-10", "$5.00", "½", "²", "Ⅷ", "٣٤", "०९", "𝟘𝟙", "㊿", "①",
    "三百", "0x7f3a", "3rd", "v2.10.3", "192.0.2.1", "12:30", "a1b2", "\uff11\uff12", "৭", "↉",
)  # fmt: skip
_WORDS = (
    "hello", " world", "The", " the", "'s", "'re", "'LL", "n't", "I'd've", "\u2019s", "naïve", "Äpfel", "straße", "e\u0301",
    "\ufb01", "İ", "日本語", "カタカナ", "中文", "한국어", "ไทย", "العربية", "हिन्दी", "русский", "Ελληνικά", "עברית", "Việt",
    "ქართული", "\ud83d", "!!!", "...", "—", "//", "?!", "«»", "://", "@#$%", "^_^", "\\n", '"', "``", "~~~", "#include", "_x",
    "__init__", "CamelCase",
)  # fmt: skip
_EMOJI = (
    "😀", "👩\u200d👩\u200d👧", "👍🏽", "🇩🇪", "🇺🇸🇫🇷", "1\ufe0f\u20e3", "❤\ufe0f", "☺", "🧑🏿\u200d🚀", "🫠",
    "👨\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈", "🤷🏻\u200d♀\ufe0f", "©", "™", "🀄", "🂡", "🏴\U000e0067\U000e0062\U000e007f",
)  # fmt: skip
_CODE = (
    "def f(x):\n    if x:\n        return [i for i in x]\n",
    'for (int i = 0; i < n; ++i) {\n\t\tprintf("%d\\n", a[i]);\n\t}',
    '{"key": [1, 2.5, null], "nested": {"a": "\\u00e9"}}',
    "<div class='x'>&nbsp;<!-- <|im_end|> --></div>\r\n",
    "SELECT * FROM t WHERE name = 'O''Brien';",
    "$ grep -rn 'foo' . | awk '{print $1}' > /dev/null 2>&1",
    "\\frac{1}{2} \\sum_{i=1}^{n} x_i^2",
    "let f = async (a, b) => a?.b ?? await b!;",
    "class A:\n\n\n" + 48 * " " + "def g(self): pass",
    "- [ ] item\n  - nested\n\n| a | b |\n|---|---|",
    "http://example.org/?q=%20a&b=c#d",
)

# (first, last) code point of what characters are drawn from.
_BLOCKS = {
    0: [(0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x1FFF), (0x2000, 0x2FFF), (0x3000, 0x9FA5), (0xA000, 0xA48C), (0xAC00, 0xD7A3),
        (0xE000, 0xF8FF), (0xF900, 0xFFFF)],
    1: [(0x10300, 0x1044F), (0x12000, 0x1236E), (0x13000, 0x1342E), (0x1D100, 0x1D7FF), (0x1F300, 0x1F5FF), (0x1F600, 0x1F64F)],
    2: [(0x20000, 0x2A6D6), (0x2F800, 0x2FA1D)],
    3: [(0x30000, 0x3134A)],
    14: [(0xE0001, 0xE0001), (0xE0020, 0xE007F), (0xE0100, 0xE01EF)],
    15: [(0xF0000, 0xFFFFD)],
    16: [(0x100000, 0x10FFFF)],
}  # fmt: skip
_EMPTY_PLANES = range(4, 14)  # no character was ever assigned there
# Blocks with gaps that later versions filled: there, what Unicode 3.2 (2002) knew, which every Python carries.
_WITH_GAPS = [(0x370, 0x1FFF), (0x2000, 0x2FFF), (0x3000, 0x9FA5), (0xF900, 0xFFFF), (0x10300, 0x1044F), (0x1D100, 0x1D7FF)]


def strings(tokens: Sequence[str] = (), *, count: int = COUNT, seed: int = 0) -> list[str]:
    """`count` different strings: each kind of text by itself, then random mixtures of all kinds.

    tokens   the model's own special and added tokens, as text
    """
    rng = random.Random(seed)
    look_alikes = (*_LOOK_ALIKES, *tokens)
    made = dict.fromkeys(_one_of_each(look_alikes, rng))  # in order, none twice
    while len(made) < count:
        made["".join(_piece(look_alikes, rng) for _ in range(rng.randint(1, 12)))] = None
    return list(made)[:count]


def _one_of_each(look_alikes: Sequence[str], rng: random.Random) -> Iterator[str]:
    yield from (*_SPACES, *_NUMBERS, *_WORDS, *_EMOJI, *_CODE)
    for token in look_alikes[:120]:  # a model may have a thousand of its own; the mixtures draw from all
        yield from (token, f"a {token}b", f"{token}{token} ", f"{token[: len(token) // 2]}{token}{token[len(token) // 2 :]}")
    for plane in range(17):
        yield from ("".join(_character(plane, rng) for _ in range(length)) for length in (1, 2, 5, 20))
    for length in range(1, 81):
        yield from (" " * length + "x", "x" + "\n" * length, "\t" * length)
        yield "y" + "".join(rng.choice(" \t\n") for _ in range(length)) + "z"


def _piece(look_alikes: Sequence[str], rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.55:
        return rng.choice(rng.choice((look_alikes, _SPACES, _NUMBERS, _WORDS, _EMOJI)))
    if kind < 0.75:
        return "".join(_character(rng.choice((0, 0, 0, 0, 1, 1, 2, 3, 14, 15, 16)), rng) for _ in range(rng.randint(1, 6)))
    if kind < 0.85:
        return str(rng.randint(0, 10 ** rng.randint(1, 12)))
    if kind < 0.95:
        return rng.choice((" ", "\t", "\n", "\r\n", " \n")) * rng.randint(1, 40)
    return rng.choice(_CODE)


def _character(plane: int, rng: random.Random) -> str:
    if plane in _EMPTY_PLANES:
        return chr(plane * 0x10000 + rng.randint(0, 0xFFFF))
    block = rng.choice(_BLOCKS[plane])
    while True:
        character = chr(rng.randint(*block))
        if block not in _WITH_GAPS or unicodedata.ucd_3_2_0.category(character) != "Cn":
            return character
